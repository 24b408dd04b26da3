"""What training gained and what it cost: scores and losses before and after, on the task trained on, other tasks, general text."""

from highrank.report.runs import Record
from highrank.report.scores import Arm, Results
from highrank.report.statistics import LOSS
from highrank.report.tables import Table, number, word

OWN, TEXT = "trained task", "general text"


def changes(record: Record) -> dict[tuple[str, str], tuple[float, float]]:
    """Returns, by (what, score or loss), the value before and after training, of what was measured at both times."""
    pairs = {}
    measured = {OWN: record.results["metrics"], **record.results.get("also", {})}
    for name, when in measured.items():
        before, after = when.get("before", {}), when.get("final", {})
        metric = next((key for key in after if key != "sets"), "")
        for kind, key in (("score", metric), (LOSS, LOSS)):
            if key in before and key in after:
                pairs[name, kind] = before[key], after[key]
    if lost := record.results.get("forgetting"):
        pairs[TEXT, LOSS] = lost["base_loss"], lost["adapted_loss"]
    return pairs


def means(arm: Arm) -> dict[tuple[str, str], tuple[float, float]]:
    """Returns an arm's `changes`, each the mean over its runs, where all have it."""
    each = [changes(record) for record in arm.records]
    shared = [key for key in each[0] if all(key in one for one in each)]
    return {key: (sum(o[key][0] for o in each) / len(each), sum(o[key][1] for o in each) / len(each)) for key in shared}


def table(results: Results) -> Table | None:
    """Returns what was measured before and after training, per arm; None where that is the trained task alone."""
    by_arm = [means(arm) for arm in results.arms]
    keys = list(dict.fromkeys(key for pairs in by_arm for key in pairs))
    if all(name == OWN for name, _ in keys):
        return None
    rows = []
    for arm, pairs in zip(results.arms, by_arm, strict=True):
        cells = [word(arm.axes.get(key)) for key in results.keys]
        for key in keys:
            before, after = pairs.get(key, (None, None))
            form = ".4f" if key[1] == LOSS else ".1f"
            change = None if before is None or after is None else after - before
            cells += [number(before, form), number(after, form), number(change, f"+{form}")]
        rows.append(cells)
    heads = [f"{name}: {kind} {when}" for name, kind in keys for when in ("before", "after", "change")]
    caption = (
        f"Means over an arm's runs. Scores in percent, the unweighted mean over a task's test sets; losses in {results.unit}. "
        "Before: the model as training began; of general text, without the adapter."
    )
    return Table("retention", "Gained and forgotten", caption, [*results.keys, *heads], rows, [], len(results.keys))
