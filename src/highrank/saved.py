"""What can be done with a finished run: rebuild its model, evaluate it again, write it out merged."""

import json
from pathlib import Path

import lightning
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from highrank.adapters import Adapters
from highrank.allocator import keep_freed_memory
from highrank.backbones import Backbone
from highrank.config import Run, build, register_configs
from highrank.data import TaskData
from highrank.errors import UserError
from highrank.module import FineTuner
from highrank.results import read_results
from highrank.run import build_model, evaluate, quiet


def read_run(folder: Path | str) -> Run:
    """Returns the checked run whose directory this is.

    Raises:
        UserError: if the folder holds no config, or no saved adapter.
    """
    folder = Path(folder)
    for needed in ("config.yaml", "adapter/adapter.json"):
        if not (folder / needed).is_file():
            raise UserError(f"run: a run directory holds {needed}, got {folder}; has the run finished training?")
    register_configs()
    try:
        config = OmegaConf.load(folder / "config.yaml")
    except (OSError, YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"run: config.yaml is damaged, got {str(error).splitlines()[0]} in {folder}") from error
    return build(config)


def load_run(folder: Path | str) -> tuple[Run, Backbone, Adapters]:
    """Returns the run, its backbone and its adapters with their trained values."""
    run = read_run(folder)
    backbone, adapters = build_model(run, run.task(run.task_cfg, run.core.seed))
    recorded = read_results(Path(folder))["model"]["sha"]
    if backbone.source.sha != recorded:
        raise UserError(
            f"run: the base must be the one trained on, got sha={backbone.source.sha} from {backbone.source.kind} "
            f"instead of {recorded}; give the right folder with path=<folder> in {folder}/config.yaml"
        )
    adapters.load(Path(folder) / "adapter")
    return run, backbone, adapters


def merge_run(folder: Path | str, out: Path | str) -> Path:
    """Writes base and adapter as one plain model folder, which any Hugging Face tool loads; returns it.

    Raises:
        UserError: if `out` exists and is not empty.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"merge: the output folder must be new or empty, got --out {out}")
    _, backbone, adapters = load_run(folder)
    adapters.merge()
    adapters.unload().save_pretrained(out)  # type: ignore[operator]
    backbone.tokenizer.save_pretrained(out)
    return out


def evaluate_run(folder: Path | str) -> str:
    """Evaluates a finished run again with its saved adapter; returns the metrics as JSON."""
    run, backbone, adapters = load_run(folder)
    task, core = run.task(run.task_cfg, run.core.seed), run.core
    data = TaskData(task, run.protocol, backbone.tokenizer, core.batch_size, core.eval_batch_size, core.seed)
    module = FineTuner(adapters, task, backbone.tokenizer, core, 1, run.protocol)
    keep_freed_memory()
    with quiet():
        trainer = lightning.Trainer(**run.trainer, logger=False, enable_checkpointing=False)
        module.eval()
        return json.dumps(evaluate(trainer, module, data, lambda name, rows: None), indent=1)
