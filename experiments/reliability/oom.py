"""Memory that really runs out, in training and in evaluation: what does the run do, and does it find the same?

    python experiments/reliability/oom.py --json oom.json

A limit on the address space (RLIMIT_AS) is set at the first training step, or the first evaluation batch, a number of MB
above what the process has mapped then, so PyTorch's CPU allocator itself refuses. Survived means
  training         status oom, exit status 2, one line that says what to change
  auto_microbatch  status done, the weights within 1e-4 of the undisturbed run's, as many steps, in parts
  evaluation       status done, metrics and predictions of the undisturbed run, but for the order of the sums in a loss
A try in which the limit was wide enough counts for nothing and is shown as such.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

WORDS = [
    *("model=tiny_llama", "method=lora", "r=2", "eval_before=false"),
    *("task.n_train=256", "task.n_test=128", "batch_size=128", "max_steps=3"),
]
PROGRAM = """\
import resource, sys
from highrank.cli import main
from highrank.train.module import FineTuner

step, room = sys.argv[1], int(sys.argv[2])
real, done = getattr(FineTuner, step), []

def limited(self, batch, index=0):
    if not done:
        done.append(1)
        mapped = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + (room << 20), resource.RLIM_INFINITY))
    return real(self, batch, index)

if room:
    setattr(FineTuner, step, limited)
sys.exit(main(["run", *sys.argv[3:]]))
"""


def attempt(folder: Path, step: str, room: int, *words: str) -> tuple[int, str, dict[str, Any]]:
    """Runs with `room` MB of memory from the first `step` on (0: all there is); exit status, stderr's end, results."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, step, str(room), *WORDS, f"run_dir={folder}", *words],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    said = (done.stderr.strip().splitlines() or [""])[-1]
    return done.returncode, said, json.loads((folder / "results.json").read_text())


def largest_difference(one: Path, other: Path) -> float:
    weights = [load_file(folder / "adapter" / "adapter.safetensors") for folder in (one, other)]
    return max(float((weights[0][name] - weights[1][name]).abs().max()) for name in weights[0])


def same(one: Any, other: Any) -> bool:
    """Whether metrics or prediction rows are the same, but for the order of the sums in a loss."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other or (isinstance(one, float) and math.isclose(one, other, rel_tol=1e-5))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rooms", type=int, nargs="+", default=[50, 100, 200], help="MB")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    tries: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        whole = Path(name) / "whole"
        status, said, expected = attempt(whole, "training_step", 0)
        if status:
            raise SystemExit(said)
        for room in options.rooms:
            for case, step, words in (
                ("training", "training_step", []),
                ("auto_microbatch", "training_step", ["auto_microbatch=true"]),
                ("evaluation", "outputs", ["eval_batch_size=128"]),
            ):
                folder = Path(name) / f"run{len(tries)}"
                status, said, found = attempt(folder, step, room, *words)
                one: dict[str, Any] = {"case": case, "room_mb": room, "status": found["status"], "said": said}
                if case == "training":
                    one["survived"] = (status, found["status"]) == (2, "oom") and "auto_microbatch=true" in said
                elif status == 0:
                    difference = one["largest_difference"] = largest_difference(whole, folder)
                    same = found["steps"] == expected["steps"]
                    if case == "auto_microbatch":
                        one["parts"] = found.get("parts", 1)
                        one["survived"] = same and difference <= 1e-4
                    else:
                        files = [run / "predictions" / "wordmath.jsonl" for run in (whole, folder)]
                        rows = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
                        one["survived"] = same(found["metrics"], expected["metrics"]) and same(*rows)
                else:
                    one["survived"] = False
                one["enough"] = status == 0 and case != "evaluation" and one.get("parts", 1) == 1
                tries.append(one)
                print(one, flush=True)
    counted = [one for one in tries if not one["enough"]]
    print(f"out of memory: tried {len(counted)}, survived {sum(one['survived'] for one in counted)}")
    if options.json:
        options.json.write_text(json.dumps({"tries": tries}, indent=1) + "\n")


if __name__ == "__main__":
    main()
