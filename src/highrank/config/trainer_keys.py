"""Which arguments of the Lightning Trainer a run takes."""

from collections.abc import Mapping
from typing import Any

from highrank.base.errors import UserError, suggest

OWN_TRAINER_KEYS = {
    "max_steps": "use max_steps",
    "max_epochs": "use epochs",
    "accumulate_grad_batches": "use accumulate",
    "gradient_clip_val": "use max_grad_norm",
    "logger": "use logger=tensorboard|csv|wandb|mlflow",
    "callbacks": "a run's callbacks come from its keys; use patience or protocol.selection",
    "enable_checkpointing": "a run keeps its last checkpoint in the run directory; use output",
    "log_every_n_steps": "every step is logged, so leave it out",
    "enable_model_summary": "use dry_run=true to see what would be trained",
    "num_sanity_val_steps": "the untrained model is evaluated with eval_before=true",
    "enable_progress_bar": "a run shows a bar on a terminal and prints lines elsewhere, so leave it out",
    "fast_dev_run": "use max_steps=1 and a small task.n_train",
    "limit_predict_batches": "every test example is scored, so leave it out; where a task has n_test, use task.n_test",
    "barebones": "a run records its steps and times, so leave it out",
    "val_check_interval": "use protocol.validate_every",
    "check_val_every_n_epoch": "use protocol.validate_every",
    "inference_mode": "adapters see base weights as they are in evaluation, so leave it out",
    "use_distributed_sampler": "batches are drawn by the run's own seeded sampler, so leave it out",
}
"""Arguments of the Lightning Trainer that the run itself decides, with what to use instead."""


TRAINER_KEYS = [
    "accelerator",
    "strategy",
    "devices",
    "num_nodes",
    "precision",
    "min_epochs",
    "min_steps",
    "max_time",
    "limit_train_batches",
    "limit_val_batches",
    "limit_test_batches",
    "overfit_batches",
    "gradient_clip_algorithm",
    "deterministic",
    "benchmark",
    "profiler",
    "detect_anomaly",
    "plugins",
    "sync_batchnorm",
    "reload_dataloaders_every_n_epochs",
    "default_root_dir",
    "enable_autolog_hparams",
    "model_registry",
]
"""The other arguments of lightning.Trainer, by name, because importing Lightning takes seconds; a test compares them."""


PRECISIONS = ("32-true", "32", "16-mixed", "bf16-mixed")
STRATEGIES = ("auto", "ddp", "fsdp")
"""fsdp is FSDP2, through Lightning's ModelParallelStrategy."""


def check_trainer_keys(trainer: Mapping[str, Any]) -> None:
    for key, value in trainer.items():
        if key in OWN_TRAINER_KEYS:
            raise UserError(f"trainer: {key} is set by the run, got trainer.{key}={value}; {OWN_TRAINER_KEYS[key]}")
        if key not in TRAINER_KEYS:
            raise UserError(f"trainer: unknown key, got trainer.{key}{suggest(key, TRAINER_KEYS)}")
    strategy = trainer.get("strategy", "auto")
    if strategy not in STRATEGIES:
        raise UserError(f"trainer: strategy is one of {', '.join(STRATEGIES)}, got trainer.strategy={strategy}")
    precision = str(trainer.get("precision", "32-true"))
    if precision not in PRECISIONS:
        fix = "; use model.dtype for the type of the weights" if precision.endswith("-true") else ""
        raise UserError(f"trainer: precision is one of {', '.join(PRECISIONS)}, got trainer.precision={precision}{fix}")
