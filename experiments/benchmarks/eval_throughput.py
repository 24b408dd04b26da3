"""Generated answers in samples per second: our evaluation against PEFT's unmerged `generate`.

    python experiments/benchmarks/eval_throughput.py --json out.json
    python experiments/benchmarks/eval_throughput.py task=commonsense170k/boolq task.data=FOLDER

Both sides hold the same adapter (its start, moved by noise) on the same model and answer the same test prompts with the
same decoding. Ours: the evaluation loader (sorted by length) and `predict_step`. The peer: batches in the data's order,
padded on the left, to `PeftModel.generate`. In each round every side answers all prompts once, in shuffled order. The
last column is the share of prompts to which both wrote the same text; in 16 bits rounding makes it less than 1.
"""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch
from common import (
    Gap,
    add_peft,
    arguments,
    environment,
    interleave,
    move_off_start,
    note,
    over,
    ratio,
    run_words,
    show_environment,
    show_table,
    summary,
    write_json,
)

from highrank.backbones import load_backbone
from highrank.config import compose_run
from highrank.data import TaskData, pad
from highrank.encoding import encode_prompt
from highrank.module import FineTuner
from highrank.run import build_model


def our_side(module: FineTuner, data: TaskData, records: Sequence[Any], device: str, texts: list[str]) -> Callable:
    @torch.inference_mode()
    def answer() -> None:
        for i, batch in enumerate(data.eval_dataloader(records)):
            for place, text in module.predict_step({key: value.to(device) for key, value in batch.items()}, i):
                texts[place] = text

    return answer


def their_side(model: Any, module: FineTuner, data: TaskData, records: Sequence[Any], device: str, texts: list[str]):
    tokenizer, size = data.tokenizer, data.eval_batch_size

    @torch.inference_mode()
    def answer() -> None:
        for start in range(0, len(records), size):
            rows = [encode_prompt(record, data.protocol, tokenizer) for record in records[start : start + size]]
            ids = pad(rows, tokenizer.pad_token_id, left=True)
            mask = pad([[1] * len(row) for row in rows], 0, left=True)
            tokens = model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
                **module.decoding,
            )
            out = tokenizer.batch_decode(tokens[:, ids.shape[1] :], skip_special_tokens=True)
            texts[start : start + size] = out

    return answer


def measure(method: str, args: argparse.Namespace) -> dict[str, Any]:
    """Returns per batch size the samples/s of both sides and the ratio of their speeds; or the peer's gap."""
    run = compose_run(run_words(args.words, {"method": method, "placement": "fc_qkv"}))
    task = run.task(run.task_cfg, run.core.seed)
    backbone, adapters = build_model(run, task)
    adapters.model.to(args.device)
    move_off_start(adapters)
    peer, gap = None, None
    try:
        peer = add_peft(load_backbone(run.model, run.core.path).model.to(args.device), method, adapters).eval()
    except Gap as reason:
        gap = str(reason)
    found: dict[str, Any] = {}
    for size in map(int, args.batch_sizes.split(",")):
        data = TaskData(task, run.protocol, backbone.tokenizer, run.core.batch_size, size, run.core.seed)
        module = FineTuner(adapters, task, backbone.tokenizer, run.core, 1, run.protocol).eval()
        records = next(iter(task.test().values()))[: max(args.prompts, args.batches * size)]
        texts = {name: [""] * len(records) for name in ("ours", "PEFT")}
        sides = {"ours": our_side(module, data, records, args.device, texts["ours"])}
        if peer:
            sides["PEFT"] = their_side(peer, module, data, records, args.device, texts["PEFT"])
        times = interleave(sides, args.rounds, args.warmups, args.device)
        at = found[str(size)] = {
            name: {"samples_per_second": summary([len(records) / t for t in times[name]])} for name in sides
        }
        at["prompts"] = len(records)
        if gap:
            at["PEFT"] = {"gap": gap}
        else:
            at["speedup"] = over(times, "PEFT", "ours")
            at["same_text"] = sum(a == b for a, b in zip(*texts.values(), strict=True)) / len(records)
        note(f"{method}, batch size {size}: {len(records)} prompts")
    return found


def main(words: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__, rounds=3)
    parser.add_argument("words", nargs="*", help="words of run.py: model=, task=, protocol=, ...")
    parser.add_argument("--methods", default="hira,lora")
    parser.add_argument("--batch-sizes", default="1,50")
    parser.add_argument("--prompts", type=int, default=8, help="at least so many prompts (default 8)")
    parser.add_argument("--batches", type=int, default=2, help="at least so many batches (default 2)")
    parser.add_argument("--warmups", type=int, default=1, help="rounds that are not measured (default 1)")
    args = parser.parse_intermixed_args(words)
    env = environment(args.device)
    show_environment("eval_throughput", env)
    results, rows = {}, []
    for method in args.methods.split(","):
        results[method] = measure(method, args)
        for size, at in results[method].items():
            for side in ("ours", "PEFT"):
                if "gap" in at[side]:
                    rows.append([method, size, "PEFT", f"– ({at['PEFT']['gap']})", "", ""])
                    continue
                speed = f"{at[side]['samples_per_second']['median']:.2f}"
                last = [ratio(at.get("speedup")), f"{at.get('same_text', 1):.2f}"] if side == "ours" else ["", ""]
                rows.append([method, size, side, speed, *last])
    columns = ["method", "batch size", "side", "samples/s", "ours over PEFT (quartiles)", "same text"]
    show_table(columns, rows)
    write_json(args, "eval_throughput", env, results)


if __name__ == "__main__":
    main()
