"""Training: from the newest checkpoint to the last step, in parts of a batch where memory does not hold it whole."""

import lightning
from lightning.pytorch.utilities.memory import garbage_collection_cuda

from highrank.base.console import say
from highrank.config.run_config import Run
from highrank.data.batches import TrainingData
from highrank.train.checkpoint import Checkpoints
from highrank.train.memory import out_of_memory
from highrank.train.module import FineTuner
from highrank.train.results import RunDirectory
from highrank.train.stopping import Interrupted, StopOnSignal
from highrank.train.trainer import make_trainer


def fit(
    trainer: lightning.Trainer,
    run: Run,
    directory: RunDirectory,
    module: FineTuner,
    data: TrainingData,
    checkpoints: Checkpoints,
    stop: StopOnSignal,
) -> lightning.Trainer:
    """Trains to the end, or to a signal; returns the Trainer that got there.

    With auto_microbatch, where memory ran out, training goes on from the newest checkpoint with batches in twice as many
    parts.
    """
    while not _fits(trainer, module, data, checkpoints):
        module.parts *= 2
        directory.write(parts=module.parts)
        checkpoints.find()
        tell(directory, checkpoints)
        trainer = make_trainer(run, directory, stop, module.total_steps, len(data.buckets), checkpoints)
        garbage_collection_cuda()
    return trainer


def _fits(trainer: lightning.Trainer, module: FineTuner, data: TrainingData, checkpoints: Checkpoints) -> bool:
    """Trains; False if memory ran out and the batches can be cut further."""
    module.train()
    try:
        trainer.fit(
            module,
            train_dataloaders=data.train_dataloader(),
            val_dataloaders=data.val_dataloader() if data.validation else None,
            ckpt_path=checkpoints.resume_from and checkpoints.resume_from.path,
            weights_only=True,
        )
    except Interrupted:  # saved; the caller looks for the signal
        return True
    except Exception as error:
        alone = module.core.auto_microbatch and trainer.world_size == 1
        if not (alone and out_of_memory(error) and 2 * module.parts <= module.core.batch_size):
            raise
        return False
    return True


def tell(directory: RunDirectory, checkpoints: Checkpoints) -> None:
    """Says, and writes down, which checkpoint training goes on from."""
    if checkpoints.resume_from:
        directory.write(resumed=[*directory.results.get("resumed", []), checkpoints.resume_from.told])
        say(checkpoints.resume_from.told)
