"""Runs on images elsewhere: read again, merged, in PEFT, and without the folder that they were trained on."""

import json
import shutil

import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

import highrank
from highrank.cli import main

PIXELS = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(3)) * 2 - 1


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on a folder of three classes whose names could be taken for something else, and that folder."""
    root = tmp_path_factory.mktemp("images")
    for split in ("train", "test"):
        for label, name in enumerate(("07", "a, b", "null")):
            (root / "own" / split / name).mkdir(parents=True)
            for i in range(2):
                image = Image.new("RGB", (32, 32), (90 * label, 60 * i, 5 if split == "test" else 0))
                image.save(root / "own" / split / name / f"{i}.png")
    words = ["task=images", f"task.folder={root / 'own'}", "model=tiny_vit", "method=lora", "placement=qv", "r=2"]
    assert main(["run", *words, "max_steps=3", "lr=0.05", f"run_dir={root / 'run'}"]) == 0
    return root / "run", root / "own"


def logits(model):
    with torch.no_grad():
        return model.eval()(pixel_values=PIXELS).logits


def test_a_run_is_evaluated_again_and_its_folder_may_have_moved(trained, tmp_path, capsys):
    run, own = trained
    moved = tmp_path / "moved"
    shutil.copytree(own, moved)
    right = json.loads((run / "results.json").read_text())["metrics"]["final"]["sets"]["images"]
    for words in ([], [f"task.folder={moved}"]):
        assert main(["eval", str(run), *words]) == 0
        assert json.loads(capsys.readouterr().out)["sets"]["images"] == right
    (moved / "test" / "07").rename(moved / "test" / "7")
    assert main(["eval", str(run), f"task.folder={moved}"]) == 2
    assert "got 7 too many and 07 missing in" in capsys.readouterr().err
    assert main(["eval", str(run), "task=images", "task.folder=null", "task.classes=null"]) == 2
    assert "for an adapter of images (classify_images, 3 labels)" in capsys.readouterr().err


def test_a_run_is_merged_with_its_image_processor_and_without_its_folder(trained, tmp_path, capsys):
    run, own = trained
    assert main(["merge", str(run), "--out", str(tmp_path / "merged")]) == 0
    away = own.rename(tmp_path / "away")
    try:
        capsys.readouterr()
        assert main(["merge", str(run), "--out", str(tmp_path / "again")]) == 0
        assert "compared on noise, for the task's own are gone" in capsys.readouterr().err
        loaded = highrank.load(run)
    finally:
        away.rename(own)
    for name in ("merged", "again"):
        folder = tmp_path / name
        assert AutoImageProcessor.from_pretrained(folder, backend="pil").size == {"height": 32, "width": 32}
        merged = AutoModelForImageClassification.from_pretrained(folder)
        torch.testing.assert_close(logits(merged), logits(loaded.model), rtol=1e-4, atol=1e-5)
        assert json.loads((folder / "fidelity.json").read_text())["argmax_agreement"] == 1


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # raised inside PEFT
def test_an_adapter_goes_to_peft_and_back(trained, tmp_path, capsys):
    peft = pytest.importorskip("peft")
    run, own = trained
    assert main(["export", str(run), "--format", "peft", "--out", str(tmp_path / "peft")]) == 0
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (config["task_type"], config["modules_to_save"]) == (None, ["classifier"])
    ours = logits(highrank.load(run).model)
    base = highrank.load(run).adapters.unload()
    torch.nn.init.zeros_(base.classifier.weight)  # which the adapter's folder holds
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "peft")
    torch.testing.assert_close(logits(theirs), ours, rtol=0, atol=1e-6)
    words = ["task=images", f"task.folder={own}", "model=tiny_vit"]
    capsys.readouterr()
    assert main(["import", str(tmp_path / "peft"), *words, "--out", str(tmp_path / "back")]) == 0
    torch.testing.assert_close(logits(highrank.load(tmp_path / "back").model), ours, rtol=0, atol=1e-6)
    config["task_type"] = "SEQ_CLS"
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(config))
    assert main(["import", str(tmp_path / "peft"), *words, "--out", str(tmp_path / "no")]) == 2
    assert "of the adapter's kind, got task=images (classify_images) for task_type=SEQ_CLS" in capsys.readouterr().err


def test_a_lora_for_servers_of_texts_is_refused(trained, tmp_path, capsys):
    assert main(["export", str(trained[0]), "--format", "lora", "--rank", "2", "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "got task=images" in said
    assert said.count("\n") == 1


def test_the_harness_of_texts_is_refused(trained, capsys):
    assert main(["eval", str(trained[0]), "--engine", "lm_eval", "--tasks", "any"]) == 2
    said = capsys.readouterr().err
    assert "--engine lm_eval asks models that write texts, got task=images (classify_images)" in said
    assert said.count("\n") == 1


def test_a_loss_of_images_is_per_image_in_the_report_and_on_the_card(trained, tmp_path, capsys):
    run, _ = trained
    runs = tmp_path / "runs"
    for name in ("one", "two"):
        shutil.copytree(run, runs / name)
    other = json.loads((runs / "two" / "results.json").read_text())
    (runs / "two" / "results.json").write_text(json.dumps({**other, "config_hash": "0" * 64}))
    capsys.readouterr()
    assert main(["report", str(runs)]) == 0
    page = (runs / "report" / "index.html").read_text()
    assert "nats per example" in page
    assert "per token" not in page
    assert main(["export", str(run), "--format", "peft", "--out", str(tmp_path / "peft")]) == 0
    assert "loss (nats per image)" in (tmp_path / "peft" / "README.md").read_text()
