"""`highrank eval RUN... --engine lm_eval`: runs scored by EleutherAI's lm-evaluation-harness (extra `eval`)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning

from highrank.base.errors import UserError
from highrank.interop.loaded import on_shared_bases
from highrank.model.language import padding_moves
from highrank.train.devices import alone, quiet
from highrank.train.effect import check_decoding
from highrank.train.saved import read_run


def evaluate_runs(
    folders: Sequence[Path | str],
    tasks: Sequence[str],
    limit: int | None = None,
    include: Path | str | None = None,
    words: Sequence[str] = (),
) -> dict[str, Any]:
    """Returns the harness's results per run directory and task, in its own units (shares, not percent).

    The harness brings its own prompts, few-shot examples and decoding; of the run it takes model and adapter. `limit` is
    the number of examples per task, `include` a folder with task files of one's own.

    Raises:
        UserError: for a run on a task that is no text to write, without the extra, for an unknown task, or if an adapter's
            decoding with the cache is wrong.
    """
    for folder in folders:
        task = read_run(folder, words).make_task()
        if task.kind != "generate":
            raise UserError(
                f"eval: --engine lm_eval asks models that write texts, got task={task.name} ({task.kind}) in {folder}; leave "
                "--engine out"
            )
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(
            f"eval: --engine lm_eval needs lm-evaluation-harness, got {error}; pip install 'highrank[eval]'"
        ) from error
    manager = TaskManager(include_path=None if include is None else str(include))
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise UserError(f"eval: unknown task of the harness, got {', '.join(unknown)}; its names: lm-eval ls tasks")
    by_run = {}
    for folder, run, backbone, adapters in on_shared_bases(folders, words):
        with quiet():
            trainer = lightning.Trainer(**alone(run.trainer), logger=False, enable_checkpointing=False)
        backbone.model.to(trainer.strategy.root_device)
        check_decoding(adapters, backbone.tokenizer("One, two, three").input_ids)
        one_by_one = adapters.num_positions > 0 or padding_moves(backbone.model)  # the harness pads what it has written
        batch_size = 1 if one_by_one else run.core.eval_batch_size
        model = HFLM(pretrained=backbone.model, tokenizer=backbone.tokenizer, batch_size=batch_size)
        results: Any = simple_evaluate(
            model=model,
            tasks=list(tasks),
            limit=limit,
            task_manager=manager,
            bootstrap_iters=0,
            random_seed=run.core.seed,
            log_samples=False,
        )
        by_run[str(folder)] = results["results"]
    return by_run
