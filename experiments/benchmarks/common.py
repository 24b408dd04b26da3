"""What the benchmarks share: one model with ours or PEFT's adapters on it, interleaved timing, tables and JSON."""

import argparse
import contextlib
import copy
import importlib.metadata
import io
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import torch
from torch import Tensor, nn

from highrank.base.allocator import keep_freed_memory
from highrank.config.words import compose_run
from highrank.data.encoding import IGNORED
from highrank.model.adapters import Adapters, attach
from highrank.model.backbones import DTYPES
from highrank.train.loss import language_model_loss

keep_freed_memory()  # as a run does; it serves every side alike

ROOT = Path(__file__).parents[2]
PLACEMENT = "fc_qkv"
TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
"""The modules of PLACEMENT, as PEFT is told."""
NOISE = 0.02
"""Standard deviation of what is added to every adapter's start, so that no side multiplies by zeros."""
FROZEN = "frozen"


# --- methods ------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A row of a table: a method with its fields, and the goals for the step's time and saved tensors."""

    key: str
    label: str
    method: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    goals: tuple[float, float] | None = None


def cases(keys: str | None = None, r: int = 16, vera_r: int = 256, b: int = 4, factor: int = 4) -> list[Case]:
    """Returns the rows, or those that `keys` (joined by commas) names."""
    every = [
        Case("hyperadapt", "HyperAdapt", "hyperadapt", {}, (1.05, 1.30)),
        Case("lora", f"LoRA r={r}", "lora", {"r": r}, (1.05, 1.20)),
        Case("dora", f"DoRA r={r}", "dora", {"r": r}, (1.08, 1.40)),
        Case("hira", f"HiRA r={r}", "hira", {"r": r}, (1.32, 1.20)),
        Case("hilora", f"HiLoRA r={r}+{r}", "hilora", {"r1": r, "r2": r}, (1.38, 1.22)),
        Case("vera", f"VeRA r={vera_r}", "vera", {"r": vera_r}, (1.30, 1.30)),
        Case("boft1", f"BOFT b={b} factor 1", "boft", {"block_size": b, "butterfly_factor": 1}, (1.35, 1.40)),
        Case(
            "boft4", f"BOFT b={b} factor {factor}", "boft", {"block_size": b, "butterfly_factor": factor}, (2.00, 1.70)
        ),
        Case("mora", f"MoRA r={r}", "mora", {"r": r}),
        Case("ia3", "(IA)³", "ia3"),
        Case("boha", f"BoHA r={r}", "boha", {"r": r}),
        Case("abba", f"ABBA r1=r2={r // 2}", "abba", {"r1": r // 2, "r2": r // 2}),
        Case("loha", f"LoHa r={r // 2}", "loha", {"r": r // 2}),
        Case("lokr", f"LoKr r={r // 2}", "lokr", {"r": r // 2}),
        Case("gralora", f"GraLoRA r={r}", "gralora", {"r": r}),
        Case("diablo", "DiaBlo N=24", "diablo", {"N": 24}),
        Case("c3a", "C3A b=64", "c3a", {"block_size": 64}),
        Case("shira", f"SHiRA r={r}", "shira", {"r": r, "mask_seed": 0}),
        Case("miss", f"MiSS r={2 * r}", "miss", {"r": 2 * r}),
        Case("bat", f"MiSS r={2 * r} bat", "miss", {"r": 2 * r, "type": "bat"}),
        Case("svft", "SVFT plain", "svft"),
        Case("fourierft", "FourierFT p=1000", "fourierft"),
        Case("randlora", f"RandLoRA r={2 * r}", "randlora", {"r": 2 * r}),
        Case("oft", "OFT b=32", "oft"),
        Case("delora", f"DeLoRA r={r}", "delora", {"r": r, "start": "zeros"}),
        Case("lora_xs", f"LoRA-XS r={2 * r}", "lora_xs", {"r": 2 * r}),
        Case("pissa", f"PiSSA r={r}", "lora", {"r": r, "init": "pissa"}),
        Case("layernorm", "LayerNorm tuning", "layernorm"),
        Case("bottleneck", "Bottleneck m=d/16", "bottleneck"),
        Case("parallel", "Bottleneck m=d/16 parallel", "bottleneck", {"form": "parallel"}),
        Case("compacter", "Compacter m=d/8", "compacter", {"reduction": 8}),
        Case("sum", f"HyperAdapt + LoRA r={r}", "sum", {"parts": {"hyperadapt": {}, "lora": {"r": r}}}),
    ]
    if keys is None:
        return every
    known = {case.key: case for case in every}
    unknown = [key for key in keys.split(",") if key not in known]
    if unknown:
        sys.exit(f"--methods: unknown name, got {', '.join(unknown)}; known: {', '.join(known)}")
    return [known[key] for key in keys.split(",")]


class Gap(Exception):
    """Why a side of a comparison does not exist; stands in the table in its place."""


def import_peft() -> Any:
    try:
        import peft
    except ImportError:
        raise Gap("PEFT is not installed") from None
    return peft


def add_peft(model: nn.Module, label: str, ours: Adapters) -> Any:
    """Returns PEFT's model around `model`, with the parameters of `ours`.

    Raises:
        Gap: if PEFT is not there, lacks the method, or would run another one.
    """
    peft, form = import_peft(), ours.method.peft
    if form is None or form.one_way or form.lacks(ours.cfg):
        raise Gap(f"PEFT has no {label.split()[0]}")
    owned = _by_module(ours)
    targets = TARGETS if ours.views else sorted({path for path, _ in owned})
    config = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[form.type](target_modules=targets, **form.options(ours.cfg))
    # silenced: PEFT tells of BOFT's missing extension in warnings, and prints the compiler's complaint
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            found = peft.get_peft_model(model, config)
        except (AttributeError, TypeError, ValueError) as error:
            raise Gap(f"PEFT {peft.__version__}: {error}") from error
    trainable = {key: p for key, p in found.named_parameters() if p.requires_grad}
    for (path, own), source in owned.items():
        theirs = form.tensors[own]
        part = theirs.removesuffix(".weight")  # which stands behind the adapter's name there
        match = [key for key in trainable if f".{path}." in key and f".{part}." in f"{key}."]
        target = trainable.pop(match[0])
        if target.numel() != source.numel():
            raise Gap(
                "PEFT runs factor 1 without its CUDA extension" if ours.method.name == "boft" else "another shape"
            )
        with torch.no_grad():
            target.copy_(source.view_as(target))
    assert not trainable, f"parameters without a counterpart: {list(trainable)[:3]}"
    return found


def _by_module(ours: Adapters) -> dict[tuple[str, str], Tensor]:
    """Returns what trains by the path of the module that it belongs to and its own name."""
    if ours.views:
        return {
            (view.path, own): parameter
            for view in ours.views
            for own, parameter in ours.by_view[view.name].named_parameters()
        }
    names = {name: name.split(".") for name, _ in ours.named_parameters()}  # method.norms.<path, its dots as />.<own>
    return {
        (names[name][-2].replace("/", "."), names[name][-1]): parameter for name, parameter in ours.named_parameters()
    }


def add_ours(model: nn.Module, method: Any, fields: Mapping[str, Any], seed: int = 0) -> Adapters:
    """Attaches adapters to `model` and moves them off their start by NOISE."""
    views = method.family.views_in(model, PLACEMENT, "all", "auto", None)
    adapters = attach(model, views, method, method.config(**fields), seed)
    move_off_start(adapters)
    return adapters


def move_off_start(adapters: Adapters) -> None:
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in adapters.named_parameters():
            parameter.add_((NOISE * torch.randn(parameter.shape, generator=rng)).to(parameter))


# --- models and steps ---------------------------------------------------------------


def random_model(args: argparse.Namespace) -> nn.Module:
    """Returns a model of the chosen shape with random weights, on the device, in training mode."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = dict(compose_run([f"model={args.shape}"]).model["shape"])
    keys = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size")
    given = (args.hidden, args.inter, args.heads, args.kv_heads, args.vocab)
    shape.update({key: value for key, value in zip(keys, given, strict=True) if value is not None})
    if args.layers:
        shape["num_hidden_layers"] = args.layers
    torch.manual_seed(0)
    with torch.device(args.device):
        config = AutoConfig.for_model(**shape)
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[args.dtype], attn_implementation=args.attention)
    return model.requires_grad_(False).train()


def same_weights(model: nn.Module) -> nn.Module:
    """Returns a copy of the modules over the same parameters and buffers: sides share the frozen weights."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())})


def random_batch(args: argparse.Namespace, vocabulary: int) -> dict[str, Tensor]:
    """Returns batch x sequence random tokens; the second half of each row carries the loss."""
    ids = torch.randint(0, vocabulary, (args.batch, args.sequence), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, : args.sequence // 2] = IGNORED
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return {key: value.to(args.device) for key, value in batch.items()}


class Step:
    """A whole training step: forward, backward and, if anything trains, one AdamW step.

    Without trainable parameters it is the frozen step: backward goes to the output of the input embeddings.
    """

    def __init__(self, model: Any, batch: Mapping[str, Tensor]):
        self.model, self.batch = model, batch
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4) if trained else None
        if not trained:
            embeddings = model.get_input_embeddings()
            embeddings.register_forward_hook(lambda module, args, out: out.detach().requires_grad_())

    def forward(self) -> Tensor:
        return language_model_loss(self.model, **self.batch)[0]

    def __call__(self) -> None:
        self.forward().backward()
        if self.optimizer:
            self.optimizer.step()
            self.optimizer.zero_grad()


# --- measuring ----------------------------------------------------------------------


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def interleave(
    sides: Mapping[Any, Callable[[], Any]], rounds: int, warmups: int = 0, device: str = "cpu"
) -> dict[Any, list[float]]:
    """Returns seconds per side and round; in each round every side runs once, in shuffled order."""
    rng = random.Random(0)
    times: dict[Any, list[float]] = {name: [] for name in sides}
    for i in range(warmups + rounds):
        for name in rng.sample(list(sides), len(sides)):
            synchronize(device)
            started = time.perf_counter()
            sides[name]()
            synchronize(device)
            if i >= warmups:
                times[name].append(time.perf_counter() - started)
    return times


def summary(values: Sequence[float]) -> dict[str, float]:
    """Returns the median and the quartiles."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [*values] * 3
    return {"median": middle, "q1": low, "q3": high, "n": len(values)}


def over(times: Mapping[Any, Sequence[float]], name: Any, base: Any) -> dict[str, float]:
    """Returns the summary of the ratios of side `name` to side `base`, round by round."""
    return summary([a / b for a, b in zip(times[name], times[base], strict=True)])


def saved_bytes(step: Step) -> tuple[int, float]:
    """Returns the bytes that forward keeps for backward, and the loss.

    Each storage counts once; parameters and buffers do not count.
    """
    own = {t.untyped_storage().data_ptr() for t in chain(step.model.parameters(), step.model.buffers())}
    kept: dict[int, Any] = {}  # holds the storages, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        sparse = tensor.layout == torch.sparse_coo
        for part in (tensor._indices(), tensor._values()) if sparse else (tensor,):
            storage = part.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage
        return tensor.detach()  # an output that its own node holds would never be freed

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = step.forward()
    return sum(storage.nbytes() for storage in kept.values()), float(loss.detach())


@contextlib.contextmanager
def no_stderr() -> Iterator[None]:
    """Drops what the profiler's library writes to file descriptor 2 at its start and stop."""
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


def peak_bytes(step: Callable[[], Any], device: str) -> int:
    """Returns the most bytes allocated during a step above what was allocated before it.

    On CUDA from the caching allocator's counters, on a CPU from the profiler's record of every allocation.
    """
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with (
        no_stderr(),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile,
    ):
        step()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


# --- command line and output --------------------------------------------------------


def arguments(doc: str, rounds: int | None, device: bool = True) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if rounds is not None:
        parser.add_argument("--rounds", type=int, default=rounds, help=f"measured rounds (default {rounds})")
    parser.add_argument("--json", type=Path, help="file for settings, environment and all numbers")
    if device:
        parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    return parser


def model_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--dtype", default="float32", choices=DTYPES, help="of the frozen weights; adapters are fp32")
    add("--shape", default="smollm2_135m", help="a model in configs/model whose shape is taken; weights are random")
    add("--layers", type=int, default=4, help="0 for all (default 4)")
    for name in ("hidden", "inter", "heads", "kv-heads", "vocab"):
        add(f"--{name}", type=int, help="overrides the shape's")
    add("--batch", type=int, default=4, help="rows (default 4)")
    add("--sequence", type=int, default=256, help="tokens per row (default 256)")
    add("--attention", default="sdpa", help="sdpa or eager, on every side")
    add("--warmups", type=int, default=2, help="rounds that are not measured (default 2)")


def run_words(given: Sequence[str], wanted: Mapping[str, Any]) -> list[str]:
    """Returns words for `compose_run`: those of the command line, and of `wanted` what they leave open."""
    keys = {word.split("=")[0] for word in given}
    return [*(f"{key}={value}" for key, value in wanted.items() if key not in keys), *given]


def environment(device: str) -> dict[str, Any]:
    """Returns what the numbers depend on beside the settings."""
    cuda = device.startswith("cuda")
    found = {"device": torch.cuda.get_device_name() if cuda else f"cpu ({platform.processor() or platform.machine()})"}
    found |= {"threads": torch.get_num_threads(), "cores": os.cpu_count(), "python": platform.python_version()}
    for package in ("torch", "transformers", "lightning", "peft", "accelerate"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def show_environment(title: str, found: Mapping[str, Any]) -> None:
    print(f"{title}: " + ", ".join(f"{key} {value}" for key, value in found.items()), flush=True)


def note(text: str) -> None:
    """Tells on stderr how far a benchmark is."""
    print(text, file=sys.stderr, flush=True)


def ratio(found: Mapping[str, float] | None) -> str:
    return "–" if found is None else f"{found['median']:.3f} ({found['q1']:.3f} to {found['q3']:.3f})"


def run_py(words: Sequence[str]) -> tuple[float, list[dict[str, Any]]]:
    """Executes `run.py` in a folder of its own; returns the seconds from the command to its end, and each run's results,
    of a sweep without the trials of its search."""
    with tempfile.TemporaryDirectory() as folder:
        runs = Path(folder, "runs")
        place = f"sweep_dir={runs}" if "-m" in words else f"run_dir={runs / 'run'}"
        command = [sys.executable, str(ROOT / "run.py"), *words, place, f"output={folder}"]
        start = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wall = time.perf_counter() - start
        if done.returncode:
            sys.exit(f"{' '.join(command)}: {done.stderr or done.stdout}")
        return wall, [json.loads(file.read_text()) for file in runs.glob("*/results.json")]


def exponent(values: Sequence[float], seconds: Sequence[float]) -> float:
    """Returns the slope of log seconds against log value, by least squares: cost grows as value to that power."""
    return float(np.polyfit(np.log(values), np.log(seconds), 1)[0]) if len(set(values)) > 1 else float("nan")


def show_table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Prints a Markdown table."""
    print()
    print("| " + " | ".join(columns) + " |")
    print("|" + " --- |" * len(columns))
    for row in rows:
        print("| " + " | ".join(str(cell) for cell in row) + " |")


def write_json(args: argparse.Namespace, name: str, found: Mapping[str, Any], results: Any) -> None:
    if args.json is None:
        return
    settings = {key: value for key, value in vars(args).items() if key != "json"}
    content = {"benchmark": name, "settings": settings, "environment": found, "results": results}
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(content, indent=1, default=str) + "\n")
