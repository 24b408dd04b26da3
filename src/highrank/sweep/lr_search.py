"""A learning rate for every arm of a sweep by the same rule: the lowest loss on held-out training examples.

    python run.py -m method=hira,lora seed=0,1,2 lr_search=[1e-3,3e-3,1e-2]
    python run.py -m method=hira,lora seed=0,1,2 lr_search=5     # five per arm, a factor 10^0.5 apart around its default
    python run.py -m method=hira,lora seed=0,1,2 lr_search=3 lr_search_most=7    # and on past an edge, to at most seven

Every arm (a cell without its seed) gets the same number of trials, each a run as long as the real one with the sweep's
first seed, trained on all but the held-out examples and not evaluated on a test set. With `lr_search_most` an arm whose best
rate is its first or last one tries the next beyond, until a worse one stands on either side.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from highrank.base.errors import UserError
from highrank.base.files import digest
from highrank.base.saved import state_of
from highrank.sweep.grid import Cell, Grid, typed
from highrank.train.plan import make_plan

STEP = math.sqrt(10)
"""Factor between neighbouring rates, where only their number is given."""
MOST_HELD_OUT = 256
"""Examples held out for a trial where the protocol holds out none: a tenth of the training set, at most so many."""


@dataclasses.dataclass(frozen=True)
class SearchRecord:
    """The record of a search."""

    given: tuple[float, ...] | int
    """The rates that every arm tried, or how many around its method's default."""
    seed: int
    arms: list[dict[str, Any]]
    cells: list[Cell | None]
    """The sweep's cells with their arm's rate, or None where no trial of the arm ended."""

    def as_dict(self) -> dict[str, Any]:
        return {"values": self.given, "seed": self.seed, "arms": self.arms}


@dataclasses.dataclass(frozen=True)
class Search:
    """Which rates every arm tries."""

    given: tuple[float, ...] | int
    """The rates themselves, or how many around the method's default."""
    most: int | None = None
    """To how many an arm's rates may grow while the best is at an edge; None: they stay as given."""

    def rates(self, cell: Cell) -> list[float]:
        """Returns the rates for a cell's arm, in ascending order."""
        if isinstance(self.given, tuple):
            return sorted(self.given)
        middle = (self.given - 1) / 2
        return [float(f"{cell.run.method.default_lr * STEP ** (i - middle):.2g}") for i in range(self.given)]

    @property
    def trials(self) -> int:
        """How many an arm makes at most."""
        return self.most or (self.given if isinstance(self.given, int) else len(self.given))

    def run(self, cells: Sequence[Cell], folder: Path, execute: Callable[[Sequence[Cell]], None]) -> SearchRecord:
        """Executes every arm's trials in `folder`, and returns what was found."""
        seed = cells[0].run.core.seed
        arms = {digest(cell.arm): cell for cell in cells}
        bases = {key: trial(cell, seed) for key, cell in arms.items()}
        trials: dict[str, list[tuple[float, Cell]]] = {key: [] for key in arms}
        records: dict[str, dict[str, Any]] = {}
        asked = {key: self.rates(base) for key, base in bases.items()}
        while asked:
            new = {key: [(lr, bases[key].with_words(f"lr={lr:g}")) for lr in rates] for key, rates in asked.items()}
            execute([cell for pairs in new.values() for _, cell in pairs])
            for key, pairs in new.items():
                trials[key] = sorted([*trials[key], *pairs], key=lambda pair: pair[0])
                records[key] = record(arms[key], trials[key], folder)
            asked = {key: [self.beyond(records[key])] for key in asked if self.goes_on(records[key])}
        chosen = [
            cell.with_words(f"lr={lr:g}") if (lr := records[digest(cell.arm)]["lr"]) is not None else None
            for cell in cells
        ]
        return SearchRecord(self.given, seed, list(records.values()), chosen)

    def goes_on(self, found: dict[str, Any]) -> bool:
        """Whether an arm, by its record so far, is to try a rate beyond its best."""
        return bool(found["at_edge"]) and len(found["trials"]) < self.trials

    def beyond(self, found: dict[str, Any]) -> float:
        """Returns the next rate past the edge at which an arm's best is: as far away as its neighbour, or 10^0.5."""
        rates = [row["lr"] for row in found["trials"]]
        low = found["lr"] == rates[0]
        factor = STEP if isinstance(self.given, int) else (rates[1] / rates[0] if low else rates[-1] / rates[-2])
        return float(f"{rates[0] / factor:.2g}" if low else f"{rates[-1] * factor:.2g}")


def parse(word: str | None, grid: Grid, most: str | None = None) -> Search | None:
    """Returns the search that `lr_search=word` and `lr_search_most=most` ask for, or None without one.

    Raises:
        UserError: if the word is neither a list of positive rates nor a whole number from 2 to 20, or lr is given too; for
            `most` without a search, or one that is no whole number from the search's to 20.
    """
    if word is None:
        if most is not None:
            raise UserError(
                f"sweep: lr_search_most is how far a search may go, got lr_search_most={most} without lr_search; give both"
            )
        return None
    given = typed(word)
    if isinstance(given, list):
        try:
            given = tuple(dict.fromkeys(float(rate) for rate in given))
        except (TypeError, ValueError):
            given = ()
    good = len(given) >= 2 and min(given) > 0 if isinstance(given, tuple) else type(given) is int and 2 <= given <= 20
    if not good:
        raise UserError(
            f"sweep: lr_search is a list of two or more positive rates, or their number from 2 to 20, got lr_search={word}"
        )
    if any(word.startswith("lr=") for cell in grid.cells for word in cell.words):
        raise UserError(f"sweep: the rate is either searched or given, got lr_search={word} and lr; leave one out")
    search = Search(given)
    if most is None:
        return search
    number = typed(most)
    if type(number) is not int or not search.trials <= number <= 20:
        raise UserError(
            f"sweep: lr_search_most is a whole number from lr_search's {search.trials} to 20, got lr_search_most={most}"
        )
    return Search(given, number)


def trial(cell: Cell, seed: int) -> Cell:
    """Returns the run that tries a rate for a cell's arm, at the method's own."""
    words = [f"seed={seed}", "eval_before=false", "eval_test=false", "general_text=null"]
    if cell.run.protocol.num_validation == 0:
        held_out = max(1, min(MOST_HELD_OUT, make_plan(cell.run, cell.run.make_task()).num_train // 10))
        words.append(f"protocol.num_validation={held_out}")
    axes = {key: seed if key == "seed" else value for key, value in cell.axes.items()}
    return dataclasses.replace(cell.with_words(*words), axes=axes)


def record(cell: Cell, trials: Sequence[tuple[float, Cell]], folder: Path) -> dict[str, Any]:
    """Returns an arm's trials with their losses, and the rate with the lowest; at_edge says that it is the first or
    the last of them, so that a better one may lie outside."""
    rows = []
    for rate, trial_cell in trials:
        results = {"status": "missing", **state_of(folder / trial_cell.folder)}
        loss = results.get("validation", {}).get("loss") if results["status"] == "done" else None
        rows.append({"lr": rate, "loss": loss, "run": trial_cell.folder, "status": results["status"]})
    usable = [row for row in rows if row["loss"] is not None and math.isfinite(row["loss"])]
    best = min(usable, key=lambda row: row["loss"], default=None)
    return {
        "axes": cell.arm,
        "trials": rows,
        "lr": best and best["lr"],
        "at_edge": best is not None and best in (rows[0], rows[-1]),
    }
