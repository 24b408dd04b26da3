"""Seconds from starting Python to: the package imported, help shown, a plan made, the first training step done.

    python experiments/benchmarks/startup.py --json out.json

Every command runs in a fresh process, all of them once per round in shuffled order; medians and quartiles over rounds.
An empty program and `import torch` stand beside them as the floor. The first training step is that of model=tiny_llama
on four rows, without the evaluation before it: the process ends at the end of the step.
"""

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from common import arguments, environment, interleave, note, show_environment, show_table, summary, write_json

ROOT = Path(__file__).parents[2]
FIRST_STEP = """
import os, sys
from highrank.train.module import FineTuner
from highrank.cli import main
FineTuner.on_train_batch_end = lambda *args: os._exit(0)
main(["run", *sys.argv[1:]])
sys.exit("no training step happened")
"""


def commands(output: str) -> dict[str, list[str]]:
    run = [str(ROOT / "run.py")]
    tiny = ["model=tiny_llama", "eval_before=false", "max_steps=1", "batch_size=4", "task.n_train=4", "task.n_test=1"]
    return {
        "empty program": ["-c", ""],
        "import torch": ["-c", "import torch"],
        "import highrank": ["-c", "import highrank"],
        "run.py --help": [*run, "--help"],
        "dry run of llama3_8b": [*run, "model=llama3_8b", "r=32", "dry_run=true", f"output={output}/plan"],
        "first step of tiny_llama": ["-c", FIRST_STEP, *tiny, f"output={output}/run"],
    }


GOALS = {"import highrank": "< 1 s", "run.py --help": "< 1 s", "dry run of llama3_8b": "< 5 s"}


def main(words: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__, rounds=7, device=False)
    parser.add_argument("--warmups", type=int, default=1, help="rounds that are not measured (default 1)")
    parser.add_argument("--only", help="commands by a part of their name, joined by commas (default all)")
    args = parser.parse_args(words)
    env = environment("cpu")
    show_environment("startup", env)
    with tempfile.TemporaryDirectory() as output:

        def start(command: Sequence[str]) -> None:
            done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(f"{' '.join(command)}: {done.stderr}")

        wanted = args.only.split(",") if args.only else [""]
        chosen = {name: c for name, c in commands(output).items() if any(part in name for part in wanted)}
        sides = {name: lambda command=command: start(command) for name, command in chosen.items()}
        times = interleave(sides, args.rounds, args.warmups)
    results = {name: summary(values) for name, values in times.items()}
    rows = [
        [name, f"{at['median']:.2f} s ({at['q1']:.2f} to {at['q3']:.2f})", GOALS.get(name, "")]
        for name, at in results.items()
    ]
    note(f"{args.rounds} rounds")
    show_table(["from the start of Python to", "time (quartiles)", "goal"], rows)
    write_json(args, "startup", env, results)


if __name__ == "__main__":
    main()
