"""What a run starts from, as far as its config says it: which run, its adapter or its merged weights, and what it holds."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from highrank.base.errors import UserError
from highrank.base.fields import dataclass_from
from highrank.base.files import digest, shown
from highrank.base.hub import fetched, on_hub, pinned
from highrank.base.saved import read_results, sweep_cells
from highrank.config.run_config import RunConfig
from highrank.model.adapter_folder import SEAL, read_card

STARTS = ("adapter", "merged")


def settle(core: RunConfig, method: Any, method_cfg: Any, given: dict[str, str]) -> RunConfig:
    """Returns the core keys of a run with, where it starts from another, that run's directory, or its commit on the Hub,
    `start_as` and `start_hash`.

    A folder that is not there stays open: a dry run may do without, and whoever needs it says what is missing.

    Raises:
        UserError: for an unknown start_as, or without start_from; for a sweep without the one run that is meant; for a run
            that does not hold what start_hash says, or on the Hub and not to be had.
    """
    if core.start_from is None:
        for key in ("start_as", "start_hash"):
            if (value := getattr(core, key)) is not None:
                raise UserError(
                    f"run: {key} is about the run of start_from, got {key}={value} without start_from=<run>"
                )
        return core
    if core.start_as not in (None, *STARTS):
        raise UserError(f"run: start_as is {' or '.join(STARTS)}, got start_as={core.start_as}")
    if core.start_as and core.start_hash:  # of a saved run, whose source may have been moved
        return core
    folder = fetched("start_from", core.start_from)
    if on_hub(core.start_from):
        core = replace(core, start_from=pinned(core.start_from, folder))
    if (folder / "sweep.json").is_file():
        folder = _of_sweep(folder, method, method_cfg, core.seed)
        core = replace(core, start_from=str(folder))
        given.pop("start_from", None)
    held = content(folder)
    if held is None:
        return core
    if core.start_hash not in (None, held):
        raise UserError(
            f"run: start_from must hold what start_hash says, got {held[:12]}… instead of {core.start_hash[:12]}… in "
            f"{shown(folder)}; give the right run"
        )
    start_as = core.start_as or ("adapter" if read_card(folder / "adapter")["method"] == method.name else "merged")
    return replace(core, start_as=start_as, start_hash=held)


def content(folder: Path) -> str | None:
    """Returns the sha256 over a run's config and adapter, whose card holds the weights' own; None where one is missing."""
    try:
        config_hash = read_results(folder)["config_hash"]
    except UserError:
        return None
    if not (folder / "adapter" / "adapter.json").is_file():
        return None
    return digest([config_hash, read_card(folder / "adapter")[SEAL]])


def _of_sweep(folder: Path, method: Any, method_cfg: Any, seed: int) -> Path:
    cells = list(sweep_cells("start_from", folder))
    fitting = [cell for cell in cells if _is_of(cell, method, method_cfg, seed)]
    if len(fitting) != 1:
        raise UserError(
            f"run: of a sweep's folder the trained run of the same method, its fields and seed is gone on from, got "
            f"{len(fitting)} of {len(cells)} with method={method.name} seed={seed} in start_from={shown(folder)}; name a "
            "run directory"
        )
    return fitting[0]


def _is_of(run: Path, method: Any, method_cfg: Any, seed: int) -> bool:
    if not (run / "adapter" / "adapter.json").is_file():
        return False
    card = read_card(run / "adapter")
    if (card["method"], card["seed"]) != (method.name, seed):
        return False
    return bool(dataclass_from(method.config, card["fields"], method.name, trained=True) == method_cfg)
