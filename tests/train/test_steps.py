"""A step is the mean over its targets, however it is cut: the same adapter to 1e-6, which with plain SGD is the gradient."""

import json
import os
import random

import pytest
import torch
from safetensors.torch import load_file

from highrank.cli import main

pytestmark = pytest.mark.integration

PLAIN = ["optimizer=sgd", "lr=0.05", "schedule=constant", "max_grad_norm=0", "eval_test=false", "warmup_ratio=0"]
CUTS = {
    "2 x 4": ["batch_size=2", "accumulate=4"],
    "1 x 8": ["batch_size=1", "accumulate=8"],
    "two processes of 4": ["batch_size=4", "trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"],
}
needs_two_cores = pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two processes need two cores")


def rows(kind):
    """13 rows: the last step has five of eight, and an answer has 1 to 40 words."""
    draw = random.Random(0)
    for i in range(13):
        words = " ".join(draw.choice("abcdefg") for _ in range(1 if i % 3 else 40))
        label = draw.choice(["yes", "no"]) if kind == "classify" else draw.random()
        yield {"instruction": f"say {i}", "output": words} if kind == "generate" else {"text": words, "label": label}


@pytest.fixture(params=["generate", "classify", "regress"])
def words(request, tmp_path):
    kind, files = request.param, []
    if kind != "generate":  # GLUE's own layout: two classes in RTE, a score in STS-B
        folder = tmp_path / ("RTE" if kind == "classify" else "STS-B")
        folder.mkdir()
        names = ["index", "sentence1", "sentence2", "label" if kind == "classify" else "score"]
        for split in ("train", "dev"):
            lines = ["\t".join(names)]
            for i, row in enumerate(rows(kind)):
                label = {"yes": "entailment", "no": "not_entailment"}.get(row["label"], row["label"])
                lines.append(f"{i}\t{row['text']}\tb\t{label}")
            (folder / f"{split}.tsv").write_text("\n".join(lines) + "\n")
        member = "rte" if kind == "classify" else "stsb"
        return ["model=tiny_llama", f"task=glue/{member}", f"task.data={tmp_path}", "task.allow_partial=true"]
    for split in ("train", "test"):
        files.append(tmp_path / f"{split}.jsonl")
        files[-1].write_text("".join(json.dumps(row) + "\n" for row in rows(kind)))
    return ["model=tiny_llama", "task=jsonl", f"task.train={files[0]}", f"task.test={files[1]}"]


def trained(folder, *more):
    assert main(["run", "method=lora", "r=2", *PLAIN, *more, f"run_dir={folder}"]) == 0
    return load_file(folder / "adapter" / "adapter.safetensors")


@needs_two_cores
@pytest.mark.parametrize("cut", CUTS)
def test_a_step_is_the_same_however_it_is_cut(words, cut, tmp_path):
    whole = trained(tmp_path / "whole", *words, "batch_size=8", "epochs=2")
    found = trained(tmp_path / "cut", *words, *CUTS[cut], "epochs=2")
    assert whole.keys() == found.keys()
    for name, expected in whole.items():
        torch.testing.assert_close(
            found[name], expected, rtol=0, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_a_step_with_one_row_left_counts_in_full(tmp_path):
    """The gradient of one row is that row's, whatever `accumulate` says."""
    file = tmp_path / "one.jsonl"
    file.write_text('{"instruction": "say", "output": "a b c"}\n')
    words = ["model=tiny_llama", "task=jsonl", f"task.train={file}", f"task.test={file}", "batch_size=1", "epochs=1"]
    whole, found = trained(tmp_path / "1", *words), trained(tmp_path / "4", *words, "accumulate=4")
    assert all(torch.equal(found[name], whole[name]) for name in whole)
