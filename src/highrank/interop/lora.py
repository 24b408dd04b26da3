"""`highrank export --format lora`: the update of any method on weights as a LoRA, which the servers of LoRAs take.

Per adapted layer ΔW ≈ B A of rank R, the best there is by its singular values: exact up to rounding where ΔW has no more
(LoRA, ABBA, GraLoRA and their kin), else with what that misses. Adapters on slices of one layer are one ΔW. A layer at a
time is decomposed; what is kept of it are its two factors. The files are PEFT's, with what vLLM's and SGLang's loaders
ask for (rules, with their sources, in `tests/interop/lora_rules.py`): one rank, lora_alpha = r, no new head, no rsLoRA,
DoRA, bias or pattern, and a pair of zeros on the q, k, v or gate, up beside an adapted one, which SGLang reads together.

With y the logits of the adapted model, ŷ those of the base with the written pairs and y0 those of the base, `fidelity.json`
holds what a merge's does (`highrank.interop.hub_model`), and

    relative_error   √(Σ ‖ΔW - B A‖² / Σ ‖ΔW‖²) over all layers, with the factors in fp32 as written
    curve            that by rank, of the best pairs: √(Σ_layers Σ_{i > R} σ_i² / Σ ‖ΔW‖²)
    reached          the least rank whose curve is at most 0.5, 0.2, 0.1, 0.05, 0.01
"""

import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor

from highrank.base.console import say
from highrank.base.errors import UserError
from highrank.base.files import write_atomic
from highrank.config.run_config import Run
from highrank.interop.card import model_card
from highrank.interop.hub_model import MOST_ERROR, compare, listed, logits, some_texts
from highrank.interop.peft import CONFIG, PREFIX, WEIGHTS, base_facts, targets
from highrank.model.backbones import empty_model, model_config
from highrank.model.low_rank import ROUNDING, best_low_rank
from highrank.model.placement import EXPERTS, is_linear, is_transposed, weight_of
from highrank.model.quantised import dequantise_model
from highrank.train.build import adapted_views
from highrank.train.saved import check_new, check_plain, load_run, read_run, written_whole

TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers that SGLang stacks to one, found by the first of them that a file has; each must then have a pair."""
ERRORS = (0.5, 0.2, 0.1, 0.05, 0.01)


def export_lora(
    folder: Path | str, out: Path | str, rank: int, accept: bool = False, words: Sequence[str] = ()
) -> Path:
    """Writes a run's update as a LoRA of one rank, with `fidelity.json` and a model card; returns the folder.

    `accept` takes a loss of fidelity.

    Raises:
        UserError: if `out` exists and is not empty, the method changes what a LoRA cannot hold, the rank is none of the
            weights', or the LoRA is not the adapted model by more than `MOST_ERROR`.
    """
    out_folder = check_new("export", out)
    run = read_run(folder, words)
    check_holds("export", run, folder)
    check_rank("export", [run], rank)
    _, backbone, adapters = load_run(folder, words)
    dequantise_model(backbone.model)
    model = backbone.model.float().eval()
    texts = some_texts(run, backbone)
    y = logits(model, texts)
    lora = LoRA.of(adapters, rank)
    with adapters.disabled():
        y0 = logits(model, texts)
        with lora.acting(model):
            fidelity = lora.fidelity("export", compare(y, logits(model, texts), y0), accept)
    lora.write(
        "export",
        out_folder,
        base_facts(run, backbone),
        fidelity | {"texts": len(texts)},
        model_card(run, Path(folder), "peft", {"rank": rank, "fidelity": listed(fidelity)}),
    )
    return out_folder


def check_holds(part: str, run: Run, folder: Path | str) -> None:
    """Raises UserError unless what the run trained is a ΔW of linear layers, or holds one, and of a model with a name."""
    check_plain(part, run, folder)
    method, task = run.method, run.make_task()
    if not method.family.changes_weights:
        instead = (
            "highrank merge writes the changed model"
            if method.mergeable
            else "highrank export --format peft writes it for PEFT"
            if method.peft
            else "keep the run, no other program computes it"
        )
        what = (sys.modules[method.__module__].__doc__ or "").strip().partition("\n")[0].rstrip(".")
        raise UserError(
            f"{part}: a ΔW of linear layers is needed, got method={method.name} in {folder}, which has none ({what}); "
            f"{instead}"
        )
    if task.kind != "generate":
        raise UserError(
            f"{part}: a language model's ΔW alone is written, got task={task.name} in {folder} with a classifier's new head, "
            "which servers of LoRAs refuse; highrank export --format peft and highrank merge take it along"
        )


def check_rank(part: str, runs: Sequence[Run], rank: int) -> None:
    """Raises UserError unless the rank is one that a layer of each run can have, and none of them an expert's."""
    for run in runs:
        meta = empty_model(model_config(run.model, run.core.path), "generate", 0)
        views = adapted_views(run, meta)
        if experts := [view.path for view in views if view.part == EXPERTS]:
            raise UserError(
                f"{part}: a LoRA adapts linear layers, got the expert {experts[0]}; highrank merge writes the adapted model"
            )
        shapes = {view.path: tuple(weight_of(meta.get_submodule(view.path)).shape) for view in views}
        most = max(shapes, key=lambda path: min(shapes[path]))
        if not 1 <= rank <= min(shapes[most]):
            raise UserError(
                f"{part}: --rank must be from 1 to {min(shapes[most])}, the greatest rank that an adapted weight can have, "
                f"got --rank {rank} for {most} of {shapes[most]}"
            )


class LoRA:
    """Pairs of one rank for the layers of a model, and what they miss of the ΔW that they were made of."""

    def __init__(self, rank: int):
        self.rank = rank
        self.pairs: dict[str, tuple[Tensor, Tensor]] = {}
        """B (out_features, rank) and A (rank, in_features), by the layer's path."""
        self.made: list[str] = []
        """The layers of a ΔW; the other pairs are zero."""
        self.left_out: list[str] = []
        """Parameters that training changed too, and that no pair can hold."""
        self.whole = self.missed = 0.0
        """Σ ‖ΔW‖² and Σ ‖ΔW - B A‖²."""
        self.curve = torch.zeros(1, dtype=torch.float64)
        """Σ ‖ΔW‖² beyond each rank from 0 on."""

    @classmethod
    def of(cls, adapters: Any, rank: int) -> "LoRA":
        """Returns the LoRA of one run's adapters."""
        lora = cls(rank)
        for path in adapters.layers:
            lora.add(path, adapters.layer_update(path))
        lora.left_out = [name for name, change in adapters.other_updates().items() if change().any()]
        lora.complete(adapters.model)
        return lora

    def add(self, path: str, update: Tensor) -> None:
        """Takes the ΔW (out_features, in_features) of a layer.

        Raises:
            UserError: for one that is not finite.
        """
        if not update.isfinite().all():
            raise UserError(f"lora: ΔW must be finite, got NaN or inf in {path}; was the learning rate too high?")
        B, A, missed = best_low_rank(update, self.rank)
        zeros = self.rank - len(A)  # a weight that cannot have this rank
        self.pairs[path] = B, A = F.pad(B, (0, zeros)), F.pad(A, (0, 0, 0, zeros))
        self.made.append(path)
        self.whole += float(update.double().square().sum())
        self.missed += float((update.double() - B.double() @ A.double()).square().sum())
        length = max(len(self.curve), len(missed))
        self.curve = _longer(self.curve, length) + _longer(missed, length)

    def complete(self, model: Any) -> None:
        """Gives a pair of zeros to each layer that a loader expects beside one that has a pair; no more are added then."""
        for path in self.made:
            parent, _, leaf = path.rpartition(".")
            for name in next((group for group in TOGETHER if leaf in group), ()):
                beside = f"{parent}.{name}"
                module = getattr(model.get_submodule(parent), name, None)
                if beside not in self.pairs and module is not None and is_linear(module):
                    n, k = weight_of(module).shape
                    self.pairs[beside] = torch.zeros(n, self.rank), torch.zeros(self.rank, k)
        self.places = named(model, list(self.pairs))
        first = model.get_submodule(self.made[0])
        self.transposed = is_transposed(getattr(first, "base", first))

    @contextmanager
    def acting(self, model: Any) -> Iterator[None]:
        """Within it each layer returns y + (x Aᵀ) Bᵀ, as in a server."""
        with ExitStack() as handles:
            for path in self.made:
                hook = _adding(*self.pairs[path])
                handles.callback(model.get_submodule(path).register_forward_hook(hook).remove)
            yield

    def share(self, missed: float) -> float:
        return (missed / self.whole) ** 0.5 if self.whole else 0.0

    def errors(self) -> dict[int, float]:
        """Returns the curve at ranks 1, 2, 4, …, this one and the last."""
        last = len(self.curve) - 1
        ranks = sorted({2**i for i in range(last.bit_length()) if 2**i <= last} | {min(self.rank, last), last})
        return {rank: self.share(float(self.curve[rank])) for rank in ranks if rank}

    def reached(self) -> dict[str, int]:
        shares = (self.curve / self.whole).sqrt() if self.whole else self.curve
        within = {str(error): (shares <= error).nonzero() for error in ERRORS}
        return {error: int(ranks[0]) for error, ranks in within.items() if len(ranks)}

    def fidelity(self, part: str, measures: Mapping[str, float], accept: bool) -> dict[str, Any]:
        """Returns what `fidelity.json` holds.

        Raises:
            UserError: if there is nothing to write, or too much is lost and that is not accepted.
        """
        if not self.whole:
            raise UserError(
                f"{part}: there must be an update, got ΔW = 0 in all {len(self.made)} weights; was it trained?"
            )
        if self.left_out:
            say(
                f"{part}: a LoRA holds no {self.left_out[0]}, one of {len(self.left_out)} parameters changed beside the layers"
            )
        relative, errors = self.share(self.missed), self.errors()
        if not measures["error"] <= MOST_ERROR and not accept:  # nan is refused too
            more = [f"{rank} misses {error:.2g}" for rank, error in errors.items() if rank > self.rank]
            raise UserError(
                f"{part}: a LoRA of rank {self.rank} must keep what training changed, got "
                f"error={measures['error']:.2f} > {MOST_ERROR} (argmax agreement {measures['argmax_agreement']:.3f}; "
                f"{relative:.2g} of ΔW missed{'; rank ' if more else ''}{', '.join(more)}); "
                "take a higher --rank or --format merged, or accept it with --accept"
            )
        return {
            "rank": self.rank,
            "relative_error": relative,
            "exact": relative <= ROUNDING,
            **measures,
            "curve": errors,
            "reached": self.reached(),
            "layers": len(self.made),
            "zeros": sorted(self.pairs.keys() - set(self.made)),
            **({"left_out": self.left_out} if self.left_out else {}),
        }

    @property
    def config(self) -> dict[str, Any]:
        """adapter_config.json, less what tells of the base model."""
        names, layers = self.places
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "r": self.rank,
            "lora_alpha": self.rank,
            "lora_dropout": 0.0,
            "bias": "none",
            "use_rslora": False,
            "use_dora": False,
            "modules_to_save": None,
            "target_modules": names,
            **({"layers_to_transform": layers} if layers else {}),
            "fan_in_fan_out": self.transposed,
            "inference_mode": True,
        }

    def write(self, part: str, out: Path, base: Mapping[str, Any], fidelity: Mapping[str, Any], card: str) -> None:
        """Writes the folder; `base` is what adapter_config.json tells of the base model."""
        config = {**self.config, **base}
        tensors = {
            f"{PREFIX}{path}.lora_{name}.weight": factor
            for path, (B, A) in self.pairs.items()
            for name, factor in (("A", A), ("B", B))
        }
        rows = "".join(f"| {rank} | {error:.3g} |\n" for rank, error in fidelity["curve"].items())
        curve = f"\n## Rank and relative error of ΔW\n\n| rank | error |\n| --- | --- |\n{rows}"
        with written_whole(part, out) as ready:
            write_atomic(ready / WEIGHTS, safetensors.torch.save(tensors, metadata={"format": "pt"}))
            write_atomic(ready / CONFIG, json.dumps(config, indent=1, sort_keys=True).encode())
            write_atomic(ready / "fidelity.json", json.dumps(fidelity, indent=1).encode())
            write_atomic(ready / "README.md", (card + curve).encode())
        say(
            f"{part}: rank {self.rank} misses {fidelity['relative_error']:.2g} of ΔW; logits differ by at most "
            f"{fidelity['max_logit_difference']:.2g}, error {fidelity['error']:.2g}, argmax agreement "
            f"{fidelity['argmax_agreement']:.3f}"
        )


def named(model: Any, paths: Sequence[str]) -> tuple[list[str], list[int]]:
    """Returns `target_modules` and, where they are last names that act in some layers only, the numbers of these."""
    names = {path.rpartition(".")[2] for path in paths}
    alike = [path for path, _ in model.named_modules() if path.rpartition(".")[2] in names]
    layers = {_layer(path) for path in paths}
    if (
        len(alike) > len(paths)
        and {path for path in alike if _layer(path) in layers} == set(paths)
        and None not in layers
    ):
        return sorted(names), sorted(layer for layer in layers if layer is not None)
    return targets(model, paths), []


def _layer(path: str) -> int | None:
    """Returns the first number in a path, which PEFT takes for the layer's."""
    match = re.match(r".*?\.[^.]*\.(\d+)\.", path)
    return int(match[1]) if match else None


def _longer(curve: Tensor, length: int) -> Tensor:
    return torch.cat([curve, curve[-1:].expand(length - len(curve))])


def _adding(B: Tensor, A: Tensor) -> Any:
    def hook(module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + F.linear(F.linear(args[0], A), B)

    return hook
