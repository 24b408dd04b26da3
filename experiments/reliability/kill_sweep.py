"""A sweep of 24 short runs, killed at 10 random moments and started again: is anything lost, or done twice?

    python experiments/reliability/kill_sweep.py --kills 10 --json kill_sweep.json

A kill comes up to two runs' time after the sweep has begun its next run; half of them hit the sweep's process alone, half its
whole process group. Compared with a sweep that nothing disturbed: `table.csv`, byte for byte, and how often each run was
finished.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
WORDS = [
    *("-m", "method=hira,hyperadapt,lora,dora", "r=2,4", "seed=0,1,2,3", "model=tiny_llama", "placement=fc_qkv"),
    *("task.n_train=64", "task.n_test=4", "batch_size=2", "max_steps=24", "checkpoint_every=4"),
]


def command(folder: Path) -> list[str]:
    return [sys.executable, str(ROOT / "run.py"), *WORDS, f"sweep_dir={folder}"]


def statuses(folder: Path) -> list[str]:
    return [json.loads(file.read_text())["status"] for file in folder.glob("*/results.json")]


def written_since(folder: Path, started: float) -> bool:
    return any(file.stat().st_mtime > started for file in folder.glob("*/results.json"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as place:
        whole, killed = Path(place) / "whole", Path(place) / "killed"
        began = time.monotonic()
        subprocess.run(command(whole), env=environment, stdout=subprocess.DEVNULL, check=True)
        each = (time.monotonic() - began) / len(statuses(whole))
        after = []
        for number in range(options.kills):
            started = time.time()
            process = subprocess.Popen(
                command(killed),
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            while process.poll() is None and not written_since(killed, started):
                time.sleep(0.1)
            time.sleep(rng.uniform(0, 2) * each)
            still = process.poll() is None
            (os.killpg if number % 2 else os.kill)(process.pid, signal.SIGKILL) if still else None
            process.wait()
            after.append({"killed": still, "done": statuses(killed).count("done")})
        last = subprocess.run(command(killed), env=environment, capture_output=True, text=True, check=False)
        finished = {log.stem: log.read_text().count(": done") for log in (killed / "logs").glob("*.txt")}
        found = {
            "runs": len(statuses(whole)),
            "kills": sum(step["killed"] for step in after),
            "done after each kill": [step["done"] for step in after],
            "exit status": last.returncode,
            "lost": statuses(whole).count("done") - statuses(killed).count("done"),
            "repeated": sum(times > 1 for times in finished.values()),
            "tables equal": (whole / "table.csv").read_bytes() == (killed / "table.csv").read_bytes(),
        }
    print(json.dumps(found, indent=1))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
