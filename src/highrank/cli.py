"""The command line: `python run.py key=value ...`, and `highrank <command>`."""

import importlib
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from highrank.base.errors import UserError, described, refused_by_disk, suggest

if TYPE_CHECKING:
    from highrank.train.ready import Ready

USAGE = """\
highrank: parameter-efficient fine-tuning methods, each in one file, compared fairly

  python run.py [key=value ...]        train, evaluate before and after, write a run directory
  python run.py -m key=a,b ...         a sweep: every combination, each run in its own process; start it again to go on
  highrank run [-m] [key=value ...]    the same from anywhere
  highrank methods [NAME]              the methods; of one its formula, fields, paper and count; so too
  highrank tasks | models | protocols | experiments [NAME]
  highrank runs [FOLDER] [--where key=value]        the runs in a folder: status, method, score, time, size, age
  highrank show RUN [--against RUN]    what a run was and what came out; what differs from another
  highrank watch RUN|SWEEP             how far it is, live
  highrank merge RUN --out DIR         a plain model folder with the adapter merged in
  highrank export RUN --format peft --out DIR       the adapter as Hugging Face PEFT loads it
  highrank export RUN --format lora --rank R --out DIR    its update as a LoRA, for vLLM, SGLang; --format merged: merge
  highrank combine RUN=0.7 RUN=0.3 --how ties --out DIR   a weighted sum of updates of one base, merged or as a LoRA
  highrank push RUN --to USER/NAME     the adapter on the Hugging Face Hub, private; read back as hf:USER/NAME; --format merged
  highrank import DIR --out RUN        a run directory of a PEFT adapter
  highrank eval RUN... [task=...]      evaluate finished runs again, or on another task; --engine lm_eval --tasks a,b
  highrank report SWEEP                tables with intervals, figures, one page to send around
  highrank analyze RUN... [--full RUN] ranks, energy and spectra of what training changed, tables and figures
  highrank doctor                      versions, devices, caches, network, write access: each with the fix
  highrank new method|task NAME        a package of your own: one file, its entry point and its test
  highrank check NAME                  whether a method or task, a plugin of yours above all, keeps its contract
  highrank completion bash|zsh|fish    a script that completes commands, keys, values and run folders

examples
  python run.py method=hira placement=fc_qkv r=16
  python run.py method=hyperadapt model=phi4 placement=all dry_run=true

core keys
"""
COMMANDS = {
    "run": "highrank.cli:run",
    "methods": "highrank.find.catalogue:methods",
    "tasks": "highrank.find.catalogue:tasks",
    "models": "highrank.find.catalogue:models",
    "protocols": "highrank.find.catalogue:protocols",
    "experiments": "highrank.find.catalogue:experiments",
    "runs": "highrank.find.runs:command",
    "show": "highrank.find.show:command",
    "watch": "highrank.find.watch:command",
    "doctor": "highrank.find.doctor:command",
    "check": "highrank.testing:command",
    "new": "highrank.scaffold:command",
    "completion": "highrank.find.completion:command",
    "merge": "highrank.interop.commands:merge",
    "export": "highrank.interop.commands:export",
    "combine": "highrank.interop.commands:combine",
    "push": "highrank.interop.commands:push",
    "import": "highrank.interop.commands:import_",
    "eval": "highrank.interop.commands:evaluate",
    "analyze": "highrank.analysis.analyze:command",
    "report": "highrank.report.page:command",
}
"""The function of each command, imported when it is called: help stays instant. Completion reads this table from the file."""
ENVIRONMENT = {
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_WAIT_POLICY": "passive",  # a thread that waits leaves its core to whoever else computes on this machine
    **dict.fromkeys(("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS", "TQDM_DISABLE"), "1"),
}
"""What a run tells other libraries, before they are imported and unless it is set: their bars would break up its own."""


def main(arguments: Sequence[str] | None = None, ready: "Ready | None" = None) -> int:
    """Runs one command; returns 0, 1 for a run that diverged, 2 for bad input, 130 after Ctrl-C, 141 if nobody reads on, 143 after SIGTERM.

    `ready` is for the command `run` in a worker of a sweep, which has loaded what its runs share.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if not words or words[0] == "help" or any(word in ("-h", "--help") for word in words):
            return _flushed(show_help())
        if words[0] not in COMMANDS:
            raise UserError(f"highrank: unknown command, got {words[0]}{suggest(words[0], COMMANDS)}")
        module, function = COMMANDS[words[0]].split(":")
        given = (words[1:],) if ready is None else (words[1:], ready)
        return _flushed(int(getattr(importlib.import_module(module), function)(*given)))
    except BrokenPipeError:  # as in `highrank help | head`: nor shall Python write what is left when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    except Exception as error:
        if not refused_by_disk(error):
            raise
        fix = "make room, or choose another folder"
        print(
            f"error: {words[0]}: its files must be readable and writable, got {described(error)}; {fix}",
            file=sys.stderr,
        )
        return 2


def _flushed(status: int) -> int:
    sys.stdout.flush()
    return status


def show_help() -> int:
    import ast
    import inspect
    from itertools import pairwise

    from highrank.config import run_config

    print(USAGE, end="")
    (definition,) = ast.parse(inspect.getsource(run_config.RunConfig)).body
    for field, doc in pairwise(getattr(definition, "body", [])):
        if isinstance(field, ast.AnnAssign) and isinstance(doc, ast.Expr):
            print(f"  {ast.unparse(field.target):16} {ast.literal_eval(doc.value)}")
    return 0


def run(words: list[str], ready: "Ready | None" = None) -> int:
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    if any(word in ("-m", "--multirun") for word in words):
        from highrank.sweep.sweep import Sweep

        sweep = Sweep([word for word in words if word not in ("-m", "--multirun")], main)
        status = sweep.execute()
        print(sweep.folder)
        return status
    from highrank.base.allocator import not_collecting

    with not_collecting():
        from highrank.config.words import compose_run

        checked = compose_run(words)
        if checked.core.dry_run:
            from highrank.train.shown import dry_run

            print(dry_run(checked))
            return 0
        from highrank.base.console import silent_unless
        from highrank.run import execute
        from highrank.train.devices import share_of

    with silent_unless(share_of(checked.trainer).rank == 0):  # of several processes one speaks
        folder, status = execute(checked, ready)
        print(folder)
    return status


def run_script() -> int:
    """Entry of run.py: all words are for `highrank run`."""
    return main(["run", *sys.argv[1:]])
