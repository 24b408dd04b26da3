"""Generated answers in samples per second: our evaluation against plain `generate`, PEFT's, and batch size 1.

    python experiments/benchmarks/eval_throughput.py --json out.json
    python experiments/benchmarks/eval_throughput.py task=commonsense170k/boolq task.data=FOLDER --batches 4

All sides hold the same adapter (its start, moved by noise) on the same model and answer the same test prompts with the
same decoding, at most 16 tokens unless protocol.max_new_tokens says otherwise. Ours: the evaluation loader (sorted by
length) and `outputs`. generate: batches in the data's order, padded on the left, to `generate` of our model. no adapter:
the same with the frozen model, always to the last token: about the most that any method can reach. PEFT: the same with
`PeftModel.generate`, its adapter unmerged. In each round every side answers at every batch size once, in shuffled order.
"same text" is the share of prompts to which a side wrote what ours did; in 16 bits rounding makes it less than 1.
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

from highrank.config.words import compose_run
from highrank.data.batches import EvalData, pad
from highrank.data.encoding import encode_prompt
from highrank.model.backbones import load_backbone
from highrank.train.build import build_model
from highrank.train.module import FineTuner
from highrank.train.outputs import decoding


def our_side(
    module: FineTuner, data: EvalData, size: int, records: Sequence[Any], device: str, texts: list[str]
) -> Callable:
    @torch.inference_mode()
    def answer() -> None:
        for i, batch in enumerate(data.dataloader("set", records, size)):
            for place, text in module.outputs({key: value.to(device) for key, value in batch.items()}, i):
                texts[place] = text

    return answer


def plain_side(
    model: Any,
    module: FineTuner,
    data: EvalData,
    size: int,
    records: Sequence[Any],
    device: str,
    texts: list[str],
    **more: Any,
) -> Callable:
    tokenizer = data.tokenizer

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
                **{**decoding(module.task, module.protocol), **more},
            )
            out = tokenizer.batch_decode(tokens[:, ids.shape[1] :], skip_special_tokens=True)
            texts[start : start + size] = out

    return answer


def measure(method: str, args: argparse.Namespace) -> dict[str, Any]:
    """Returns per batch size and side the samples/s, and ours over it; or the peer's gap.

    Ours also has its samples/s over those at the first batch size.
    """
    wanted = {"method": method, "placement": "fc_qkv", "protocol.max_new_tokens": 16}
    run = compose_run(run_words(args.words, wanted))
    task = run.make_task()
    backbone, adapters = build_model(run, task)
    adapters.model.to(args.device)
    move_off_start(adapters)
    frozen = load_backbone(run.model, run.core.path).model.to(args.device).eval()
    models, gap = {"generate": adapters.model, "no adapter": frozen}, None
    try:
        models["PEFT"] = add_peft(
            load_backbone(run.model, run.core.path).model.to(args.device), method, adapters
        ).eval()
    except Gap as reason:
        gap = str(reason)
    sizes = [int(size) for size in args.batch_sizes.split(",")]
    sides: dict[Any, Callable] = {}
    texts: dict[Any, list[str]] = {}
    for size in sizes:
        data = EvalData(task, run.protocol, backbone.tokenizer)
        module = FineTuner(adapters, task, backbone.tokenizer, run.core, 1, run.protocol).eval()
        records = next(iter(task.test().values()))[: max(args.prompts, args.batches * size)]
        texts |= {(name, size): [""] * len(records) for name in ("ours", *models)}
        sides["ours", size] = our_side(module, data, size, records, args.device, texts["ours", size])
        for name, model in models.items():
            more = {"min_new_tokens": run.protocol.max_new_tokens} if model is frozen else {}
            sides[name, size] = plain_side(model, module, data, size, records, args.device, texts[name, size], **more)
    note(f"{method}: {len(sides)} sides, {args.warmups + args.rounds} rounds")
    times = interleave(sides, args.rounds, args.warmups, args.device)
    each = {key: [t / len(texts[key]) for t in times[key]] for key in sides}
    found: dict[str, Any] = {}
    for size in sizes:
        ours, at = "ours", found.setdefault(str(size), {"prompts": len(texts["ours", size])})
        for name in (ours, *models):
            same = [a == b for a, b in zip(texts[name, size], texts[ours, size], strict=True)]
            at[name] = {
                "samples_per_second": summary([1 / t for t in each[name, size]]),
                "ours_over": over(each, (name, size), (ours, size)),
                "same_text": sum(same) / len(same),
            }
        at[ours]["batching"] = over(each, (ours, sizes[0]), (ours, size))
        if gap:
            at["PEFT"] = {"gap": gap}
    return found


def main(words: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__, rounds=3)
    parser.add_argument("words", nargs="*", help="words of run.py: model=, task=, protocol=, ...")
    parser.add_argument("--methods", default="hira,lora")
    parser.add_argument("--batch-sizes", default="1,50", help="the first is what the others are compared with")
    parser.add_argument("--prompts", type=int, default=4, help="at least so many prompts (default 4)")
    parser.add_argument("--batches", type=int, default=1, help="at least so many batches (default 1)")
    parser.add_argument("--warmups", type=int, default=0, help="rounds that are not measured (default 0)")
    args = parser.parse_intermixed_args(words)
    env = {"dtype": compose_run(args.words).model["dtype"], **environment(args.device)}
    show_environment("eval_throughput", env)
    results, rows = {}, []
    for method in args.methods.split(","):
        results[method] = measure(method, args)
        for size, at in results[method].items():
            for side in ("ours", "generate", "no adapter", "PEFT"):
                if "gap" in at[side]:
                    rows.append([method, size, side, f"– ({at[side]['gap']})", "", "", ""])
                    continue
                speed = f"{at[side]['samples_per_second']['median']:.2f}"
                faster = "" if side == "ours" else ratio(at[side]["ours_over"])
                batching = ratio(at[side]["batching"]) if side == "ours" else ""
                rows.append([method, size, side, speed, faster, batching, f"{at[side]['same_text']:.2f}"])
    first = args.batch_sizes.partition(",")[0]
    columns = [
        "method",
        "batch size",
        "side",
        "samples/s",
        "ours over it (quartiles)",
        f"over batch size {first}",
        "same text",
    ]
    show_table(columns, rows)
    write_json(args, "eval_throughput", env, results)


if __name__ == "__main__":
    main()
