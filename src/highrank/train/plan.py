"""What a run will adapt and train, known before any weight loads."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from highrank.base.errors import UserError
from highrank.base.files import shown
from highrank.config.run_config import Run
from highrank.data.batches import hold_out
from highrank.data.task import Task, reading
from highrank.model.backbones import empty_model, head_modules, model_config
from highrank.model.images import num_patches
from highrank.model.language import context_length
from highrank.model.placement import WeightView, notes
from highrank.model.transformers_internals import is_encoder_decoder
from highrank.model.whole_model import VirtualTokens
from highrank.train.build import adapted_views
from highrank.train.devices import num_processes
from highrank.train.footprint import Evaluation, Lengths, memory
from highrank.train.loggers import check_logger
from highrank.train.optimizer import warmup_steps
from highrank.train.start import check_start


@dataclass(frozen=True)
class Params:
    """Exact parameter counts."""

    trainable: int
    """In the adapters; for full fine-tuning, in the whole model without a new head."""
    total: int
    """In the backbone, without a classification head."""
    percent: float
    """100 trainable / (total + trainable), the convention of both papers; for full fine-tuning 100 trainable / total."""
    frozen_extra: int
    """Frozen numbers that the method holds beside the backbone."""
    head: int
    """In the classification head, which trains in full and is counted apart."""


@dataclass(frozen=True)
class Plan:
    """The answer of a dry run."""

    method: str
    model: str
    dtype: str
    """In which the model's weights are, as the config or, with `auto`, this machine has it."""
    placement: Any
    """None for a method to which it does not apply."""
    matched: dict[str, int]
    """Adapted weights per placement part; virtual tokens or biases for a method whose update is no weight."""
    params: Params
    num_train: int
    steps: int
    """Optimizer steps."""
    tokens: int
    """Training tokens, estimated at four characters per token, or counted in patches of images."""
    memory_bytes: dict[str, int]
    """Estimated bytes of each part, and `peak`, the most at any time."""
    start: dict[str, Any] | None = None
    """The run that training goes on from, and how."""
    notes: tuple[str, ...] = ()
    """What `matched` does not tell of where the adapters are."""
    warnings: tuple[str, ...] = ()
    """What is allowed and seldom meant."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def count(model: Any, views: Sequence[WeightView], method: Any, cfg: Any) -> Params:
    """Returns the parameter counts of a method on a model, which may be on the meta device.

    Raises:
        UserError: if the method's fields do not fit one of the weights, or the model.
    """
    head = sum(p.numel() for name in head_modules(model) for p in model.get_submodule(name).parameters())
    total = sum(p.numel() for p in model.parameters()) - head
    trainable, frozen = method.family.count(model, views, method, cfg, total)
    held = total + (trainable if method.family.keeps_base else 0)
    return Params(trainable, total, 100 * trainable / held, frozen, head)


def optimizer_steps(run: Run, num_train: int) -> int:
    """Returns the number of optimizer steps: max_steps, or as many as the epochs hold."""
    if run.core.max_steps is not None:
        return run.core.max_steps
    batches = math.ceil(math.ceil(num_train / run.core.batch_size) / num_processes(run.trainer))
    return max(1, math.ceil(run.core.epochs * math.ceil(batches / run.core.accumulate)))


def make_plan(run: Run, task: Task) -> Plan:
    """Returns the plan of a run on its task; loads the task's data and the model's shape, but no weights.

    Raises:
        UserError: for every rule that the run breaks.
    """
    check_logger(run.core)
    start = check_start(run, task)
    config = model_config(run.model, run.core.path)
    model = empty_model(config, task.kind, task.num_labels)
    core = run.core
    views = adapted_views(run, model)
    params = count(model, views, run.method, run.method_cfg)
    if core.head_lr is not None and not params.head:
        raise UserError(
            f"run: head_lr is the rate of a new head, which this model does not get, got head_lr={core.head_lr} with "
            f"task={run.task.name}; leave it out"
        )
    if core.packing and (task.kind != "generate" or issubclass(run.method, VirtualTokens)):
        what = f"task={task.name}" if task.kind != "generate" else f"method={run.method.name}"
        raise UserError(
            f"run: packing is for language models without virtual tokens, which stand before each example, got {what}; "
            "leave out packing=true"
        )
    if core.general_text is not None and task.kind == "classify_images":
        raise UserError(
            f"run: general_text is what a model of texts may forget, got general_text={shown(core.general_text)} with "
            f"task={run.task.name}; leave it out"
        )
    _check_reader(run, model)
    positions = _positions(run, task, model)
    with reading(task):
        num_train, lengths = _lengths(task, run, num_patches(config))
        if is_encoder_decoder(model.config) and task.has_data and getattr(task.train()[0], "messages", ()):
            raise _goes_on("a conversation", model)
        # What is wrong with a test set is said before weights load.
        tests = task.test() if task.has_data or not core.dry_run else {}
    _check_others(run, task, model)
    cuts = run.protocol.too_long == "cut" or not model.can_generate()
    steps = optimizer_steps(run, num_train)
    asked = Evaluation(_rows_asked(run, tests), _virtual_tokens(run) + _new_tokens(run, task, model))
    return Plan(
        method=run.method.name,
        model=run.model["name"],
        dtype=run.model["dtype"],
        placement=core.placement if run.method.family.changes_weights else None,
        matched=run.method.family.matched(model, views, run.method, run.method_cfg),
        params=params,
        num_train=num_train,
        steps=steps,
        tokens=int(steps * core.batch_size * core.accumulate * num_processes(run.trainer) * lengths.mean),
        memory_bytes=memory(run, model, lengths, asked, params.trainable + params.head, params.frozen_extra),
        start=start,
        notes=tuple(notes(config, views)),
        warnings=tuple(
            _warnings(run, start, num_train, steps, sum(n > positions for n in lengths.texts), positions, cuts)
        ),
    )


def _check_reader(run: Run, model: Any) -> None:
    """Raises UserError for what an encoder and a decoder in one cannot do: go on with a text, of which they answer a part."""
    if not is_encoder_decoder(model.config):
        return
    core, protocol = run.core, run.protocol
    goes_on = {
        "packing=true": core.packing,
        f"general_text={core.general_text}": core.general_text is not None,
        f"protocol={protocol.name}, which has mask_prompt=false,": not protocol.mask_prompt,
    }
    if refused := [given for given, is_given in goes_on.items() if is_given]:
        raise _goes_on(refused[0], model)


def _goes_on(what: str, model: Any) -> UserError:
    return UserError(
        f"run: {what} is for a decoder that goes on with its text, got {model.config.model_type}, whose encoder "
        "reads the prompt and whose decoder answers; leave it out, or take a decoder such as model=smollm2_135m"
    )


def _check_others(run: Run, task: Task, model: Any) -> None:
    """Raises UserError unless the tasks of eval_also can be evaluated with the run's model."""
    for name, other in run.also.items():
        second = other.make_task()
        if (second.kind, second.num_labels) != (task.kind, task.num_labels):
            raise UserError(
                f"run: eval_also takes tasks of the run's kind, got {name} ({second.kind}) beside {task.name} ({task.kind})"
            )
        _positions(other, second, model)
        with reading(second):
            if second.has_data or not run.core.dry_run:
                second.test()


def _positions(run: Run, task: Task, model: Any) -> int:
    """Returns how many tokens the model takes beside virtual ones.

    Raises:
        UserError: if they leave no room for a prompt and its answer, or are fewer than the task's examples have tokens.
    """
    longest, virtual, new = context_length(model), _virtual_tokens(run), _new_tokens(run, task, model)
    if virtual + new >= longest:
        raise UserError(
            f"run: the model's {longest} positions must hold a prompt, got num_virtual_tokens={virtual} and "
            f"protocol.max_new_tokens={new}; lower them"
        )
    if task.longest is not None and task.longest > longest - virtual:
        raise UserError(
            f"task {task.name}: its examples must fit the model's {longest - virtual} positions, got {task.longest} tokens; "
            "lower its lengths, or take a model with more positions"
        )
    cut_off = run.protocol.max_length + (run.protocol.max_target_length or 0)
    if task.longest is not None and task.longest > cut_off:
        raise UserError(
            f"task {task.name}: the protocol's cut-off must hold its examples, got {task.longest} tokens with "
            f"protocol.max_length={run.protocol.max_length}; give protocol.max_length={task.longest}"
        )
    return longest - virtual


def _virtual_tokens(run: Run) -> int:
    return int(getattr(run.method_cfg, "num_virtual_tokens", 0))


def _rows_asked(run: Run, tests: Mapping[str, Sequence[Any]]) -> int:
    """Returns how many examples an evaluation computes at a time; test sets that are not here are large enough."""
    core, sets = run.core, [run.protocol.num_validation]
    if core.eval_test:
        sets += map(len, tests.values()) if tests else [core.eval_batch_size]
    return min(core.eval_batch_size, max(sets))


def _new_tokens(run: Run, task: Task, model: Any) -> int:
    """Returns how many tokens an evaluation writes at most behind a prompt."""
    return (run.protocol.max_new_tokens or task.max_new_tokens) if model.can_generate() and run.core.eval_test else 0


def _warnings(
    run: Run, start: Mapping[str, Any] | None, num_train: int, steps: int, num_long: int, positions: int, cuts: bool
) -> Iterator[str]:
    if start and start.get("missing"):
        yield f"the run to start from is not there yet, got start_from={shown(start['run'])}: it is needed to train"
    if num_long:
        yield (
            f"{num_long} of {num_train} training examples are longer than the model's {positions} positions, at four "
            f"characters per token: they are {'cut' if cuts else 'left out'}"
        )
    core, warmup = run.core, warmup_steps(run.core, steps)
    if warmup >= steps:
        yield (
            f"the warm-up is as long as the run, got {warmup} steps of {steps}: the rate reaches at most "
            f"{core.lr * (steps - 1) / warmup:.3g} of lr={core.lr:g}"
        )
    between = min(run.protocol.validate_every, steps)
    if core.patience is not None and (core.patience + 1) * between >= steps:
        yield (
            f"the run is over before patience can end it, got patience={core.patience} with {steps // between} validations "
            f"in {steps} steps: use a smaller protocol.validate_every"
        )
    step = core.batch_size * core.accumulate * num_processes(run.trainer)
    if step > num_train:
        yield f"a step takes more examples than there are, got {step} of {num_train}: every step sees all of them"


def _lengths(task: Task, run: Run, patches: int) -> tuple[int, Lengths]:
    """Returns the number of training examples and their lengths, at four characters per token; an image has `patches`.

    A dry run without the data takes the published number, each as long as the cut-off allows.
    """
    most = run.protocol.max_length
    if run.core.dry_run and not task.has_data and task.num_train is not None:
        return task.num_train - run.protocol.num_validation, Lengths(most, most, most)
    records, _ = hold_out(task.train(), run.protocol)
    if task.kind == "classify_images":
        return len(records), Lengths(patches, patches)
    texts = [_length(record, run) / 4 for record in records]
    targets = [len(getattr(record, "output", "")) / 4 for record in records] if run.protocol.mask_prompt else texts
    mean = min(most, sum(texts) / len(texts))
    return len(records), Lengths(mean, min(most, max(texts)), min(most, max(targets)), texts)


def _length(record: Any, run: Run) -> int:
    if turns := getattr(record, "messages", ()):
        return sum(len(content) for _, content in turns) + len(record.output)
    if hasattr(record, "instruction"):
        return len(run.protocol.template) + len(record.instruction) + len(record.output)
    return len(record.text) + len(record.text_pair or "")
