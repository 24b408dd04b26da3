"""Adapters on a model: attach, merge, unmerge, disable, save, load.

adapters = attach(model, views, method, cfg, seed=0)
adapters.save(folder); adapters.merge(); adapters.unmerge()
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from highrank.base.errors import UserError, suggest
from highrank.model import adapter_folder
from highrank.model.placement import WeightView
from highrank.model.sharding import sharded_like, whole
from highrank.model.torch_internals import hook_once


class Adapters:
    """The adapters of one model and what can be done with them; made by `attach`.

    A subclass is one family of methods: how they count, sit on a model, merge and come off is written there, once.
    """

    placed: ClassVar[bool] = True
    """Whether placement, layers and fused apply to the family."""
    changes_weights: ClassVar[bool] = True
    """Whether what it learns is a ΔW per view."""
    keeps_base: ClassVar[bool] = True
    """Whether the base's own parameters stay as they are, so that it can be shared, and held quantised."""
    num_positions: int = 0
    """Positions that the model attends to beyond the tokens it is given."""

    def __init__(self, model: nn.Module, views: Sequence[WeightView], method: Any, cfg: Any, seed: int):
        self.model, self.views, self.method, self.cfg, self.seed = model, list(views), method, cfg, seed
        self.base_run: str | None = None
        """Which run's merged weights the base is, as that run's hash; None for a plain base."""
        self.by_view: dict[str, Any] = {}
        """The adapter of each view; for a method whose update is no weight, its one module under the method's name."""
        self.extra: list[str] = []
        """Names of parameters outside the adapters that train too: heads, or everything in full fine-tuning."""
        self.heads: set[str] = set()
        """Names of those of them that belong to a head."""

    def __repr__(self) -> str:
        places = f"{len(self.views)} weights of " if self.views else ""
        return (
            f"{self.method.name} on {places}{type(self.model).__name__}: {self.num_trainable():,} trainable, {self.cfg}"
        )

    @classmethod
    def views_in(cls, model: nn.Module, placement: Any, layers: Any, fused: str, architecture: Any) -> list[WeightView]:
        """Returns the weights of a model that the family adapts, where these choices apply to it."""
        raise NotImplementedError

    @classmethod
    def count(
        cls, model: nn.Module, views: Sequence[WeightView], method: Any, cfg: Any, num_base: int
    ) -> tuple[int, int]:
        """Returns how many numbers a method trains, and how many frozen ones it holds beside the base's `num_base`.

        Raises:
            UserError: if the method's fields do not fit one of the weights, or the model.
        """
        raise NotImplementedError

    @classmethod
    def matched(cls, model: nn.Module, views: Sequence[WeightView], method: Any, cfg: Any) -> dict[str, int]:
        """Returns what is adapted, for the plan: a name and how many."""
        raise NotImplementedError

    def put_on(self, tokenizer: Any) -> None:
        """Makes the adapters and lets them act; called in evaluation mode, and may seed PyTorch's generator as it likes."""
        raise NotImplementedError

    @property
    def exact_base(self) -> bool:
        """Whether the adapter acts on the base in the dtype that it was trained on alone."""
        return bool(self.method.exact_base(self.cfg))

    def trains(self, parameter: nn.Parameter) -> bool:
        """Whether a parameter outside adapters and heads trains too."""
        return False

    def train_extra(self, name: str, parameter: nn.Parameter) -> None:
        """Lets a parameter outside the adapters train."""
        parameter.requires_grad_(True)
        self.extra.append(name)

    @property
    def merged(self) -> bool:
        raise NotImplementedError

    def merge(self) -> None:
        """Writes W' into the base and keeps W, so that `unmerge` restores it bit for bit.

        Raises:
            UserError: if it is merged already, or cannot be.
        """
        if self.merged:
            raise UserError("merge: the adapter is merged already, got merged=True; unmerge first")
        self._merge()

    def unmerge(self) -> None:
        """Restores the pristine base, bit for bit."""
        if not self.merged:
            raise UserError("unmerge: the adapter must be merged, got merged=False")
        self._unmerge()

    def _merge(self) -> None:
        raise NotImplementedError

    def _unmerge(self) -> None:
        raise NotImplementedError

    def merging(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Merges, and yields every parameter that this touches, before and after."""
        raise NotImplementedError

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within it the model computes as the base does (heads that trained stay as they are)."""
        if self.merged:
            raise UserError("disabled: the adapter must not be merged, got merged=True; unmerge first")
        self._act(False)
        try:
            yield
        finally:
            self._act(True)

    def untouched(self) -> AbstractContextManager[None]:
        """Within it, before training, the model computes as the base does."""
        return self.disabled()

    def _act(self, acts: bool) -> None:
        raise NotImplementedError

    def unload(self) -> nn.Module:
        """Takes the wrappers off and returns the model: with W' if merged, else with W."""
        raise NotImplementedError

    def plug(self) -> None:
        """Undoes `unload`: the adapters act on the model again."""
        raise NotImplementedError

    def probe(self) -> dict[str, list[float]]:
        """Returns, by name, two numbers that differ on another base: a fingerprint of what the adapter was trained on."""
        raise NotImplementedError

    @property
    def base_dtype(self) -> str:
        raise NotImplementedError

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yields every trainable parameter under the name it is saved by: `<view>.<parameter>`, then the extras."""
        for name, adapter in self.by_view.items():
            for key, parameter in adapter.named_parameters():
                yield f"{name}.{key}", parameter
        named = dict(self.model.named_parameters())
        for name in self.extra:
            yield name, named[name]

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the trainable tensors alone, detached, on the CPU."""
        return {name: whole(p.detach()).cpu().contiguous() for name, p in self.named_parameters()}

    @torch.no_grad()
    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Copies tensors in; every name and shape must match.

        Raises:
            UserError: naming the first tensors that are missing, unexpected or of another shape.
        """
        trained = dict(self.named_parameters())
        missing, unexpected = [n for n in trained if n not in tensors], [n for n in tensors if n not in trained]
        if missing or unexpected:
            raise UserError(
                f"adapter: tensors must match the model, got {len(missing)} missing (first: {missing[:3]}) and "
                f"{len(unexpected)} unexpected (first: {unexpected[:3]}); was it trained on another model or placement?"
            )
        for name, tensor in tensors.items():
            if tensor.shape != trained[name].shape:
                raise UserError(
                    f"adapter: shapes must match, got {name} of {tuple(tensor.shape)} for {tuple(trained[name].shape)}"
                )
        for name, tensor in tensors.items():
            trained[name].copy_(sharded_like(trained[name], tensor))

    def view(self, name: str) -> WeightView:
        """Returns the adapted weight of this name.

        Raises:
            UserError: for an unknown name, with the nearest ones.
        """
        by_name = {view.name: view for view in self.views}
        if name not in by_name:
            near = suggest(name, by_name) or f"; {self.method.name} adapts no weight"
            raise UserError(f"adapters: no weight of this name is adapted, got {name}{near}")
        return by_name[name]

    def delta_weight(self, view: WeightView | str) -> Tensor:
        """Returns ΔW (out_features, in_features) of a view, or of the view of that name, in fp32, from the parameters.

        Raises:
            UserError: for an unknown name, with the nearest ones, and for a method that changes no weights.
        """
        name = view if isinstance(view, str) else view.name
        raise UserError(f"adapters: {self.method.name} changes no weights, got delta_weight of {name}")

    def parameter_groups(
        self, lr: float | None = None, weight_decay: float = 0.0, head_lr: float | None = None
    ) -> list[dict[str, Any]]:
        """Returns all that trains in groups for a PyTorch optimizer: with weight decay and without, adapter and head.

        Decay pulls towards 0, so it spares what a method names in `no_decay` (HyperAdapt's a and b, whose neutral value is
        1) and, outside the adapters, biases and norms. Heads are a group of their own where `head_lr` is given, and so are
        parameters whose rate a method multiplies by one of its `lr_factors` (LoRA+'s B). `lr` is by default the method's
        own starting point.
        """
        rate = self.method.default_lr if lr is None else lr
        told = {
            id(p): (name in adapter.no_decay, adapter.lr_factors.get(name, 1.0))
            for adapter in self.by_view.values()
            for name, p in adapter.named_parameters()
        }
        groups: dict[tuple[bool, bool, float], list[nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            spared, factor = told.get(id(parameter), (parameter.dim() <= 1, 1.0))
            in_head = head_lr is not None and name in self.heads
            groups.setdefault((in_head, spared, factor), []).append(parameter)
        return [
            {
                "params": groups[in_head, spared, factor],
                "lr": head_lr if in_head else factor * rate,
                "weight_decay": 0.0 if spared else weight_decay,
            }
            for in_head, spared, factor in sorted(groups)
        ]

    def num_trainable(self) -> int:
        """Trainable parameters inside the adapters."""
        return sum(p.numel() for adapter in self.by_view.values() for p in adapter.parameters())

    def num_head(self) -> int:
        """Trainable parameters outside the adapters."""
        named = dict(self.model.named_parameters())
        return sum(named[name].numel() for name in self.extra)

    @torch.no_grad()
    def unadapted(self) -> dict[str, str]:
        """Returns a fingerprint of each of the base's parameters that no adapter or head takes the place of, by name."""
        trained = {id(parameter) for _, parameter in self.named_parameters()}
        covered = trained | {id(parameter) for parameter in self.adapted()}
        return {
            name: fingerprint(whole(parameter.detach()))
            for name, parameter in self.model.named_parameters()
            if id(parameter) not in covered and type(parameter.data) is Tensor and parameter.is_floating_point()
        }

    def adapted(self) -> Iterator[nn.Parameter]:
        """Yields the base's parameters that an adapter sees, which `probe` tells of."""
        return iter(())

    def save(self, folder: Path | str) -> Path:
        """Writes `adapter.safetensors` and `adapter.json` (method, fields, views, checksums) into `folder`.

        Both files appear whole or not at all. Of several processes all must call it, and one writes.

        Raises:
            UserError: if a trained value is not finite.
        """
        tensors = self.state_dict()
        if broken := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
            raise UserError(f"adapter: trained values must be finite to be saved, got NaN or inf in {broken[0]}")
        return adapter_folder.write(
            Path(folder),
            tensors,
            method=self.method.name,
            fields=asdict(self.cfg),
            seed=self.seed,
            base_dtype=self.base_dtype,
            views=[asdict(view) for view in self.views],
            extra=self.extra,
            probe=self.probe(),
            unadapted=self.unadapted(),
            **({"base_run": self.base_run} if self.base_run else {}),
        )

    def load(self, folder: Path | str) -> None:
        """Loads what `save` wrote, strictly: file checksum, names, shapes, and the base that it was trained on.

        Raises:
            UserError: naming the file or tensor that does not match; the parameters are then as before.
        """
        card, tensors = adapter_folder.read(folder, self.method.name)
        if card.get("base_run") != self.base_run:
            kinds = [
                "the merged weights of a run" if other else "the plain model"
                for other in (self.base_run, card.get("base_run"))
            ]
            raise UserError(
                f"adapter: the base must be the one trained on, got {kinds[0]} for an adapter on {kinds[1]} in {folder}; "
                "load the run that it belongs to, which makes its base again"
            )
        same_dtype = card["base_dtype"] == self.base_dtype
        if self.exact_base and not same_dtype:
            raise UserError(
                f"adapter: {self.method.name} with these fields needs the exact base that it was trained on, got one in "
                f"{self.base_dtype} for {card['base_dtype']}; load the base as it was in training"
            )
        before = {name: tensor.clone() for name, tensor in self.state_dict().items()}
        self.load_state_dict(tensors)
        # The same base held in another dtype differs by its rounding, 2^-9 per entry, and some 10 % in four bits; in the
        # same dtype by nothing but the order of fp64 sums and, for a truncated R, the SVD's last digits.
        quantised = "quantised" in card["base_dtype"] + self.base_dtype
        tolerance = 1e-5 if same_dtype else 0.5 if quantised else 2e-2
        for name, values in self.probe().items():
            stored = card["probe"][name]
            scale = 1e-12 + max(abs(stored[0]), abs(stored[0]) ** 0.5)
            if not all(
                abs(a - b) <= tolerance * scale for a, b in zip(values, stored, strict=True)
            ):  # NaN is none of them
                self.load_state_dict(before)
                raise UserError(
                    f"adapter: the probe must match the one saved, got {values} for {stored} at {name}; "
                    "the base model is not the one the adapter was trained on"
                )
        here = self.unadapted() if same_dtype else {}
        stored = card.get("unadapted", {})  # adapters of earlier versions do not tell
        if other := [name for name in here if stored.get(name, here[name]) != here[name]]:
            self.load_state_dict(before)
            raise UserError(
                f"adapter: the base must be the one trained on, got other numbers in {other[0]}"
                + (f" and {len(other) - 1} more" if other[1:] else "")
            )


def attach(
    model: nn.Module,
    views: Sequence[WeightView],
    method: Any,
    cfg: Any,
    seed: int = 0,
    heads: Sequence[str] = (),
    tokenizer: Any = None,
    base_run: str | None = None,
) -> Adapters:
    """Freezes `model`, puts one adapter on each view and unfreezes `heads` (names of modules that train in full).

    An adapter's start depends on `seed` and its view's name alone, so adding a placement leaves the others unchanged.
    Everything that trains is fp32, whatever the base is: heads are cast, and for full fine-tuning the whole model.
    A method whose update is no weight takes no views; `tokenizer` is for those of them that start from a text. `base_run`
    says which run's merged weights the model has.
    """
    adapters: Adapters = method.family(model, views, method, cfg, seed)
    adapters.base_run = base_run
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    _read_slices_whole(model)
    if not adapters.keeps_base:
        model.float()
    for name in heads:
        _train_in_fp32(model.get_submodule(name))
    try:
        with _fp32_by_default(), torch.random.fork_rng(devices=[]), evaluating(model):
            adapters.put_on(tokenizer)
    except Exception:
        adapters.unload()
        for parameter in trained:
            parameter.requires_grad_(True)
        raise
    in_adapters = {id(p) for adapter in adapters.by_view.values() for p in adapter.parameters()}
    in_heads = {id(p) for name in heads for p in model.get_submodule(name).parameters()}
    for name, parameter in model.named_parameters():
        if id(parameter) in in_adapters:
            continue
        if id(parameter) in in_heads:
            adapters.heads.add(name)
        if id(parameter) in in_heads or adapters.trains(parameter):
            adapters.train_extra(name, parameter)
    return adapters


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within it the model is in evaluation mode, each of its modules afterwards in the mode that it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _fp32_by_default() -> Iterator[None]:
    """Within it new tensors are fp32, whatever the caller's default is."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(default)


def fingerprint(tensor: Tensor) -> str:
    """Returns 32 digits that differ for other numbers, or the same in another order: two sums over the bits, exact on
    any device."""
    bits = tensor.contiguous().view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize])
    total = weighted = 0
    for start, part in enumerate(bits.flatten().split(2**22)):
        numbers = part.long()
        places = torch.arange(len(numbers), device=numbers.device) % 65521 + start + 1
        total, weighted = total + int(numbers.sum()), weighted + int((numbers * places).sum())
    return f"{total % 2**64:016x}{weighted % 2**64:016x}"


def site_seed(seed: int, name: str) -> int:
    """Returns the seed of one adapter's start, a function of the run's seed and its place alone."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:4], "big")


def _read_slices_whole(model: Any) -> None:
    """Hands a language model's head its input as one block of memory, also after `unload`; results agree to rounding.

    After a prompt the head reads the last position of each row, a slice; PyTorch multiplies a slice with a frozen weight
    row by row, and copies the weight, the vocabulary's whole matrix, for each.
    """
    if model.can_generate():
        hook_once(model.get_output_embeddings(), _contiguous)


def _contiguous(head: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(a.contiguous() for a in args)


def _train_in_fp32(head: nn.Module) -> None:
    """Casts a head, and whatever it is given, to fp32."""
    if next(head.parameters()).dtype != torch.float32:
        head.float()
        head.register_forward_pre_hook(lambda module, args: tuple(a.float() for a in args))


def set_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Puts a module in the place that `path` names."""
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
