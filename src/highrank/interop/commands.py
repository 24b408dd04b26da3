"""The commands `highrank merge`, `export`, `import` and `eval`: words to options, results to stdout."""

import json
import os

from highrank.base.console import result_alone
from highrank.base.options import Words

RUN_WORDS = "[task=... protocol=... path=...]"


def merge(words: list[str]) -> int:
    parser = Words("merge", f"RUN --out DIR [--dtype float32|bfloat16|float16] [--force] {RUN_WORDS}")
    parser.add_argument("--out", required=True)
    parser.add_argument("--dtype")
    parser.add_argument("--force", action="store_true")
    options, folder, rest = parser.one(words)
    from highrank.interop.hub_model import merge_run

    with result_alone():
        done = merge_run(folder, options.out, options.dtype, options.force, rest)
    print(done)
    return 0


def export(words: list[str]) -> int:
    parser = Words("export", f"RUN --format peft --out DIR {RUN_WORDS}")
    parser.add_argument("--format", choices=["peft"], required=True)
    parser.add_argument("--out", required=True)
    options, folder, rest = parser.one(words)
    from highrank.interop.peft import export_run

    with result_alone():
        done = export_run(folder, options.out, rest)
    print(done)
    return 0


def import_(words: list[str]) -> int:
    parser = Words("import", "DIR --out RUN [model=... task=... key=value ...]")
    parser.add_argument("--out", required=True)
    options, folder, rest = parser.one(words)
    from highrank.interop.peft import import_adapter

    with result_alone():
        done = import_adapter(folder, options.out, rest)
    print(done)
    return 0


def evaluate(words: list[str]) -> int:
    parser = Words("eval", f"RUN... {RUN_WORDS} [--engine lm_eval --tasks a,b [--limit N] [--include DIR]]")
    parser.add_argument("--engine", choices=["highrank", "lm_eval"], default="highrank")
    parser.add_argument("--tasks")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--include")
    options, folders, rest = parser.split(words)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if options.engine == "lm_eval":
        if not options.tasks:
            parser.error("--engine lm_eval needs --tasks, got none")
        from highrank.interop.lm_eval import evaluate_runs as with_harness

        with result_alone():
            results = with_harness(folders, options.tasks.split(","), options.limit, options.include, rest)
    else:
        others = [f"--{name}" for name in ("tasks", "limit", "include") if getattr(options, name) is not None]
        if others:
            parser.error(f"{others[0]} belongs to --engine lm_eval, got --engine highrank")
        from highrank.interop.loaded import evaluate_runs

        with result_alone():
            results = evaluate_runs(folders, rest)
    print(json.dumps(next(iter(results.values())) if len(results) == 1 else results, indent=1))
    return 0
