"""A whole run in samples per second: ours through Lightning against PEFT through the Hugging Face Trainer.

    python experiments/benchmarks/train_throughput.py --json out.json
    python experiments/benchmarks/train_throughput.py task=commonsense170k task.data=FOLDER task.n_train=384

Both sides train the same model on the same encoded examples, with the same start of the adapter, batch size, optimizer
settings, schedule, clipping and number of steps; further words are those of run.py. Ours is what run.py does: TrainingData,
FineTuner, Lightning. The peer is what a user of PEFT gets: its model in `transformers.Trainer` with its own optimizer,
its own loss over all logits, random batches and DataCollatorForSeq2Seq padding to the longest row of a batch.

Both loops are the frameworks' own and run in one process, in two threads of which one has the turn: after --block steps
it waits while the other does its block. The first block of each holds the start-up and is not measured. The ratio is
taken block by block; the losses shown are those of the last quarter of the steps (each side's own batches), and, after
the last step, of the same test examples, as many of each test set, both by our loss.
"""

import argparse
import contextlib
import io
import itertools
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from common import (
    Gap,
    add_peft,
    arguments,
    environment,
    import_peft,
    note,
    over,
    ratio,
    run_words,
    show_environment,
    show_table,
    summary,
    synchronize,
    write_json,
)
from lightning.pytorch.callbacks import Callback

from highrank.config.run_config import Run
from highrank.config.words import compose_run
from highrank.data.batches import TrainingData, collate
from highrank.data.encoding import Encoded, encode
from highrank.model.adapters import Adapters
from highrank.model.backbones import load_backbone
from highrank.train.build import build_model
from highrank.train.devices import quiet
from highrank.train.loss import language_model_loss
from highrank.train.module import FineTuner
from highrank.train.optimizer import SCHEDULERS
from highrank.train.results import RunDirectory
from highrank.train.stopping import StopOnSignal
from highrank.train.trainer import make_trainer


class Relay:
    """Lets training loops in several threads take turns of `block` steps, and times the turns.

    `between` is called with a side's name after each of its turns, off the clock.
    """

    def __init__(
        self, names: Sequence[str], block: int, device: str, between: Callable[[str], None] = lambda name: None
    ):
        self.queue, self.block, self.device, self.between = list(names), block, device, between
        self.times: dict[str, list[float]] = {name: [] for name in names}
        self.losses: dict[str, list[float]] = {name: [] for name in names}
        self.errors: list[BaseException] = []
        self._changed = threading.Condition()
        self._steps, self._started = 0, 0.0

    def take(self, name: str) -> None:
        """Returns when it is this side's turn."""
        with self._changed:
            self._changed.wait_for(lambda: self.queue[0] == name)
        self._steps, self._started = 0, time.perf_counter()

    def _pass_on(self, leave: bool) -> None:
        with self._changed:
            name = self.queue.pop(0)
            if not leave:
                self.queue.append(name)
            self._changed.notify_all()

    def step(self, name: str) -> None:
        """Counts a step; at the end of a block waits for the next turn."""
        self._steps += 1
        if self._steps == self.block:
            synchronize(self.device)
            self.times[name].append(time.perf_counter() - self._started)
            note(f"{name}: block {len(self.times[name])} in {self.times[name][-1]:.1f} s")
            self.between(name)
            self._pass_on(leave=False)
            self.take(name)

    def leave(self) -> None:
        """Ends the turn of the side that has it, for good."""
        self._pass_on(leave=True)

    def run(self, loops: Mapping[str, Callable[[], None]]) -> None:
        """Runs each side's loop in a thread of its own, to the end; raises the first error of any."""

        def turn(name: str, loop: Callable[[], None]) -> None:
            self.take(name)
            try:
                loop()
            except BaseException as error:
                self.errors.append(error)
            finally:
                self.leave()

        threads = [threading.Thread(target=turn, args=pair, daemon=True) for pair in loops.items()]
        with quiet(), contextlib.redirect_stdout(io.StringIO()):  # the progress bar is drawn, and paid for, not shown
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        if self.errors:
            raise self.errors[0]


class Ours(Callback):
    """Takes our turns in Lightning's loop."""

    def __init__(self, relay: Relay, name: str):
        self.relay, self.name, self.steps = relay, name, 0

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.relay.losses[self.name].append(float(outputs["loss"]))
        if trainer.global_step > self.steps:  # not between micro-batches
            self.steps = trainer.global_step
            self.relay.step(self.name)


def train_ours(run: Run, data: TrainingData, adapters: Adapters, relay: Relay, name: str = "ours") -> None:
    directory = RunDirectory(run)
    directory.open()
    steps = run.core.max_steps or 0
    module = FineTuner(adapters, run.make_task(), data.tokenizer, run.core, steps, run.protocol)
    trainer = make_trainer(run, directory, StopOnSignal(), steps, len(data.buckets))
    trainer.callbacks.append(Ours(relay, name))  # type: ignore[attr-defined]
    module.train()
    trainer.fit(module, train_dataloaders=data.train_dataloader())


def train_peft(run: Run, data: TrainingData, model: Any, relay: Relay, folder: str, device: str) -> None:
    from transformers import DataCollatorForSeq2Seq, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    class Theirs(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            relay.step("PEFT")

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "loss" in (logs or {}):  # the mean of the block's losses
                relay.losses["PEFT"].extend([float(logs["loss"])] * relay.block)

    core = run.core
    rows = [
        {"input_ids": row.input_ids, "attention_mask": [1] * len(row.input_ids), "labels": row.labels}
        for row in data.examples
    ]
    settings = TrainingArguments(
        output_dir=folder,
        max_steps=core.max_steps or 0,
        per_device_train_batch_size=core.batch_size,
        gradient_accumulation_steps=core.accumulate,
        learning_rate=core.lr,
        adam_beta1=core.betas[0],
        adam_beta2=core.betas[1],
        weight_decay=core.weight_decay,
        max_grad_norm=core.max_grad_norm,
        lr_scheduler_type=SCHEDULERS[core.schedule],
        warmup_steps=core.warmup_steps or round(core.warmup_ratio * (core.max_steps or 0)),
        logging_steps=relay.block,
        seed=core.seed,
        use_cpu=device == "cpu",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    collator = DataCollatorForSeq2Seq(data.tokenizer, label_pad_token_id=-100)
    trainer = Trainer(model=model, args=settings, train_dataset=rows, data_collator=collator, callbacks=[Theirs()])
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def test_rows(run: Run, data: TrainingData, n: int) -> list[Encoded]:
    """Returns n encoded test examples, as many of each test set."""
    turns = itertools.zip_longest(*run.make_task().test().values())
    records = [record for turn in turns for record in turn if record is not None][:n]
    return [row for row in (encode(r, run.protocol, data.tokenizer) for r in records) if row is not None]


@torch.no_grad()
def test_loss(model: Any, rows: Sequence[Encoded], pad_id: int) -> float:
    """Returns the mean loss in nats over the target tokens of the rows."""
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    total = count = 0.0
    for start in range(0, len(rows), 8):
        batch = collate(rows[start : start + 8], pad_id)
        loss, num = language_model_loss(model, **{key: value.to(device) for key, value in batch.items()})
        total, count = total + float(loss) * num, count + num
    model.train(training)
    return total / count


def import_trainer() -> None:
    """Raises Gap where PEFT, or what the Trainer needs, is not installed."""
    import_peft()
    try:
        import accelerate  # noqa: F401
    except ImportError:
        raise Gap("accelerate, which the Trainer needs, is not installed") from None


def training_run(method: str, args: argparse.Namespace, folder: str, words: Sequence[str] = ()) -> Run:
    """Returns a checked run of args.steps steps on args.device, with nothing held out; `words` come last."""
    wanted = {
        "method": method,
        "placement": "fc_qkv",
        "max_steps": args.steps,
        "output": folder,
        "protocol.num_validation": 0,
        "protocol.selection": "last",
        "trainer.accelerator": "gpu" if args.device.startswith("cuda") else "cpu",
        "trainer.devices": 1,
    }
    return compose_run(run_words([*args.words, *words], wanted))


def measure(method: str, args: argparse.Namespace, folder: str) -> dict[str, Any]:
    """Returns samples/s and losses of both sides, and the ratio of their speeds; or the peer's gap."""
    run = training_run(method, args, folder)
    task = run.make_task()
    backbone, adapters = build_model(run, task)
    core = run.core
    data = TrainingData(task, run.protocol, backbone.tokenizer, core.batch_size, core.eval_batch_size, core.seed)
    peer, gap = None, None
    try:
        import_trainer()
        peer = add_peft(load_backbone(run.model, core.path).model.to(args.device), method, adapters)
        peer.train()
    except Gap as reason:
        gap = str(reason)
    relay = Relay(["ours", "PEFT"] if peer else ["ours"], args.block, args.device)
    loops: dict[str, Callable[[], None]] = {"ours": lambda: train_ours(run, data, adapters, relay)}
    if peer:
        loops["PEFT"] = lambda: train_peft(run, data, peer, relay, f"{folder}/peft", args.device)
    relay.run(loops)

    rows = test_rows(run, data, args.test_examples)
    models = {"ours": adapters.model.to(args.device), "PEFT": peer}
    samples = args.block * core.batch_size * core.accumulate
    found: dict[str, Any] = {"model": run.model["name"], "task": run.task.name, "batch_size": core.batch_size}
    for name in relay.times:
        times = relay.times[name][1:]
        losses = relay.losses[name]
        window = losses[-max(1, len(losses) // 4) :]
        found[name] = {
            "samples_per_second": summary([samples / t for t in times]),
            "final_loss": sum(window) / len(window),
            "test_loss": test_loss(models[name], rows, data.tokenizer.pad_token_id),
            "losses": losses,
        }
    if gap:
        found["PEFT"] = {"gap": gap}
    else:
        blocks = min(map(len, relay.times.values()))  # a side's last block may be cut short, and is then not timed
        found["speedup"] = over({name: t[1:blocks] for name, t in relay.times.items()}, "PEFT", "ours")
    return found


def main(words: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__, rounds=11)
    parser.add_argument("words", nargs="*", help="words of run.py: model=, task=, batch_size=, lr=, seed=, ...")
    parser.add_argument("--methods", default="lora,hira")
    parser.add_argument("--block", type=int, default=4, help="steps per turn (default 4)")
    parser.add_argument("--test-examples", type=int, default=64, help="for the loss after training (default 64)")
    args = parser.parse_intermixed_args(words)
    args.steps = args.block * (args.rounds + 1)
    env = {"dtype": compose_run(args.words).model["dtype"], **environment(args.device)}
    show_environment("train_throughput", env)
    results, rows = {}, []
    for method in args.methods.split(","):
        with tempfile.TemporaryDirectory() as folder:
            found = results[method] = measure(method, args, folder)
        title = f"{found['model']}, {found['task']}, batch {found['batch_size']}, {args.steps} steps"
        for side in ("ours", "PEFT"):
            at = found[side]
            if "gap" in at:
                rows.append([method, "PEFT + Trainer", f"– ({at['gap']})", "–", "–", ""])
                continue
            speed = f"{at['samples_per_second']['median']:.2f}"
            name = "ours" if side == "ours" else "PEFT + Trainer"
            times = ratio(found.get("speedup")) if side == "ours" else ""
            rows.append([method, name, speed, f"{at['final_loss']:.3f}", f"{at['test_loss']:.3f}", times])
    print(title)
    columns = ["method", "side", "samples/s", "loss, last quarter", "loss, test set", "ours over PEFT (quartiles)"]
    show_table(columns, rows)
    write_json(args, "train_throughput", env, results)


if __name__ == "__main__":
    main()
