"""What a training step costs under other allocators of the C library: seconds, and the process's peak memory.

    python experiments/benchmarks/allocator.py --preload /usr/lib/x86_64-linux-gnu/libtcmalloc_minimal.so.4 --json out.json

Sides are fresh processes that take turns: glibc as `highrank run` sets it (freed blocks are kept), glibc that gets blocks above
1 MiB or 256 KiB anew from the kernel each time, and each library given to `--preload`. A step is forward and backward of a
batch of random tokens, the second half of each row supervised; words of `run.py` name another method or model.
"""

import argparse
import ctypes
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from common import arguments, environment, random_batch, run_words, show_environment, show_table, summary, write_json

from highrank.base.allocator import keep_freed_memory
from highrank.config.words import compose_run
from highrank.train.build import build_model
from highrank.train.loss import language_model_loss
from highrank.train.results import peak_memory

M_MMAP_THRESHOLD, M_MMAP_MAX = -3, -4
SIDES = {"kept": None, "above 1 MiB anew": 2**20, "above 256 KiB anew": 2**18}
"""glibc's sides, with the bytes from which a block is mapped by itself; None: never."""


def step(args: argparse.Namespace, given: Sequence[str]) -> dict[str, float]:
    """Returns this process's median seconds per step and its peak memory in bytes, under the side that it was started as."""
    if args.side not in SIDES and args.side.split(".so")[0] not in Path("/proc/self/maps").read_text():
        sys.exit(f"allocator: --preload names a library that can be loaded, got {args.side}")
    threshold = SIDES.get(args.side)
    if threshold is None:
        keep_freed_memory()
    else:
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, threshold)
        libc.mallopt(M_MMAP_MAX, 10**6)
    run = compose_run(given)
    model = build_model(run, run.make_task())[0].model.train()
    batch = random_batch(args, model.config.vocab_size)
    seconds = []
    for _ in range(args.steps + 1):
        start = time.process_time()
        language_model_loss(model, **batch)[0].backward()
        seconds.append(time.process_time() - start)
    return {"seconds": summary(seconds[1:])["median"], "peak": peak_memory()["peak_resident_bytes"]}


def main(words: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__, rounds=3, device=False)
    parser.add_argument(
        "--preload", action="append", default=[], help="a library to preload; may be given several times"
    )
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--sequence", type=int, default=110)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.set_defaults(device="cpu")
    args, given = parser.parse_known_args(words)
    given = run_words(given, {"method": "lora", "model.dtype": "float32"})
    if args.side is not None:
        print(json.dumps(step(args, given)))
        return
    env = environment("cpu")
    show_environment("allocator", env)
    libraries = {Path(file).name: file for file in args.preload}
    found: dict[str, list[dict[str, float]]] = {side: [] for side in (*SIDES, *libraries)}
    own = [*(f"--{key}={getattr(args, key)}" for key in ("batch", "sequence", "steps")), *given]
    for number in range(args.rounds):
        for side in random.Random(number).sample(list(found), len(found)):
            with_library = {"LD_PRELOAD": libraries[side]} if side in libraries else {}
            command = [sys.executable, __file__, f"--side={side}", *own]
            done = subprocess.run(
                command, env={**os.environ, **with_library}, stdout=subprocess.PIPE, text=True, check=True
            )
            found[side].append(json.loads(done.stdout.splitlines()[-1]))
    args.preload = list(libraries)
    rows = []
    for side, of in found.items():
        ratios = summary([mine["seconds"] / kept["seconds"] for mine, kept in zip(of, found["kept"], strict=True)])
        rows.append({"side": side, "over_kept": ratios, "peak": summary([each["peak"] for each in of])})
    table = [[r["side"], f"{r['over_kept']['median']:.2f}", f"{r['peak']['median'] / 2**30:.2f}"] for r in rows]
    show_table(["side", "step over kept", "peak GiB"], table)
    write_json(args, "allocator", env, rows)


if __name__ == "__main__":
    main()
