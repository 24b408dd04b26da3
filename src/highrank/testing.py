"""The contract of methods and tasks, checked from outside: `highrank check NAME`, and `check_method`, `check_task` in a
plugin's own tests.

A method is checked on one small weight with each of its `examples`, and on a tiny model; a task with each of its
`examples`, on what rows it has here.
"""

import itertools
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from highrank.base import registry
from highrank.base.errors import UserError, described, suggest
from highrank.base.fields import dataclass_from
from highrank.base.options import Words
from highrank.data.sources import MissingData
from highrank.data.task import Example, LabelledImage, LabelledText, sources_of
from highrank.library import attach
from highrank.model.backbones import load_backbone
from highrank.model.method import Site
from highrank.train.effect import check_decoding

OUT, IN = 24, 16
"""Rows and columns of the small weight."""
NEAR = 1e-5
"""Error allowed in fp32, relative to the largest entry: a few dozen roundings."""
MODELS = ("tiny_llama", "tiny_qwen2")
"""The models tried: the second has biases."""
PLACEMENTS = ("fc_qkv", "up")
"""The placements tried on each: all of the second are as large as the small weight, and wider."""
RECORDS = {
    "generate": Example,
    "classify": LabelledText,
    "regress": LabelledText,
    "classify_images": LabelledImage,
}


def command(words: list[str]) -> int:
    parser = Words("check", "NAME")
    parser.add_argument("name")
    name: str = parser.parse_args(words).name
    groups = {group: registry.available(group) for group in ("methods", "tasks")}
    found = [group for group, known in groups.items() if name in known]
    if not found:
        known = [each for names in groups.values() for each in names]
        raise UserError(f"check: no method or task has this name, got {name}{suggest(name, known)}")
    for group in found:
        for said in (_of_method if group == "methods" else _of_task)(name):
            print(f"ok\t{said}")
    return 0


def check_method(name: str) -> list[str]:
    """Returns what a method was checked for.

    Raises:
        UserError: for an unknown name, a plugin that does not import, or the first promise that it breaks.
    """
    return list(_of_method(name))


def check_task(name: str) -> list[str]:
    """Returns what a task was checked for.

    Raises:
        UserError: as of `check_method`.
    """
    return list(_of_task(name))


@contextmanager
def _within(part: str) -> Iterator[None]:
    """Makes whatever a plugin raises within it one line that names the place."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        at = traceback.extract_tb(error.__traceback__)[-1]
        raise UserError(f"{part}: it must not raise, got {described(error)} at {at.filename}:{at.lineno}") from error


def _of_method(name: str) -> Iterator[str]:
    cls: Any = registry.load("methods", name)
    yield "its class is as the contract says"
    for fields in cls.examples:
        cfg, of = dataclass_from(cls.config, fields, name), _named(name, fields)
        with _within(f"method {of}"):
            if cls.family.changes_weights:
                yield from _on_a_weight(cls, cfg, of)
            yield from _on_a_model(name, fields, of)


def _named(name: str, fields: Any) -> str:
    return " ".join([name, *(f"{key}={value}" for key, value in fields.items())])


def _on_a_weight(cls: Any, cfg: Any, of: str) -> Iterator[str]:
    W = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(1))
    x = torch.randn(5, IN, generator=torch.Generator().manual_seed(2))
    bias = torch.randn(OUT, generator=torch.Generator().manual_seed(3))
    cls.validate(IN, OUT, cfg)

    def made(seed: int = 0) -> Any:
        adapter = cls(IN, OUT, cfg, cls.shared([(OUT, IN)], cfg))
        torch.manual_seed(seed)
        adapter.reset_parameters(W, Site(name="w", seed=0, neighbours=lambda: [W, W.flip(0)]))
        return adapter

    adapter = made()
    trained = sum(p.numel() for p in adapter.parameters())
    if (declared := cls.num_trainable(IN, OUT, cfg)) != trained:
        raise UserError(f"method {of}: num_trainable must be what trains, got {declared} for {trained}")
    yield f"{of}: num_trainable is what trains"
    if adapter.exact_at_init:
        _near(
            adapter.effective_weight(W), W, f"method {of}: effective_weight must start at W (or exact_at_init = False)"
        )
        yield f"{of}: starts at the base"
    _move(adapter)
    wanted = F.linear(x, adapter.effective_weight(W), bias)
    for training in (True, False):
        y = adapter.train(training)(x, W, bias)
        _near(y, wanted, f"method {of}: forward must be F.linear with effective_weight")
    yield f"{of}: forward is effective_weight"
    parameters = dict(adapter.train().named_parameters())
    longhand = _gradients(lambda: F.linear(x, adapter.effective_weight(W), bias), parameters)
    for key, gradient in _gradients(lambda: adapter(x, W, bias), parameters).items():
        if gradient is None or not gradient.isfinite().all():
            raise UserError(f"method {of}: every parameter must get a finite gradient, got none in {key}")
        if (right := longhand[key]) is not None:
            _near(gradient, right, f"method {of}: the gradient of {key} must be that through effective_weight")
    yield f"{of}: every parameter gets its gradient"
    other = _move(made(seed=7))
    other.load_state_dict(adapter.state_dict())
    _near(other(x, W, bias), adapter(x, W, bias), f"method {of}: its state must be all that it has learned")
    yield f"{of}: is saved and loaded whole"


def _gradients(forward: Callable[[], Tensor], parameters: dict[str, Tensor]) -> dict[str, Tensor | None]:
    loss = forward().square().sum()
    if not loss.requires_grad:
        return dict.fromkeys(parameters)
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return dict(zip(parameters, found, strict=True))


def _move(adapter: Any) -> Any:
    """Moves what trains away from its start."""
    rng = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=rng))
    return adapter


def _on_a_model(name: str, fields: Any, of: str) -> Iterator[str]:
    ids = torch.arange(5, 25).view(2, 10)
    model, adapters = _attached(name, fields)

    def logits(of_model: Any) -> Tensor:
        with torch.no_grad():
            return torch.as_tensor(of_model.eval()(input_ids=ids).logits)

    optimizer = torch.optim.SGD(adapters.parameter_groups(), lr=1e-2)
    model.train()
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    after = logits(model)
    if not after.isfinite().all():
        raise UserError(f"method {of}: two training steps must leave numbers, got logits that are none")
    yield f"{of}: trains two steps on a tiny model"
    if adapters.num_positions:
        check_decoding(adapters, ids[0].tolist())
        yield f"{of}: decodes with the cache as without"
    with tempfile.TemporaryDirectory() as folder:
        adapters.save(Path(folder) / "adapter")
        again, loaded = _attached(name, fields)
        loaded.load(Path(folder) / "adapter")
        _near(logits(again), after, f"method {of}: a saved adapter must give the same logits")
    yield f"{of}: its adapter is saved and loaded"
    if adapters.changes_weights:
        adapters.merge()
        _near(logits(model), after, f"method {of}: merged weights must give the same logits")
        yield f"{of}: merges"


def _attached(name: str, fields: Any) -> tuple[Any, Any]:
    """Returns a tiny model that the method fits, and its adapters on it."""
    refusals = []
    for place, placement in itertools.product(MODELS, PLACEMENTS):
        backbone = load_backbone({"name": place, "dtype": "float32"}, None)
        words = {"placement": placement, "tokenizer": backbone.tokenizer}
        try:
            return backbone.model, attach(backbone.model, name, **words, **fields)
        except UserError as error:
            refusals.append(error)
    raise refusals[0]


@torch.no_grad()
def _near(actual: Tensor, wanted: Tensor, rule: str) -> None:
    allowed = NEAR * max(1.0, float(wanted.abs().max()))
    if actual.shape != wanted.shape or not (gap := float((actual - wanted).abs().max())) <= allowed:
        got = f"shape {tuple(actual.shape)}" if actual.shape != wanted.shape else f"a difference of {gap:.2g}"
        raise UserError(f"{rule}, got {got}")


def _of_task(name: str) -> Iterator[str]:
    cls: Any = registry.load("tasks", name)
    yield "its class is as the contract says"
    for fields in cls.examples:
        of, cfg = _named(name, fields), dataclass_from(cls.config, fields, name)
        with _within(f"task {of}"):
            yield from _on_its_data(cls, cfg, of)


def _on_its_data(cls: Any, cfg: Any, of: str) -> Iterator[str]:
    task, again = cls(cfg, 0), cls(cfg, 0)
    task.check()
    if not task.has_data:
        yield f"{of}: its data are not on this machine, and were not looked at"
        return
    try:
        sources_of(task)
    except MissingData as error:
        yield f"{of}: its data are not whole on this machine, and were not looked at: {error}"
        return
    yield f"{of}: says what it reads"
    sets, twice = ({"train": t.train(), **t.test()} for t in (task, again))
    for key, records in sets.items():
        if not len(records):
            raise UserError(f"task {of}: a set must hold examples, got none in {key}")
        wanted = RECORDS[task.kind]
        if other := next((each for each in records if not isinstance(each, wanted)), None):
            kind = type(other).__name__
            raise UserError(f"task {of}: kind={task.kind} has {wanted.__name__} as records, got {kind} in {key}")
        ids = [record.id for record in records]
        if len(set(ids)) < len(ids):
            raise UserError(f"task {of}: every id must be given once, got one again in {key}")
        if ids != [record.id for record in twice[key]]:
            raise UserError(f"task {of}: one seed must give the same examples, got others in {key}")
    yield f"{of}: {len(sets['train'])} examples to train on, {len(sets) - 1} test sets, the same each time"
