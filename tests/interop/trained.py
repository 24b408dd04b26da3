"""Run directories as training leaves them, with every trained tensor moved from its start, made without training."""

import torch
from moved import move

from highrank.config.words import compose_run
from highrank.train.build import build_model
from highrank.train.results import RunDirectory

SMALL = ["task.n_train=8", "task.n_test=3", "batch_size=2", "protocol.max_new_tokens=4"]
IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [50, 60, 70, 80, 90, 100]])


@torch.no_grad()
def logits(model):
    """Logits (2, 6, V) of two sequences; a PEFT model's virtual tokens are left out."""
    return model.eval()(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits[:, -6:]


def write_run(folder, *words, scale=0.05):
    """Returns a run directory, and its model with the adapter acting."""
    own = [] if any(word.startswith("task=") for word in words) else SMALL
    run = compose_run([*own, f"run_dir={folder}", *words])
    backbone, adapters = build_model(run, run.make_task())
    move(adapters, scale, seed=5)
    directory = RunDirectory(run)
    directory.open()
    adapters.save(folder / "adapter")
    directory.write(status="done", model={"name": run.model["name"], **vars(backbone.source)})
    return folder, backbone.model.eval()
