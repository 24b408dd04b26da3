"""Combined updates against the formulas on whole vectors, and the folders that are written of them."""

import json

import pytest
import safetensors.torch
import torch
from lora_rules import broken_by
from moved import move
from trained import logits, write_run
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

import highrank
from highrank.base.errors import UserError
from highrank.cli import main
from highrank.interop.combine import Combined, Recipe, combine_runs, least_kept, terms_and_words
from highrank.model.backbones import load_backbone
from highrank.train.saved import load_run

RUNS = {
    "lora": ["method=lora", "r=2", "placement=qv"],
    "hira": ["method=hira", "r=2", "placement=[q,up]"],
    "abba": ["method=abba", "r1=1", "r2=2", "placement=qv"],
    "full": ["method=full"],
    "elsewhere": ["method=lora", "r=2", "model=tiny_mistral"],
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Run directories by name, made when asked for; only to read."""

    class Runs(dict):
        def __missing__(self, name):
            folder = tmp_path_factory.mktemp("runs") / name
            self[name] = str(write_run(folder, "model=tiny_llama", *RUNS[name])[0])
            return self[name]

    return Runs()


def base():
    return load_backbone({"name": "tiny_llama", "dtype": "float32"}, None).model


@pytest.fixture(scope="module")
def trained():
    """Three methods' adapters on one base, by name, taken off again."""
    model, taken_off = base(), {}
    for seed, (name, fields) in enumerate({"lora": {"r": 2}, "hira": {"r": 2}, "hyperadapt": {}}.items()):
        adapters = highrank.attach(model, name, placement="qv" if name == "lora" else ["q", "up"], **fields)
        move(adapters, 0.05, seed=seed)
        adapters.unload()
        taken_off[name] = adapters
    return taken_off


def flat(combined, updates):
    """Returns, per run, its whole update as one vector over all layers, 0 where it adapts none, in fp64."""
    sizes = {path: combined.bases[path].weight.shape for path in combined.layers}
    return torch.stack(
        [
            torch.cat(
                [
                    (adapters.layer_update(path) if path in adapters.layers else torch.zeros(sizes[path])).flatten()
                    for path in combined.layers
                ]
            ).double()
            for adapters in updates.values()
        ]
    )


def combined_vector(combined):
    return torch.cat([combined.layer(path).flatten() for path in combined.layers]).double()


WEIGHTS = {"lora": 0.5, "hira": 0.3, "hyperadapt": 0.2}


def test_linear_is_the_weighted_sum(trained):
    combined = Combined(Recipe("linear", [*WEIGHTS.items()]), trained)
    expected = torch.tensor([*WEIGHTS.values()]).double() @ flat(combined, trained)
    torch.testing.assert_close(combined_vector(combined), expected, rtol=1e-6, atol=1e-9)


def trimmed(vector, share):
    """The largest entries of one run; the layers that it does not adapt do not count."""
    own = vector[vector != 0]
    kept = round(share * len(own))
    return torch.where(vector.abs() >= own.abs().kthvalue(len(own) - kept + 1).values, vector, 0.0)


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_ties_is_trim_elect_and_disjoint_mean(trained, density):
    """Algorithm 1 of the paper on the whole vectors, its mean weighted."""
    combined = Combined(Recipe("ties", [*WEIGHTS.items()], density), trained)
    t = torch.stack([trimmed(vector, density) for vector in flat(combined, trained)])
    w = torch.tensor([*WEIGHTS.values()]).double()[:, None]
    agrees = (t.sign() == (w * t).sum(0).sign()) & (t != 0)
    expected = (w * t * agrees).sum(0) / (w * agrees).sum(0).clamp(min=1e-12) * w.sum()
    torch.testing.assert_close(combined_vector(combined), expected, rtol=1e-6, atol=1e-9)
    assert (combined_vector(combined) == 0).any() == (density < 1)


def test_ties_of_one_update_given_twice_is_linear(trained):
    twice = {"a": trained["hira"], "b": trained["hira"]}
    ties, linear = (
        combined_vector(Combined(Recipe(how, [("a", 0.7), ("b", 0.6)], density), twice))
        for how, density in (("ties", 1.0), ("linear", None))
    )
    torch.testing.assert_close(ties, linear, rtol=1e-6, atol=1e-9)


def test_dare_drops_and_rescales_by_seed(trained):
    def dare(seed, density=0.25):
        combined = Combined(Recipe("dare", [*WEIGHTS.items()], density, seed), trained)
        return combined_vector(combined), flat(combined, trained)

    first, updates = dare(0)
    assert torch.equal(first, dare(0)[0])
    assert not torch.equal(first, dare(1)[0])
    linear = torch.tensor([*WEIGHTS.values()]).double() @ updates
    mean = torch.stack([dare(seed)[0] for seed in range(200)]).mean(0)
    # of 200 draws the mean of an entry has a standard deviation of √(3 / 200) of it, per run
    spread = ((torch.tensor([*WEIGHTS.values()]).double()[:, None] * updates).square().sum(0) * 3 / 200).sqrt()
    assert ((mean - linear).abs() / spread.clamp(min=1e-12)).max() < 6
    torch.testing.assert_close(dare(0, 1.0)[0], linear, rtol=1e-6, atol=1e-9)
    alone = Combined(Recipe("dare", [("lora", 1.0), ("hira", 0.0)], 0.25), trained)
    kept, own = (
        alone.layer("model.layers.0.self_attn.v_proj"),
        trained["lora"].layer_update("model.layers.0.self_attn.v_proj"),
    )
    torch.testing.assert_close(kept[kept != 0], 4 * own[kept != 0])
    assert 0.1 < float((kept != 0).double().mean()) < 0.4


def test_the_least_of_the_largest_entries_is_exact():
    torch.manual_seed(0)
    parts = [torch.randn(7, 5) * 10.0**power for power in (-30, -3, 0, 5)]
    ordered = torch.cat([part.flatten() for part in parts]).abs().sort(descending=True).values
    for count in (1, 2, 50, 139, 140):
        assert least_kept([lambda part=part: part for part in parts], count / 140) == float(ordered[count - 1])
    assert least_kept([lambda: torch.zeros(4)], 0.5) == 0


def test_runs_are_merged_into_their_base(runs, tmp_path, capsys):
    """Every parameter longhand; methods and placements differ, and full fine-tuning changes the other parameters too."""
    words = [f"{runs['lora']}=0.7", f"{runs['full']}=0.4", f"{runs['hira']}=-0.3"]
    assert main(["combine", *words, "--how", "linear", "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.split()[-1] == str(tmp_path / "out")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    expected = {name: parameter.detach().double() for name, parameter in base().named_parameters()}
    for name, weight in (("lora", 0.7), ("full", 0.4), ("hira", -0.3)):
        _, _, adapters = load_run(runs[name])
        for path in adapters.layers:
            expected[f"{path}.weight"] += weight * adapters.layer_update(path)
        for other, change in adapters.other_updates().items():
            expected[other] += weight * change()
    found = dict(merged.named_parameters())
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name].double(), tensor, rtol=1e-5, atol=1e-7)
    told = json.loads((tmp_path / "out" / "fidelity.json").read_text())
    assert told["error"] < 1e-4
    assert (told["how"], told["dtype"]) == ("linear", "float32")
    assert [(run["run"], run["method"], run["weight"]) for run in told["runs"]] == [
        (runs["lora"], "lora", 0.7),
        (runs["full"], "full", 0.4),
        (runs["hira"], "hira", -0.3),
    ]
    # how far the combined model is from one of its runs, on the prompts of all
    ours = logits(merged) - logits(load_run(runs["full"])[1].model)
    assert told["runs"][1]["max_logit_difference"] == pytest.approx(float(ours.abs().max()), rel=0.5)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # raised inside PEFT
def test_a_combination_as_a_lora(runs, tmp_path, capsys):
    peft = pytest.importorskip("peft")
    words = ["combine", f"{runs['lora']}=0.7", f"{runs['abba']}=0.3", "--how", "linear", "--format", "lora"]
    assert main([*words, "--rank", "1", "--out", str(tmp_path / "low")]) == 2
    error = capsys.readouterr().err
    assert "combine: a LoRA of rank 1 must keep what training changed" in error
    assert "rank 2 misses" in error
    assert main([*words, "--rank", "4", "--out", str(tmp_path / "out")]) == 0
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
    model = base()
    with torch.no_grad():
        for name, weight in (("lora", 0.7), ("abba", 0.3)):
            _, _, adapters = load_run(runs[name])
            for path in adapters.layers:
                model.get_submodule(path).weight += weight * adapters.layer_update(path)
    theirs = peft.PeftModel.from_pretrained(base(), tmp_path / "out").eval()
    torch.testing.assert_close(logits(theirs), logits(model), rtol=0, atol=1e-6)
    assert broken_by(tmp_path / "out", base()) == []
    told = json.loads((tmp_path / "out" / "fidelity.json").read_text())
    assert told["exact"]
    assert [run["weight"] for run in told["runs"]] == [0.7, 0.3]
    assert "| 0.7 | lora | wordmath |" in (tmp_path / "out" / "README.md").read_text()


def test_experts_are_combined_in_the_parameter_that_holds_all_of_them():
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_local_experts": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    model = MixtralForCausalLM(MixtralConfig(vocab_size=128, **shape, **heads)).eval()
    trained, pristine = {}, logits(model)
    for name in ("lora", "hira"):
        adapters = highrank.attach(model, name, placement="experts", r=2)
        move(adapters, 0.1)
        adapters.unload()
        trained[name] = adapters
    trained["lora"].plug()
    ours = logits(model)
    trained["lora"].unload()
    assert torch.equal(logits(model), pristine)
    assert len(list(Combined(Recipe("linear", [("lora", 1.0), ("hira", 0.0)]), trained).applied(model))) == 4
    assert (ours - pristine).abs().max() > 1e-3
    torch.testing.assert_close(logits(model), ours, rtol=0, atol=1e-6)


def test_a_merge_that_loses_the_update_is_refused_or_accepted(runs, tmp_path, monkeypatch):
    monkeypatch.setattr("highrank.interop.hub_model.MOST_ERROR", 1e-9)
    recipe = Recipe("dare", [(runs["lora"], 0.5), (runs["abba"], 0.5)], density=0.5)
    with pytest.raises(UserError, match=r"combine: rounding to bfloat16 must keep .* or accept it with --accept"):
        combine_runs(recipe, tmp_path / "out", dtype="bfloat16")
    assert not (tmp_path / "out").exists()
    out = combine_runs(recipe, tmp_path / "out", dtype="bfloat16", accept=True)
    told = json.loads((out / "fidelity.json").read_text())
    assert (told["density"], told["seed"], told["dtype"]) == (0.5, 0, "bfloat16")
    assert 0 < told["update_lost"] < 1
    assert next(iter(safetensors.torch.load_file(out / "model.safetensors").values())).dtype == torch.bfloat16


def test_terms_are_told_from_words(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "task").mkdir()
    (tmp_path / "a=b").mkdir()
    given = ["a=b=0.5", "task=-1e-1", "other/run=2", "path=x", "task.n_test=3", "model.quantize=null"]
    terms, words = terms_and_words(given)
    assert terms == [("a=b", 0.5), ("task", -0.1), ("other/run", 2.0)]
    assert words == ["path=x", "task.n_test=3", "model.quantize=null"]
    for word, message in {
        "a=b": "a run is given with its weight, got a=b; give a=b=0.5",
        "run": "a run is given with its weight, got run; give run=0.5",
        "run=": "a weight is a number, got run=; give run=0.5",
        "run=half": "a weight is a number, got run=half; give run=0.5",
        "run=nan": "a weight is a number, got run=nan",
        "run=inf": "a weight is a number, got run=inf",
        "run=0": "a weight of 0 adds nothing, got run=0; leave the run out",
    }.items():
        with pytest.raises(UserError, match=message):
            terms_and_words([word])


BAD = {
    "unknown": (
        ("linaer", [("a", 1), ("b", 1)]),
        "unknown way to combine, got --how linaer; did you mean 'linear'",
    ),
    "one": (("linear", [("a", 1)]), "at least two runs are needed, each with its weight, got a=1"),
    "none": (("linear", []), "at least two runs are needed, each with its weight, got nothing"),
    "twice": (("linear", [("a", 1), ("./a", 1)]), "a run is given once, got a again"),
    "density": (("linear", [("a", 1), ("b", 1)], 0.5), "--density belongs to ties and dare, got --how linear"),
    "seed": (("ties", [("a", 1), ("b", 1)], 0.5, 1), "--seed belongs to dare, got --how ties"),
    "no density": (
        ("dare", [("a", 1), ("b", 1)], 0.0),
        "--density is a share of entries above 0 and up to 1, got --density 0",
    ),
    "much density": (("dare", [("a", 1), ("b", 1)], 1.5), "--density is a share"),
    "negative": (("ties", [("a", 1), ("b", -1)]), "ties weighs a mean, so weights must be > 0, got b=-1"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_recipe_that_cannot_be_is_refused(case):
    given, message = BAD[case]
    with pytest.raises(UserError, match=message):
        Recipe(*given)


def test_runs_that_do_not_go_together_are_refused_before_weights_load(runs, tmp_path, monkeypatch):
    def refused(*folders, **options):
        with pytest.raises(UserError) as caught:
            combine_runs(Recipe("linear", [(str(folder), 0.5) for folder in folders]), tmp_path / "out", **options)
        return str(caught.value)

    monkeypatch.setattr("highrank.interop.combine.load_backbone", None)
    message = refused(runs["lora"], runs["elsewhere"])
    assert f"runs share one base, got tiny_mistral in {runs['elsewhere']} for tiny_llama in {runs['lora']}" in message
    assert "a run directory holds config.yaml" in refused(runs["lora"], tmp_path)
    assert "--rank must be from 1 to 16, the greatest rank" in refused(runs["lora"], runs["abba"], rank=17)
    assert "--dtype is one of" in refused(runs["lora"], runs["abba"], dtype="int8")
    monkeypatch.setattr("highrank.interop.combine.read_run", lambda folder, words: quantised)
    quantised, _, _ = load_run(runs["lora"])
    quantised.model["quantize"] = "int8"
    assert "on the unquantised base, got model.quantize=int8" in refused(runs["lora"], runs["abba"])
    assert not (tmp_path / "out").exists()
