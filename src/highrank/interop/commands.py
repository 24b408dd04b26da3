"""The commands `highrank merge`, `export`, `combine`, `push`, `import` and `eval`: words to options, results to stdout."""

import json
import os
from typing import Any

from highrank.base.console import result_alone
from highrank.base.hub import fetched
from highrank.base.options import Words

RUN_WORDS = "[task=... protocol=... path=...]"
FORMATS = ("merged", "lora")
"""How an update is written that is rounded, or approximated."""


def merge(words: list[str]) -> int:
    parser = Words("merge", f"RUN --out DIR [--dtype float32|bfloat16|float16] [--accept] {RUN_WORDS}")
    parser.add_argument("--out", required=True)
    parser.add_argument("--dtype")
    parser.add_argument("--accept", "--force", action="store_true")
    options, run, rest = parser.one(words)
    from highrank.interop.hub_model import merge_run

    with result_alone():
        done = merge_run(fetched("merge", run), options.out, options.dtype, options.accept, rest)
    print(done)
    return 0


def export(words: list[str]) -> int:
    usage = "RUN --format peft|lora|merged --out DIR [lora: --rank R] [merged: --dtype float32|bfloat16|float16]"
    parser = Words("export", f"{usage} [--accept] {RUN_WORDS}")
    parser.add_argument("--format", choices=["peft", *FORMATS], required=True)
    parser.add_argument("--out", required=True)
    _add_lossy(parser)
    options, run, rest = parser.one(words)
    _check_lossy(parser, options)
    if options.format == "peft" and options.accept:
        parser.error("--accept belongs to --format lora or merged, which lose something, got --format peft")
    with result_alone():
        folder = fetched("export", run)
        if options.format == "merged":
            from highrank.interop.hub_model import merge_run

            done = merge_run(folder, options.out, options.dtype, options.accept, rest)
        elif options.format == "lora":
            from highrank.interop.lora import export_lora

            done = export_lora(folder, options.out, options.rank, options.accept, rest)
        else:
            from highrank.interop.peft import export_run

            done = export_run(folder, options.out, rest)
    print(done)
    return 0


def _add_lossy(parser: Words) -> None:
    parser.add_argument("--rank", type=int)
    parser.add_argument("--dtype")
    parser.add_argument("--accept", action="store_true")


def _check_lossy(parser: Words, options: Any) -> None:
    for option, owner in (("rank", "lora"), ("dtype", "merged")):
        if getattr(options, option) is not None and options.format != owner:
            parser.error(f"--{option} belongs to --format {owner}, got --format {options.format}")
    if options.format == "lora" and options.rank is None:
        parser.error("--format lora needs --rank, got none")


def combine(words: list[str]) -> int:
    usage = "RUN=0.7 RUN=0.3 --how linear|ties|dare --out DIR [--density SHARE] [--seed N]"
    parser = Words("combine", f"{usage} [--format merged|lora] [--rank R] [--dtype ...] [--accept] {RUN_WORDS}")
    parser.add_argument("--how", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--density", type=float)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--format", choices=FORMATS, default="merged")
    _add_lossy(parser)
    parser.add_argument("given", nargs="*")
    options = parser.parse_intermixed_args(words)
    _check_lossy(parser, options)
    from highrank.interop.combine import Recipe, combine_runs, terms_and_words

    with result_alone():
        terms, rest = terms_and_words(options.given)
        recipe = Recipe(options.how, terms, options.density, options.seed)
        done = combine_runs(recipe, options.out, options.rank, options.dtype, options.accept, rest)
    print(done)
    return 0


def push(words: list[str]) -> int:
    usage = "RUN --to USER/NAME [--format adapter|merged] [--public] [--revision BRANCH] [--message TEXT] [--dry-run]"
    parser = Words("push", f"{usage} [merged: --dtype float32|bfloat16|float16] [--accept] {RUN_WORDS}")
    parser.add_argument("--to", required=True)
    parser.add_argument("--format", choices=("adapter", "merged"), default="adapter")
    parser.add_argument("--public", action="store_true")
    parser.add_argument("--revision")
    parser.add_argument("--message")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--dtype")
    parser.add_argument("--accept", action="store_true")
    options, folder, rest = parser.one(words)
    for option in ("dtype", "accept"):
        if getattr(options, option) and options.format != "merged":
            parser.error(f"--{option} belongs to --format merged, got --format {options.format}")
    from highrank.interop.push import Destination, push_run

    with result_alone():
        to = Destination(options.to, options.public, options.revision, options.message)
        if options.format == "merged":
            done = push_run(folder, to, rest, options.dry_run, merged=True, dtype=options.dtype, accept=options.accept)
        else:
            done = push_run(folder, to, rest, options.dry_run)
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
            runs = [fetched("eval", folder) for folder in folders]
            results = with_harness(runs, options.tasks.split(","), options.limit, options.include, rest)
    else:
        others = [f"--{name}" for name in ("tasks", "limit", "include") if getattr(options, name) is not None]
        if others:
            parser.error(f"{others[0]} belongs to --engine lm_eval, got --engine highrank")
        from highrank.interop.loaded import evaluate_runs

        with result_alone():
            results = evaluate_runs([fetched("eval", folder) for folder in folders], rest)
    print(json.dumps(next(iter(results.values())) if len(results) == 1 else results, indent=1))
    return 0
