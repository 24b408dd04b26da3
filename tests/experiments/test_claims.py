"""Every script of experiments/claims on tiny random models: what its table says holds exactly, and what it writes is read again."""

import importlib
from pathlib import Path

import pytest
import torch

from highrank.base.errors import UserError
from highrank.cli import main as cli
from highrank.config.words import compose_run
from highrank.model.backbones import load_backbone
from highrank.model.placement import resolve, weight_of

FOLDER = Path(__file__).parents[2] / "experiments" / "claims"
TINY = ["model=tiny_llama", "task=wordmath", "task.n_train=32", "task.n_test=4", "batch_size=4"]

# transformers, saving a model
pytestmark = pytest.mark.integration


@pytest.fixture
def script(scripts):
    """Returns a function that runs a script: (its table's rows, the results of its JSON)."""
    run_script = scripts(FOLDER)

    def run(name, *words):
        out, found = run_script(name, *words)
        lines = [line for line in out.splitlines() if line.startswith("| ") and "| --- |" not in line]
        rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines]
        return rows, found["results"]

    return run


def test_gradient(script):
    rows, found = script("gradient", "--seeds=2", *TINY)
    assert [row[0] for row in rows[1:]] == ["w0", "random_scaled", "random_uniform", "ones"]
    medians = {R: {column: quartiles[1] for column, quartiles in of.items()} for R, of in found["quartiles"].items()}
    for R, of in medians.items():
        assert of[R] == pytest.approx(1, abs=1e-6)
        assert of["w0"] == pytest.approx(medians["w0"][R], abs=1e-12)
    assert medians["w0"]["size"] == 1
    assert abs(medians["w0"]["ones"]) < 0.5 < medians["random_uniform"]["ones"]  # U[0, 1) is 1 / 2 and noise
    # R ⊙ ((R ⊙ G) Bᵀ B) has a positive product with G for every R
    assert all(of["with G"] > 0 for of in medians.values())


def test_same_path(script):
    rows, found = script("same_path", "--steps=4", "--seeds=2", *TINY)
    last = {arm: [run["distance"]["4"] for run in runs] for arm, runs in found.items()}
    assert max(last["HiRA r=2, held"]) < 1e-9  # rounding of float64
    assert min(last["HiRA r=2, all"]) > 0.5  # both pairs move, so the first step is about twice as long
    assert max(last["HiRA r=2, all, half the rate"]) < min(last["HiRA r=2, all"])
    trained = {row[0]: row[1] for row in rows[1:]}
    assert trained["HyperAdapt"] == trained["HiRA r=2, held"] != trained["HiRA r=2, all"]


def test_a_path_longer_than_an_epoch_is_refused(script):
    with pytest.raises(UserError, match=r"every step, got 8 of 9; lower --steps"):
        script("same_path", "--steps=9", *TINY)


@pytest.fixture
def trained(run_cli):
    """Returns a function that trains a run on a tiny model and returns its folder."""

    def train(*words):
        status, out, _ = run_cli(*TINY, "max_steps=3", "eval_before=false", "eval_test=false", *words)
        assert status == 0
        return out.splitlines()[-1]

    return train


def test_division(script, trained):
    rows, found = script("division", "--dtypes=float32,bfloat16", trained("method=hyperadapt"), trained("method=hira"))
    assert [(row["method"], row["dtype"]) for row in found] == [
        (method, dtype) for method in ("hyperadapt", "hira") for dtype in ("float32", "bfloat16")
    ]
    for row in found:
        assert 0 < row["differ"] < row["entries"]
        assert row["not finite"] == 0
        assert 1 <= row["steps"] <= 2  # a rounding of the product and one of the quotient
        assert 0.5 < row["smallest factor"] < 1
    assert [row[0] for row in rows[1:]] == ["hyperadapt", "hyperadapt", "hira", "hira"]


def test_numbers_of_a_dtype_are_counted_across_zero(scripts):
    scripts(FOLDER)
    order = importlib.import_module("division").order
    x = torch.tensor([-1.0, -0.0, 0.0, 1.0, 1.0078125, -1.0078125], dtype=torch.bfloat16)
    places = order(x)
    assert places[1] == places[2] == 0
    assert (places[4] - places[3], places[5] - places[0]) == (1, -1)
    assert places[0] == -places[3]


def test_division_refuses_an_update_that_is_added(script, trained):
    with pytest.raises(UserError, match="W times something for hyperadapt and hira R=w0, got LoRAConfig"):
        script("division", "--dtypes=float32", trained("method=lora"))


def test_lemma1(script, trained, whole, tmp_path):
    base(script, tmp_path / "cut", f"path={whole}", "--rank=3")
    whole_run, cut_run = (trained("method=hyperadapt", f"path={path}") for path in (whole, tmp_path / "cut"))
    with pytest.raises(UserError, match=r"a run must have been analysed, got no .*; first: highrank analyze"):
        script("lemma1", cut_run)
    for run in (whole_run, cut_run):
        assert cli(["analyze", run]) == 0
    _, found = script("lemma1", cut_run)
    assert all(numbers == [3, 6, 6] for part in found.values() for numbers in part)
    rows, found = script("lemma1", whole_run)
    assert all(bound <= 2 * base and rank <= bound for part in found.values() for base, bound, rank in part)
    assert [row[0] for row in rows[1:]] == list(found)


def test_decay(script):
    rows, found = script("decay", "--steps=4", "--seeds=2", "--lr=0.05", "protocol.num_validation=8", *TINY)
    sizes = {(of["decay"], of["towards"]): [run["size"] for run in of["runs"]] for of in found}
    assert list(sizes) == [(0, 0), (0.01, 0), (0.1, 0), (1, 0), (1, 1)]
    for seed in range(2):
        assert sizes[1, 0][seed] < sizes[0.1, 0][seed] < sizes[0.01, 0][seed] < sizes[0, 0][seed]
        assert sizes[1, 0][seed] < sizes[1, 1][seed]
    assert rows[4][2] == f"{1 - 0.95**8:.3f}"


@pytest.fixture
def whole(tmp_path):
    """Returns the folder of a tiny model's files."""
    backbone = load_backbone(compose_run(["model=tiny_llama"]).model, None)
    backbone.model.save_pretrained(tmp_path / "whole")
    backbone.tokenizer.save_pretrained(tmp_path / "whole")
    return tmp_path / "whole"


def base(script, out, *words):
    importlib.import_module("base").main([str(out), *words])
    return load_backbone(compose_run(["model=tiny_llama"]).model, str(out)).model


def test_base_of_fewer_layers_and_of_new_weights(script, whole, tmp_path):
    old = load_backbone(compose_run(["model=tiny_llama"]).model, str(whole)).model.state_dict()
    short = base(script, tmp_path / "short", f"path={whole}", "--layers=1")
    assert short.config.num_hidden_layers == 1
    assert all(torch.equal(tensor, old[key]) for key, tensor in short.state_dict().items())
    drawn = [
        base(script, tmp_path / f"new{i}", f"path={whole}", f"--random={seed}") for i, seed in enumerate((3, 3, 4))
    ]
    first, second, third = (model.state_dict()["model.layers.0.mlp.up_proj.weight"] for model in drawn)
    assert torch.equal(first, second)
    assert not torch.equal(first, third)
    assert not torch.equal(first, old["model.layers.0.mlp.up_proj.weight"])


def test_base_of_low_rank(script, whole, tmp_path):
    model = base(script, tmp_path / "cut", f"path={whole}", "--rank=3")
    old = load_backbone(compose_run(["model=tiny_llama"]).model, str(whole)).model
    for view in resolve(model, "all"):
        W, before = (weight_of(m.get_submodule(view.path), view.rows).detach() for m in (model, old))
        assert torch.linalg.matrix_rank(W) == 3
        # the best approximation: what is left out are the other singular values (Eckart and Young)
        left = torch.linalg.svdvals(before)[3:].square().sum()
        torch.testing.assert_close((before - W).square().sum(), left, rtol=1e-4, atol=1e-9)


def test_bases_that_cannot_be(script, whole, tmp_path):
    for words, message in {
        ("--rank=99",): r"a rank must be <= min\(out, in\) = \d+, got --rank 99",
        ("--layers=0",): "layers must be 1 to 2, got --layers 0",
    }.items():
        with pytest.raises(UserError, match=message):
            base(script, tmp_path / "no", f"path={whole}", *words)
    with pytest.raises(UserError, match="the output folder must be new"):
        base(script, whole, f"path={whole}")
