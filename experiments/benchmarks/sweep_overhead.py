"""What a sweep costs beside the training and the last evaluation of its runs.

    python experiments/benchmarks/sweep_overhead.py method=hira,lora,dora,hyperadapt r=8,16 seed=0,1,2 --json out.json

The sweep runs in a folder of its own, in processes as always; words of `run.py -m` are handed on (jobs=1 unless given).
Its wall time, from the command to its end, stands over the sum of what its runs say of themselves. "Processes and the
rest" is what no run counts: starting them, imports, planning, writing tables.
"""

from collections.abc import Sequence

from common import arguments, environment, run_py, show_environment, show_table, write_json

PARTS = {
    "setup_s": "model and data",
    "eval_before_s": "evaluation before",
    "train_s": "training",
    "eval_final_s": "evaluation after",
}


def main(words: Sequence[str] | None = None) -> None:
    args, sweep_words = arguments(__doc__, rounds=None, device=False).parse_known_args(words)
    env = environment("cpu")
    show_environment("sweep overhead", env)
    wall, runs = run_py(["-m", *sweep_words])
    seconds = {part: sum(run["time"].get(part, 0.0) for run in runs) for part in PARTS}
    seconds["rest_s"] = wall - sum(seconds.values())
    over = wall / (seconds["train_s"] + seconds["eval_final_s"])
    reused = sum(bool(run.get("base_reused")) for run in runs)
    rows = [[name, f"{seconds[part]:.1f} s", f"{seconds[part] / wall:.1%}"] for part, name in PARTS.items()]
    rows.append(["processes and the rest", f"{seconds['rest_s']:.1f} s", f"{seconds['rest_s'] / wall:.1%}"])
    show_table([f"{len(runs)} runs", "seconds", "of the sweep"], rows)
    print(f"\n{wall:.1f} s in all: {over:.2f} x training and evaluation after; {reused} runs read the base's answers")
    results = {"runs": len(runs), "wall_s": wall, "seconds": seconds, "over": over, "base_reused": reused}
    write_json(args, "sweep_overhead", env, results)


if __name__ == "__main__":
    main()
