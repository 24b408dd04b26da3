"""`highrank combine`: the updates of several runs on one base, summed, as one model or one LoRA.

With ΔW_i the update of run i, w_i its weight and d the density:

    linear   ΔW = Σ w_i ΔW_i
    ties     ΔW = (Σ w_i) Σ_{i agrees} w_i t_i / Σ_{i agrees} w_i, entry by entry; t_i is ΔW_i with its d N largest entries kept, of
             the N that the run changes; i agrees where t_i is not 0 and has the sign of Σ w_i t_i
    dare     ΔW = Σ w_i m_i ⊙ ΔW_i / d, each entry of m_i 1 with probability d, else 0

Where all agree and nothing is trimmed, ties is linear; with weights 1/n it is the paper's mean with λ = 1.

Source: Ilharco et al., "Editing Models with Task Arithmetic", arXiv 2212.04089, section 2 (linear); Yadav et al.,
"TIES-Merging", arXiv 2306.01708, algorithm 1 (trim, elect, disjoint mean; d = 0.2 in its section 5); Yu et al., "Language
Models are Super Mario", arXiv 2311.03099, section 3 (DARE; 90 % dropped, d = 0.1, in its abstract's terms).
Differences: TIES and DARE are of full fine-tuning; here ΔW_i is any method's, and what it leaves alone is no entry to count.
TIES' code takes every entry equal to the smallest kept, and so does this. Weighted means are ours: the paper has none.

One weight is combined at a time: what is held beside the base are the runs' adapters. Full fine-tuning's own change of
norms, embeddings and biases is combined with the rest; a LoRA cannot hold it.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from highrank.base.errors import UserError, suggest
from highrank.base.hub import fetched, on_hub
from highrank.base.saved import read_results
from highrank.config.run_config import Run
from highrank.interop.hub_model import (
    NUM_TEXTS,
    check_dtype,
    compare,
    listed,
    logits,
    some_texts,
    write_merged,
)
from highrank.interop.lora import LoRA, check_holds, check_rank
from highrank.interop.peft import base_facts
from highrank.model.adapters import Adapters, attach, site_seed
from highrank.model.backbones import DTYPES, load_backbone
from highrank.model.placement import weight_of
from highrank.train.build import adapted_views
from highrank.train.results import changed, model_files
from highrank.train.saved import GIVEN_ANEW, check_base, check_new, read_run, update_lost

DENSITY = {"linear": None, "ties": 0.2, "dare": 0.1}
"""The ways to combine, and which share of the entries each keeps unless told."""
Thunk = Callable[[], Tensor]
"""Computes an update when it is needed."""


@dataclass(frozen=True)
class Recipe:
    """What is combined with what, and how."""

    how: str
    terms: Sequence[tuple[str, float]]
    """Runs and their weights."""
    density: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.how not in DENSITY:
            raise UserError(f"combine: unknown way to combine, got --how {self.how}{suggest(self.how, DENSITY)}")
        if len(self.terms) < 2:
            given = " ".join(f"{folder}={weight}" for folder, weight in self.terms) or "nothing"
            raise UserError(
                f"combine: at least two runs are needed, each with its weight, got {given}; give RUN=0.7 RUN=0.3"
            )
        folders = [Path(folder).resolve() for folder, _ in self.terms]
        if twice := [folder for folder, path in zip(self.terms, folders, strict=True) if folders.count(path) > 1]:
            raise UserError(f"combine: a run is given once, got {twice[0][0]} again; add its weights up")
        for option, value in (("density", self.density), ("seed", self.seed)):
            if value is not None and (self.how == "linear" or (option == "seed" and self.how != "dare")):
                owners = "ties and dare" if option == "density" else "dare"
                raise UserError(f"combine: --{option} belongs to {owners}, got --how {self.how}")
        if self.density is not None and not 0 < self.density <= 1:
            raise UserError(
                f"combine: --density is a share of entries above 0 and up to 1, got --density {self.density}"
            )
        if self.how == "ties" and (least := min(self.terms, key=lambda term: term[1]))[1] <= 0:
            raise UserError(f"combine: ties weighs a mean, so weights must be > 0, got {least[0]}={least[1]}")

    @property
    def kept(self) -> float:
        """The share of entries kept."""
        return self.density or DENSITY[self.how] or 1.0

    @property
    def facts(self) -> dict[str, Any]:
        return {
            "how": self.how,
            **({} if self.how == "linear" else {"density": self.kept}),
            **({"seed": self.seed or 0} if self.how == "dare" else {}),
        }


def terms_and_words(given: Sequence[str]) -> tuple[list[tuple[str, float]], list[str]]:
    """Returns runs with their weights, and the other key=value words.

    Raises:
        UserError: for a run without a weight, or a weight that is no finite number.
    """
    terms, words = [], []
    for word in given:
        folder, equals, number = word.rpartition("=")
        key = re.match(r"([\w]+)[\w.]*=", word)
        if key and any(key[1] == known.split(".")[0] for known in GIVEN_ANEW) and not Path(folder).is_dir():
            words.append(word)
            continue
        if not equals or Path(word).is_dir():
            raise UserError(f"combine: a run is given with its weight, got {word}; give {word}=0.5")
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not math.isfinite(weight):
            raise UserError(f"combine: a weight is a number, got {word}; give {folder}=0.5")
        if weight == 0:
            raise UserError(f"combine: a weight of 0 adds nothing, got {word}; leave the run out")
        terms.append((str(fetched("combine", folder)) if on_hub(folder) else folder, weight))
    return terms, words


def combine_runs(
    recipe: Recipe,
    out: Path | str,
    rank: int | None = None,
    dtype: str | None = None,
    accept: bool = False,
    words: Sequence[str] = (),
) -> Path:
    """Writes the combined update of some runs, merged into their base, or with a rank as a LoRA; returns the folder.

    `fidelity.json` holds what that of a merge or a LoRA does, where the adapted model is the base with the combined update in
    fp32, and per run its weight and how far the combined model is from it, on the test prompts of all runs.

    Raises:
        UserError: if `out` exists and is not empty; a folder is no finished run, its method has no ΔW, or its base is another
            one than the first's; for a rank that the weights do not have; for a loss of fidelity without `accept`.
    """
    out_folder = check_new("combine", out)
    runs = {folder: read_run(folder, words) for folder, _ in recipe.terms}
    check_combine(runs)
    first = next(iter(runs.values()))
    if rank is not None:
        check_rank("combine", list(runs.values()), rank)
    dtype = check_dtype("combine", dtype or first.model["dtype"])
    backbone = load_backbone(first.model, first.core.path, seed=first.core.seed)
    trained = _loaded(runs, backbone)
    model = backbone.model.float().eval()
    share = max(NUM_TEXTS // len(runs), 1)
    texts = [text for run in runs.values() for text in some_texts(run, backbone)[:share]]
    y0, each = logits(model, texts), {}
    for folder, adapters in trained.items():
        adapters.plug()
        each[folder] = logits(model, texts)
        adapters.unload()
    combined = Combined(recipe, trained)
    again = None
    if rank is not None:
        lora = LoRA(rank)
        for path in combined.layers:
            lora.add(path, combined.layer(path))
        lora.left_out = combined.others
        lora.complete(model)
        with lora.acting(model):
            again = logits(model, texts)
    lost = update_lost(combined.applied(model), DTYPES[dtype])
    y = logits(model, texts)
    facts: dict[str, Any] = {**recipe.facts, "runs": _distances(recipe, runs, each, y)}
    if again is None:
        facts |= {"dtype": dtype, "update_lost": lost}
        write_merged(
            "combine", out_folder, backbone, texts, (y, y0), facts, accept, partial(_card, recipe, runs, "transformers")
        )
        return out_folder
    fidelity = {**facts, **lora.fidelity("combine", compare(y, again, y0), accept), "texts": len(texts)}
    card = _card(recipe, runs, "peft", {"rank": rank, "fidelity": listed(fidelity)})
    lora.write("combine", out_folder, base_facts(first, backbone), fidelity, card)
    return out_folder


def check_combine(runs: Mapping[str, Run]) -> None:
    """Raises UserError unless all runs have a ΔW of one and the same base, which is not quantised."""
    first, *others = runs
    for folder, run in runs.items():
        check_holds("combine", run, folder)
        if kind := run.model.get("quantize"):
            exact = run.method.exact_base(run.method_cfg)
            raise UserError(
                f"combine: updates are combined on the unquantised base, got model.quantize={kind} in {folder}; "
                + (
                    f"{run.method.name} with these fields means something beside the quantised one alone: highrank merge "
                    f"{folder} --out DIR model.quantize={kind}"
                    if exact
                    else "add model.quantize=null"
                )
            )
    base = read_results(Path(first))["model"]
    for folder in others:
        recorded = read_results(Path(folder))["model"]
        new, old = model_files(recorded, base)
        if new != old:
            raise UserError(
                f"combine: runs share one base, got {recorded['name']} in {folder} for {base['name']} in {first} "
                f"({changed(new, old)})"
            )


def _loaded(runs: Mapping[str, Run], backbone: Any) -> dict[str, Adapters]:
    """Returns the runs' adapters on one base, each taken off again."""
    trained = {}
    for folder, run in sorted(
        runs.items(), key=lambda item: not item[1].method.family.keeps_base
    ):  # full makes it fp32
        check_base(folder, backbone)
        views = adapted_views(run, backbone.model)
        adapters = attach(backbone.model, views, run.method, run.method_cfg, run.core.seed, (), backbone.tokenizer)
        adapters.load(Path(folder) / "adapter")
        adapters.unload()
        trained[folder] = adapters
    return {folder: trained[folder] for folder in runs}


class Combined:
    """The combined update, one weight at a time."""

    def __init__(self, recipe: Recipe, trained: Mapping[str, Any]):
        self.recipe = recipe
        self.weights = [weight for _, weight in recipe.terms]
        self.bases = {path: layer.base for a in trained.values() for path, layer in a.layers.items()}
        runs = [trained[folder] for folder, _ in recipe.terms]
        self.layers = list(dict.fromkeys(path for adapters in runs for path in adapters.layers))
        self.updates: list[Mapping[str, Thunk]] = [
            {**{path: partial(a.layer_update, path) for path in a.layers}, **a.other_updates()} for a in runs
        ]
        self.others = list(dict.fromkeys(name for adapters in runs for name in adapters.other_updates()))
        self.least = [
            least_kept(updates.values(), recipe.kept) if recipe.how == "ties" else 0.0 for updates in self.updates
        ]

    def layer(self, name: str) -> Tensor:
        """Returns ΔW of a layer, by its path, or of another parameter, by its name; in fp32."""
        parts = [
            (i, weight, self._part(i, name))
            for i, (weight, updates) in enumerate(zip(self.weights, self.updates, strict=True))
            if name in updates
        ]
        total: Tensor = torch.stack([weight * part for _, weight, part in parts]).sum(0)
        if self.recipe.how == "ties":
            agree = [(part != 0) & (part.sign() == total.sign()) for _, _, part in parts]
            over = torch.stack([weight * yes for (_, weight, _), yes in zip(parts, agree, strict=True)]).sum(0)
            total = torch.stack([w * part * yes for (_, w, part), yes in zip(parts, agree, strict=True)]).sum(0)
            total = sum(self.weights) * total / over.where(over > 0, 1.0)
        return total.float()

    def _part(self, i: int, name: str) -> Tensor:
        """Returns run i's update, trimmed or thinned, in fp64."""
        update = self.updates[i][name]()
        if self.recipe.how == "ties":
            update = torch.where(update.abs() >= self.least[i], update, 0.0)
        if self.recipe.how == "dare":
            rng = torch.Generator().manual_seed(site_seed(self.recipe.seed or 0, f"{i}/{name}"))
            kept = torch.rand(update.shape, generator=rng) < self.recipe.kept
            return update.double() * kept / self.recipe.kept
        return update.double()

    @torch.no_grad()
    def applied(self, model: Any) -> Iterator[tuple[Tensor, Tensor]]:
        """Adds the update to the model, and yields every parameter that this touches, before and after."""
        named = dict(model.named_parameters())
        for name in [*self.layers, *self.others]:
            W = weight_of(self.bases[name]) if name in self.bases else named[name]
            before = W.detach().clone()
            W.data.add_(self.layer(name).to(W.device))
            yield before, W


def least_kept(updates: Iterable[Thunk], share: float) -> float:
    """Returns the size of the least of the `share` largest entries of all updates together, exactly, in two passes.

    The bits of numbers >= 0 in fp32 are in the order of the numbers: the upper half is counted first, then the lower half
    where the upper is that of the number looked for.
    """
    updates = list(updates)
    upper = torch.zeros(2**15, dtype=torch.int64)
    for update in updates:
        upper += torch.bincount(_bits(update()) >> 16, minlength=2**15)
    count = max(round(share * int(upper.sum())), 1)
    bucket, above = _reaching(upper, count)
    lower = torch.zeros(2**16, dtype=torch.int64)
    for update in updates:
        bits = _bits(update())
        lower += torch.bincount(bits[bits >> 16 == bucket] & 0xFFFF, minlength=2**16)
    last, _ = _reaching(lower, count - above)
    return float(torch.tensor(bucket << 16 | last, dtype=torch.int32).view(torch.float32))


def _bits(update: Tensor) -> Tensor:
    return update.abs().contiguous().view(torch.int32).flatten()


def _reaching(counts: Tensor, count: int) -> tuple[int, int]:
    """Returns the greatest place from which on there are `count` or more, and how many lie above it."""
    from_here = counts.flip(0).cumsum(0).flip(0)
    place = int((from_here >= count).nonzero()[-1])
    return place, int(from_here[place] - counts[place])


def _distances(recipe: Recipe, runs: Mapping[str, Run], each: Mapping[str, Any], y: Any) -> list[dict[str, Any]]:
    return [
        {"run": str(folder), "method": runs[folder].method.name, "weight": weight, **compare(each[folder], y)}
        for folder, weight in recipe.terms
    ]


def _card(recipe: Recipe, runs: Mapping[str, Run], library: str, facts: Mapping[str, Any]) -> str:
    """Returns the README.md of a combined model or LoRA."""
    run = next(iter(runs.values()))
    base = run.model.get("hub") or run.model["name"]
    front = {"library_name": library, "base_model": base, "tags": ["highrank", "merge"]}
    how = ", ".join(f"{key} {value}" for key, value in recipe.facts.items())
    rows = "".join(f"| {key} | {value} |\n" for key, value in {"base model": base, "combined": how, **facts}.items())
    terms = "".join(
        f"| {weight} | {runs[folder].method.name} | {runs[folder].task.name} | {runs[folder].hash[:12]} |\n"
        for folder, weight in recipe.terms
    )
    return (
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n# A combination of {len(runs)} runs\n\n| | |\n| --- | --- |\n{rows}"
        f"\n| weight | method | task | config hash |\n| --- | --- | --- | --- |\n{terms}"
    )
