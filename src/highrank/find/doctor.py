"""`highrank doctor`: what of this machine a run depends on, a line each, with the fix where one is needed."""

import importlib.metadata
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from rich.text import Text

from highrank.base.console import console, megabytes, say
from highrank.base.errors import described
from highrank.base.files import cache_dir, shown
from highrank.base.options import Words
from highrank.find.table import show

ENOUGH_DISK = 2e9
"""Bytes that a first run writes into its caches, about twice over."""
ENOUGH_MEMORY = 4e9
"""Bytes that the default run takes at its peak, and some."""
COLORS = {"ok": "green", "note": "yellow", "fix": "red"}


class Line(NamedTuple):
    """What was found of one thing: `ok`, a `note` for what is allowed and may surprise, or to `fix`."""

    state: str
    what: str
    found: str
    fix: str = ""


def command(words: list[str]) -> int:
    """Prints what was found; returns 1 if there is something to fix."""
    Words("doctor", "").parse_args(words)
    lines = [line for check in CHECKS for line in examined(check)]
    show(["", "what", "found", "what to do"], [(Text(line.state, COLORS[line.state]), *line[1:]) for line in lines])
    faults = sum(line.state == "fix" for line in lines)
    if console.is_terminal:
        say(f"{faults} to fix" if faults else "nothing to fix")
    return int(faults > 0)


def examined(check: Callable[[], Iterator[Line]]) -> list[Line]:
    """Returns a check's lines; one that breaks, as a broken library does, is a line too."""
    lines = []
    try:
        for line in check():
            lines.append(line)
    except Exception as error:
        what = check.__name__.removeprefix("_").replace("_", " ")
        lines.append(Line("fix", what, described(error), "mend or install again what this names"))
    return lines


def _python() -> Iterator[Line]:
    wanted = SpecifierSet(importlib.metadata.metadata("highrank")["Requires-Python"])
    version = platform.python_version()
    fits = wanted.contains(version, prereleases=True)
    fix = "" if fits else f"make an environment with Python {wanted}"
    yield Line("ok" if fits else "fix", "Python", f"{version} at {sys.executable}", fix)


def _packages() -> Iterator[Line]:
    """The base's packages must be there and in the tested ranges; an extra's, if they are there."""
    fitting, extras = 0, set()
    for requirement in map(Requirement, importlib.metadata.requires("highrank") or ()):
        marker = requirement.marker
        extra = str(marker).rpartition("== ")[2].strip("\"'") if marker and "extra" in str(marker) else ""
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            if not extra:
                yield Line("fix", requirement.name, "not installed", _install(requirement))
            continue
        if requirement.specifier.contains(version, prereleases=True):
            fitting += not extra
            extras |= {extra} - {""}
        else:
            what = f"{version}, tested is {requirement.specifier}" + (f" (extra {extra})" if extra else "")
            yield Line("fix", requirement.name, what, _install(requirement))
    yield Line(
        "ok", "packages", f"{fitting} in the tested ranges; of the extras something of: {', '.join(sorted(extras))}"
    )


def _install(requirement: Requirement) -> str:
    return f'pip install "{requirement.name}{requirement.specifier}"'


def _pins() -> Iterator[Line]:
    """In a clone, how far the environment is from the one that all tests passed in."""
    file = Path(__file__).parents[3] / "constraints.txt"
    if not file.is_file():
        return
    others = []
    for line in file.read_text().splitlines():
        name, _, pinned = line.partition("==")
        try:
            version = importlib.metadata.version(name) if pinned else pinned
        except importlib.metadata.PackageNotFoundError:
            continue
        if version.partition("+")[0] != pinned:
            others.append(f"{name} {version} for {pinned}")
    if others:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        fix = f"pip install -c {shown(file)} -e ."
        yield Line(
            "note", "pinned versions", f"{', '.join(others[:3])}{more}: other than the tests last passed with", fix
        )
    else:
        yield Line("ok", "pinned versions", "all as the tests last passed with")


def _devices() -> Iterator[Line]:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = torch.get_num_threads()
    fix = "unset OMP_NUM_THREADS, or set it to the number of cores" if threads != cores else ""
    yield Line("note" if fix else "ok", "CPU", f"{cores} cores, {threads} threads in PyTorch", fix)
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            yield Line("ok", f"cuda:{index}", f"{device.name}, {device.total_memory / 2**30:.0f} GiB")
    elif torch.version.cuda:
        fix = "where there is a GPU: install its driver, or look at CUDA_VISIBLE_DEVICES"
        yield Line("note", "GPU", f"none to be seen by PyTorch {torch.__version__}, which is for CUDA", fix)
    elif shutil.which("nvidia-smi"):
        fix = "install a CUDA build of PyTorch: pytorch.org/get-started"
        yield Line("fix", "GPU", f"there is a driver, and PyTorch {torch.__version__} is for CPUs alone", fix)
    else:
        yield Line("ok", "GPU", f"none; PyTorch {torch.__version__} computes on the CPU")


def _number_types() -> Iterator[Line]:
    """What the dtypes of a model's weights are computed as, and which of them `model.dtype=auto` takes."""
    import torch

    from highrank.model.backbones import fastest_dtype

    on = "cuda" if torch.cuda.is_available() else "cpu"
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        ones = torch.ones(16, 16, device=on, dtype=dtype)
        right = bool((ones @ ones == 16).all())
        slow = on == "cuda" and dtype == torch.bfloat16 and torch.cuda.get_device_capability() < (8, 0)
        fix = "model.dtype=float32" if not right else "model.dtype=float16 or float32 is faster here" if slow else ""
        state = "ok" if right and not slow else "note" if right else "fix"
        yield Line(
            state, name, f"{'computes' if right else 'computes wrongly'} on {on}{', emulated' if slow else ''}", fix
        )
    yield Line("ok", "model.dtype=auto", f"{fastest_dtype('auto')}, which is the fastest here")


def _memory() -> Iterator[Line]:
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return
    fix = (
        "" if whole >= ENOUGH_MEMORY else "batch_size=2 accumulate=4, checkpoint_activations=true, or preload tcmalloc"
    )
    yield Line("note" if fix else "ok", "memory", f"{whole / 2**30:.1f} GiB, {free / 2**30:.1f} GiB of it unused", fix)


def _caches() -> Iterator[Line]:
    from huggingface_hub import constants

    yield _writable("cache", cache_dir(), "HIGHRANK_CACHE")
    yield _writable("Hugging Face cache", Path(constants.HF_HUB_CACHE), "HF_HOME")


def _outputs() -> Iterator[Line]:
    yield _writable("outputs", Path("outputs").absolute(), "output")


def _writable(what: str, folder: Path, key: str) -> Line:
    """Tries to write into a folder, or the nearest one above it that is there, which it would be made in."""
    place = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        return Line("fix", what, f"{shown(folder)} cannot be written: {described(error)}", f"{key}=<another folder>")
    free = shutil.disk_usage(place).free
    fix = "" if free >= ENOUGH_DISK else f"make room, or {key}=<another folder>"
    found = f"{shown(folder)}{'' if folder.exists() else ', not there yet'}, {megabytes(free)} free"
    return Line("note" if fix else "ok", what, found, fix)


def _data() -> Iterator[Line]:
    folder = os.environ.get("HIGHRANK_DATA")
    if not folder:
        yield Line(
            "ok", "data", "HIGHRANK_DATA is not set: tasks with files ask the Hub, unless task.data=<folder> is given"
        )
    elif Path(folder).is_dir():
        yield Line("ok", "data", f"HIGHRANK_DATA={folder}, {len(list(Path(folder).iterdir()))} entries")
    else:
        yield Line("fix", "data", f"HIGHRANK_DATA={folder}, which is no folder", "set it to the folder, or unset it")


def _network() -> Iterator[Line]:
    """Without one, what is in the caches still runs: a note."""
    from highrank.base.hub import unreachable

    reason = unreachable()
    if reason is None:
        yield Line("ok", "Hugging Face Hub", "answers")
        return
    ways = "without it give path=<folder> and task.data=<folder>, or what the caches hold"
    fix = f"unset HF_HUB_OFFLINE; {ways}" if "OFFLINE" in reason else f"look at the proxy (HTTPS_PROXY); {ways}"
    yield Line("note", "Hugging Face Hub", reason, fix)


CHECKS = (_python, _packages, _pins, _devices, _number_types, _memory, _caches, _outputs, _data, _network)
