"""The disk is full, at any moment of a run, or refuses: is the exit status non-zero, and does the run then go on exactly?

    python experiments/reliability/disk_full.py --tries 10 --json disk_full.json

A limit on the size of files stands for the disk: with RLIMIT_FSIZE the write that passes it fails, as on a full disk, in
whichever file that is (checkpoint, TensorBoard events, predictions, results). The limits are drawn between 1 KB and the
largest file of the run. Two more tries have a file where the checkpoint folder belongs, and where the run directory does.
Survived: the try ended with a non-zero status and one line that names the error, and the same command with room enough
gave the adapter, checkpoint, batches and predictions of a run that had room from the start.
"""

import argparse
import json
import random
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from kill import differences
from recorded import WORDS, finish


def said(folder: Path) -> str:
    """Returns the last line of what the last try told on stderr."""
    lines = Path(f"{folder}.err").read_text().replace(str(folder.parent), "").strip().splitlines()
    return lines[-1] if lines else ""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    words, draw, tries = [*WORDS, "epochs=3", "checkpoint_every=2"], random.Random(options.seed), []
    with tempfile.TemporaryDirectory() as name:
        whole = Path(name) / "whole"
        finish(whole, words)
        largest = max(file.stat().st_size for file in whole.rglob("*") if file.is_file())
        limits: list[int | str] = [draw.randint(1024, largest - 1) for _ in range(options.tries)]
        for place in (*limits, "checkpoints", "run directory"):
            folder = Path(name) / f"run{len(tries)}"
            blocked = {"checkpoints": folder / "checkpoints", "run directory": folder}.get(str(place))
            if place == "checkpoints":
                finish(folder, words, 4096)  # leaves a folder that is this run's
                shutil.rmtree(folder / "checkpoints", ignore_errors=True)
            if blocked is not None:
                blocked.write_text("in the way")
            status, told = finish(folder, words, None if blocked else int(place)), said(folder)
            if blocked is not None:
                blocked.unlink()
            finish(folder, words)
            found = differences(whole, folder)
            tries.append({"limit": place, "status": status, "said": told, "differences": found})
            print(f"limit {place}: status {status}, {told[:100]}, differences: {found or 'none'}", flush=True)
    survived = sum(t["status"] != 0 and t["said"].startswith("error: ") and not t["differences"] for t in tries)
    print(f"full disks: tried {len(tries)}, survived {survived}")
    if options.json:
        options.json.write_text(
            json.dumps({"tried": len(tries), "survived": survived, "tries": tries}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
