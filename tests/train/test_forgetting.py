"""Loss on general text, adapted against base."""

import json

import pytest
import torch

from highrank.base.errors import UserError
from highrank.model.backbones import load_backbone
from highrank.train.forgetting import read_passages, text_loss

TEXT = ["The river is long.", "", "Cats sleep most of the day, and so do dogs."]


def test_the_loss_is_the_mean_over_tokens_whatever_the_batch_size():
    backbone = load_backbone({"name": "tiny_llama", "dtype": "float32"}, None)
    model, tokenizer = backbone.model, backbone.tokenizer
    sums, num_tokens = 0.0, 0
    for text in TEXT:
        ids = tokenizer(text, return_tensors="pt").input_ids
        if ids.shape[1] > 1:
            with torch.no_grad():
                logs = model(ids).logits[0, :-1].log_softmax(-1)
            sums -= float(logs.gather(1, ids[0, 1:, None]).sum())
            num_tokens += ids.shape[1] - 1
    for batch_size in (1, 3):
        assert text_loss(model, tokenizer, TEXT, batch_size) == pytest.approx(sums / num_tokens, rel=1e-5)


def test_a_run_reports_it(run_cli, tmp_path):
    file = tmp_path / "general.txt"
    file.write_text("\n".join(TEXT))
    words = "method=lora r=2 model=tiny_llama placement=qv max_steps=3 lr=0.1 task.n_train=8 task.n_test=2"
    status, _, err = run_cli(*words.split(), f"general_text={file}", f"run_dir={tmp_path / 'run'}", "eval_before=false")
    assert status == 0, err
    found = json.loads((tmp_path / "run" / "results.json").read_text())["forgetting"]
    assert found["forgetting"] == pytest.approx(found["adapted_loss"] - found["base_loss"])
    assert found["adapted_loss"] != found["base_loss"]
    assert found["passages"] == 2


def test_bad_files(run_cli, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"txt": "a"}')
    with pytest.raises(UserError, match=r"must have the field 'text', got txt in .*row 1"):
        read_passages(tmp_path / "rows.jsonl")
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n{"text": null}')
    with pytest.raises(UserError, match=r"text must be a text, or a number, true or false, got text=null in .*row 2"):
        read_passages(tmp_path / "rows.jsonl")
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(UserError, match="must hold a passage"):
        read_passages(tmp_path / "empty.txt")
    status, _, err = run_cli("general_text=/no/such/file.txt")
    assert status == 2
    assert "general_text must be an existing file" in err
