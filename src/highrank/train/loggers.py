"""Where the numbers of every step go: Lightning's loggers, each set up so that a resumed run goes on in what it began.

    tensorboard   events in the run directory
    csv           csv/metrics.csv in the run directory, a row per step
    wandb         a run of the project WANDB_PROJECT (highrank); WANDB_MODE=offline keeps it in the run directory
    mlflow        a run of the experiment MLFLOW_EXPERIMENT_NAME (highrank) at MLFLOW_TRACKING_URI; default: mlruns in the run
                  directory

Figures and the HPARAMS table are TensorBoard's alone, and lie in the run directory whatever the logger.
"""

import csv
import importlib.util
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from highrank.base.console import say
from highrank.base.errors import UserError, described, refused_by_disk
from highrank.config.run_config import Run, RunConfig
from highrank.train.results import RunDirectory

FLUSHED_S = 10
"""After how many seconds what a run logs is on disk, where `highrank watch` and TensorBoard see it."""
REMOTE = {"wandb": 'pip install "highrank[wandb]"', "mlflow": 'pip install "highrank[mlflow]"'}
"""Loggers that are packages of their own and keep runs under numbers of their own, and how to get them."""


def check_logger(core: RunConfig) -> None:
    """Raises UserError if the logger's package is not installed."""
    if core.logger in REMOTE and importlib.util.find_spec(core.logger) is None:
        raise UserError(f"run: {core.logger} is an extra, got logger={core.logger}; {REMOTE[core.logger]}")


def make_logger(run: Run, directory: RunDirectory, start: int) -> Any:
    """Returns the run's logger, open, to go on after the optimizer step `start`.

    Raises:
        UserError: if it cannot be opened: no key, no server.
    """
    kind = run.core.logger
    try:
        logger = MAKE[kind](run, directory, start)
        if kind in REMOTE and directory.writes:
            _ = logger.experiment  # opens it
            directory.write(logged={"to": kind, "id": logger.version})
    except Exception as error:
        if refused_by_disk(error) or kind not in REMOTE:
            raise
        raise UserError(
            f"run: the logger must open, got {described(error)} for logger={kind}; {OFFLINE[kind]}, or use "
            "logger=tensorboard"
        ) from error
    return logger


def finish(logger: Any, directory: RunDirectory, values: Mapping[str, float]) -> None:
    """Gives final metrics and costs to a logger that keeps runs of its own, and closes the run there.

    What fails is said and ends nothing: the run directory has it all.
    """
    kind = directory.run.core.logger
    if kind not in REMOTE or not directory.opened:
        return
    done = directory.results["status"] == "done"
    try:
        logger.log_metrics(dict(values), directory.results.get("steps"))
        logger.finalize("success" if done else "failed")
        if kind == "wandb":
            logger.experiment.finish(exit_code=int(not done))
    except Exception as error:
        say(f"warning: {kind} lacks the final metrics, which results.json has: {described(error)}")


def _tensorboard(run: Run, directory: RunDirectory, start: int) -> Any:
    from lightning.pytorch.loggers import TensorBoardLogger

    return TensorBoardLogger(
        directory.path, name="", version="", default_hp_metric=False, purge_step=start, flush_secs=FLUSHED_S
    )


def _csv(run: Run, directory: RunDirectory, start: int) -> Any:
    from lightning.pytorch.loggers import CSVLogger

    logger = CSVLogger(directory.path, name="", version="csv", flush_logs_every_n_steps=1)
    if directory.writes:
        rows = _rows_before(start, directory.path / "csv" / "metrics.csv")
        shutil.rmtree(directory.path / "csv", ignore_errors=True)  # Lightning's begins with an empty folder
        logger.experiment.metrics = rows
        logger.save()
    return logger


def _rows_before(start: int, file: Path) -> list[dict[str, Any]]:
    """Returns the rows of the steps before `start` that an earlier try has written."""
    if not file.is_file():
        return []
    with open(file, newline="") as lines:
        return [row for row in csv.DictReader(lines) if row["step"].isdigit() and int(row["step"]) < start]


def _wandb(run: Run, directory: RunDirectory, start: int) -> Any:
    import wandb
    from lightning.pytorch.loggers import WandbLogger

    known = _known(directory)
    return WandbLogger(
        name=directory.path.name,
        save_dir=directory.path,
        project=os.environ.get("WANDB_PROJECT", "highrank"),
        version=known,
        experiment=wandb.run if wandb.run is not None and wandb.run.id == known else None,
        settings={"console": "off"},
    )


def _mlflow(run: Run, directory: RunDirectory, start: int) -> Any:
    from lightning.pytorch.loggers import MLFlowLogger

    server = os.environ.get("MLFLOW_TRACKING_URI")
    if not server:
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # a database in each run directory would be worse
    return MLFlowLogger(
        experiment_name=os.environ.get("MLFLOW_EXPERIMENT_NAME", "highrank"),
        run_name=directory.path.name,
        tracking_uri=server or (directory.path.resolve() / "mlruns").as_uri(),
        run_id=_known(directory),
    )


def _known(directory: RunDirectory) -> str | None:
    """Returns the number under which an earlier try of the run was logged at the same place, if it was."""
    logged = directory.results.get("logged", {})
    return logged.get("id") if logged.get("to") == directory.run.core.logger else None


MAKE = {"tensorboard": _tensorboard, "csv": _csv, "wandb": _wandb, "mlflow": _mlflow}
OFFLINE = {
    "wandb": "wandb login, or WANDB_MODE=offline",
    "mlflow": "start the server that MLFLOW_TRACKING_URI names, or unset it",
}
