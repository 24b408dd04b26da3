"""PEFT's adapter folders, both ways: the same logits as PEFT's own model, and the same tensors back."""

import json
import resource
import shutil

import pytest
import safetensors.torch
import torch
from trained import logits, write_run

from highrank.base.errors import UserError
from highrank.cli import main
from highrank.config.words import compose_run
from highrank.interop.peft import export_run, import_adapter
from highrank.model.adapter_folder import read_card
from highrank.model.backbones import load_backbone
from highrank.train.saved import load_run

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.filterwarnings("ignore:Failed to load the CUDA extension"),  # PEFT's BOFT, without nvcc
    pytest.mark.filterwarnings("ignore:Sparse invariant checks"),  # PyTorch, on PEFT's sparse matrices
    pytest.mark.filterwarnings("ignore:Specified to not save basis_A"),  # RandLoRA's, which are drawn from a seed
    pytest.mark.filterwarnings(
        "ignore:Unsupported layer type .*Norm"
    ),  # PEFT's, on every norm that LN_TUNING is made for
    pytest.mark.filterwarnings("ignore:Setting boft_n_butterfly_factor to 1"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # raised inside PEFT
    pytest.mark.filterwarnings("ignore:.*past_key_values. is deprecated:FutureWarning"),  # so is this
    pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning"),
]

NEAR = {"rtol": 0, "atol": 1e-6}  # fp32 sums in another order, on logits of about 0.1

CASES = {
    "lora": ["method=lora", "r=3", "alpha=5", "placement=all"],
    "lora_some_layers": ["method=lora", "r=2", "placement=[q,down]", "layers=1"],
    "dora": ["method=dora", "r=3", "placement=all"],
    "vera": ["method=vera", "r=5", "placement=all", "projection_prng_key=3"],
    "boft": ["method=boft", "block_size=4", "placement=all"],
    "hira": ["method=hira", "r=3", "placement=all"],
    "shira": ["method=shira", "r=2", "placement=all", "mask_seed=5"],
    "prompt_tuning": ["method=prompt_tuning", "num_virtual_tokens=4"],
    "p_tuning": ["method=p_tuning", "num_virtual_tokens=4", "hidden_size=7"],
    "prefix": ["method=prefix", "num_virtual_tokens=4"],
    "gralora": ["method=gralora", "r=4", "K=2", "alpha=5", "placement=all"],
    "gralora_hybrid": ["method=gralora", "r=4", "K=4", "hybrid_r=2", "placement=all"],
    "loha": ["method=loha", "r=3", "alpha=5", "placement=all"],
    "lokr": ["method=lokr", "r=1", "alpha=3", "placement=all"],
    "lokr_decomposed": ["method=lokr", "r=1", "factor=4", "decompose_both=true", "placement=all"],
    "lokr_whole": ["method=lokr", "r=6", "factor=2", "placement=[q,down]"],
    "oft": ["method=oft", "block_size=4", "placement=all"],
    "oft_exact_shared": ["method=oft", "block_size=0", "block_num=2", "neumann=false", "block_share=true"],
    "randlora": ["method=randlora", "r=3", "placement=all", "projection_prng_key=5"],
    "fourierft": ["method=fourierft", "n_frequency=20", "placement=all", "scaling=300"],
    "ia3": ["method=ia3", "placement=[k,v,up]"],
    "ia3_in": ["method=ia3", "placement=all", "side=in"],
    "miss": ["method=miss", "r=3", "placement=all"],
    "miss_mini": ["method=miss", "type=mini", "r=4", "mini_r=8", "placement=all"],
    "miss_bat": ["method=miss", "type=bat", "r=4", "placement=all"],
    "delora": ["method=delora", "r=3", "start=zeros", "placement=all"],
    "c3a": ["method=c3a", "block_size=4", "placement=all"],
    "layernorm": ["method=layernorm"],
}
ONE_WAY = {
    "hyperadapt": ["method=hyperadapt", "placement=all"],
    "hyperadapt_rows": ["method=hyperadapt", "placement=all", "sides=a"],
    "hyperadapt_columns": ["method=hyperadapt", "placement=all", "sides=b"],
    "lora_rs": ["method=lora", "r=3", "scaling=rs", "placement=all"],
    "lora_pissa": ["method=lora", "r=3", "init=pissa", "placement=all"],
    "lora_olora": ["method=lora", "r=3", "init=olora", "alpha=5", "scaling=rs", "placement=all"],
}
WRITTEN = {  # places that PEFT cannot draw again are in its file, and only there
    "shira_own_places": ["method=shira", "r=2", "placement=all"],
    "shira_wm": ["method=shira", "r=2", "mask=wm", "placement=all"],
}


def base(model="tiny_llama", kind="generate"):
    return load_backbone({"name": model, "dtype": "float32"}, None, kind).model


def in_peft(folder, model="tiny_llama", kind="generate"):
    return peft.PeftModel.from_pretrained(base(model, kind), folder).eval()


def tensors(run):
    return safetensors.torch.load_file(run / "adapter" / "adapter.safetensors")


@pytest.mark.parametrize("case", CASES | ONE_WAY)
def test_export_and_back(make_run, tmp_path, case):
    run, model = make_run(*(CASES | ONE_WAY)[case], "model=tiny_llama")
    ours = logits(model)
    assert (ours - logits(base())).abs().max() > 1e-3
    theirs = in_peft(export_run(run, tmp_path / "peft"))
    torch.testing.assert_close(logits(theirs), ours, **NEAR)

    theirs.save_pretrained(
        tmp_path / "theirs", save_embedding_layers=False
    )  # as PEFT itself writes it, every option filled in
    back = import_adapter(tmp_path / "theirs", tmp_path / "back", ["model=tiny_llama"])
    _, backbone, adapters = load_run(back)
    torch.testing.assert_close(logits(backbone.model), ours, **NEAR)
    if case in ("lora_pissa", "lora_olora"):  # read back as a plain LoRA of twice the rank
        (r,) = {len(adapter.A) for adapter in adapters.by_view.values()}
        assert (adapters.method.name, adapters.cfg.init, r) == ("lora", "kaiming", 6)
    elif not case.startswith(("p_tuning", "hyperadapt")):  # read back as prompt_tuning and hira
        assert {k: v.tolist() for k, v in tensors(back).items()} == {k: v.tolist() for k, v in tensors(run).items()}
        assert adapters.method.name == read_card(run / "adapter")["method"]


@pytest.mark.parametrize("case", WRITTEN)
def test_export_of_what_only_a_file_can_say(make_run, tmp_path, case):
    run, model = make_run(*WRITTEN[case], "model=tiny_llama")
    folder = export_run(run, tmp_path / "peft")
    torch.testing.assert_close(logits(in_peft(folder)), logits(model), **NEAR)
    with pytest.raises(
        UserError, match=r"shira_indices must be what r=2, random_seed=.* gives on this base, got other"
    ):
        import_adapter(folder, tmp_path / "back", ["model=tiny_llama"])
    assert not (tmp_path / "back").exists()


OTHER_MODELS = {
    "biases": ["model=tiny_qwen2", "method=dora", "r=2", "placement=qkvo"],
    "tied_and_transposed": ["model=tiny_gpt2", "method=lora", "r=2", "placement=all"],
    "transposed_hira": ["model=tiny_gpt2", "method=hira", "r=2", "placement=[o,up]"],
    "transposed_vera": ["model=tiny_gpt2", "method=vera", "r=4", "placement=all"],
    "fused_whole": ["model=tiny_phi3", "method=boft", "placement=all", "fused=fused"],
    "biases_beside_scaled_inputs": ["model=tiny_qwen2", "method=ia3", "side=in", "placement=qkvo"],
    "transposed_ia3": ["model=tiny_gpt2", "method=ia3", "side=in", "placement=all"],
    "transposed_fourierft": ["model=tiny_gpt2", "method=fourierft", "n_frequency=20", "placement=all"],
    "transposed_randlora": ["model=tiny_gpt2", "method=randlora", "r=4", "placement=all"],
    "classifier": ["model=tiny_bert", "task=glue/mrpc", "method=lora", "r=2", "placement=qv"],
    "transposed_gralora": ["model=tiny_gpt2", "method=gralora", "r=2", "K=2", "placement=all"],
}


@pytest.mark.parametrize("case", OTHER_MODELS)
def test_other_models(make_run, tmp_path, case):
    words = OTHER_MODELS[case]
    model_name = words[0].partition("=")[2]
    kind, task = ("classify", ["task=glue/mrpc"]) if case == "classifier" else ("generate", [])
    run, model = make_run(*words)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") and "base" in name:
                parameter.normal_()
    ours = logits(model)
    theirs = in_peft(export_run(run, tmp_path / "peft"), model_name, kind)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if name.endswith("base_layer.bias"):
                parameter.copy_(
                    model.get_parameter(name.removeprefix("base_model.model.").replace("base_layer", "base"))
                )
    torch.testing.assert_close(logits(theirs), ours, **NEAR)
    back = import_adapter(tmp_path / "peft", tmp_path / "back", task)
    assert {k: v.tolist() for k, v in tensors(back).items()} == {k: v.tolist() for k, v in tensors(run).items()}


@pytest.mark.parametrize(
    "method", [["lora", "r=2"], ["lora", "r=2", "init=pissa"], ["dora", "r=2"], ["hira", "r=2"], ["hyperadapt"]]
)
@pytest.mark.parametrize(("model", "placement"), [("tiny_phi3", "fc_qkv"), ("tiny_gpt2", "qv")])
def test_row_slices_become_one_pair_on_all_rows(make_run, tmp_path, method, model, placement):
    """Slices that cover a matrix, and some that leave rows of it alone."""
    run, ours = make_run(f"method={method[0]}", *method[1:], f"model={model}", f"placement={placement}", "fused=split")
    theirs = in_peft(export_run(run, tmp_path / "peft"), model)
    torch.testing.assert_close(logits(theirs), logits(ours), **NEAR)
    _, backbone, _ = load_run(import_adapter(tmp_path / "peft", tmp_path / "back"))
    torch.testing.assert_close(logits(backbone.model), logits(ours), **NEAR)


@pytest.mark.parametrize(
    ("model", "kind", "task"), [("tiny_gpt2", "generate", []), ("tiny_bert", "classify", ["task=glue/mrpc"])]
)
def test_norms_with_biases(make_run, tmp_path, model, kind, task):
    run, ours = make_run(f"model={model}", "method=layernorm", *task)
    theirs = in_peft(export_run(run, tmp_path / "peft"), model, kind)
    torch.testing.assert_close(logits(theirs), logits(ours), **NEAR)
    back = import_adapter(tmp_path / "peft", tmp_path / "back", task)
    assert {k: v.tolist() for k, v in tensors(back).items()} == {k: v.tolist() for k, v in tensors(run).items()}


def test_a_norm_that_the_model_lacks_is_named(make_run, tmp_path):
    run, _ = make_run("model=tiny_gpt2", "method=layernorm")
    folder = export_run(run, tmp_path / "peft")
    with pytest.raises(
        UserError, match=r"import: layernorm trains no such tensor of the base model, got .*ln_tuning_la"
    ):
        import_adapter(folder, tmp_path / "back", ["model=tiny_llama"])


def test_butterfly_factors_multiply_as_in_peft(make_run, tmp_path, monkeypatch):
    """PEFT drops every factor but one where its CUDA extension does not build; here torch stands in for the extension."""
    from peft.tuners.boft import layer

    class Extension:
        def forward(self, blocks):
            return (torch.stack([torch.block_diag(*factor) for factor in blocks]),)

    monkeypatch.setattr(layer, "_FBD_CUDA", Extension())
    run, model = make_run("method=boft", "block_size=4", "butterfly_factor=3", "model=tiny_llama")
    torch.testing.assert_close(logits(in_peft(export_run(run, tmp_path / "peft"))), logits(model), **NEAR)


LINEAR = ["q_proj", "v_proj", "down_proj"]
FROM_PEFT = {
    "lora": ("LoraConfig", {"r": 3, "lora_alpha": 7, "lora_dropout": 0.1, "target_modules": LINEAR}),
    "lora_rs": ("LoraConfig", {"r": 3, "lora_alpha": 7, "use_rslora": True, "target_modules": LINEAR}),
    "lora_all": ("LoraConfig", {"r": 2, "target_modules": "all-linear", "init_lora_weights": "gaussian"}),
    "lora_one_layer": ("LoraConfig", {"r": 2, "target_modules": LINEAR, "layers_to_transform": [1]}),
    "dora": ("LoraConfig", {"r": 2, "use_dora": True, "target_modules": LINEAR}),
    "vera": ("VeraConfig", {"r": 6, "projection_prng_key": 9, "target_modules": LINEAR}),
    "boft": ("BOFTConfig", {"boft_block_num": 2, "boft_block_size": 0, "target_modules": LINEAR}),
    "boft_told_of_a_factor_that_was_dropped": (
        "BOFTConfig",
        {"boft_block_size": 4, "boft_n_butterfly_factor": 2, "target_modules": LINEAR},
    ),
    "hira": ("HiraConfig", {"r": 3, "target_modules": LINEAR}),
    "shira": ("ShiraConfig", {"r": 2, "random_seed": 3, "target_modules": LINEAR}),
    "shira_without_a_seed": ("ShiraConfig", {"r": 2, "target_modules": LINEAR}),
    "prompt_tuning": ("PromptTuningConfig", {"num_virtual_tokens": 3}),
    "p_tuning": ("PromptEncoderConfig", {"num_virtual_tokens": 3, "encoder_hidden_size": 6}),
    "p_tuning_lstm": (
        "PromptEncoderConfig",
        {"num_virtual_tokens": 3, "encoder_hidden_size": 6, "encoder_reparameterization_type": "LSTM"},
    ),
    "prefix": ("PrefixTuningConfig", {"num_virtual_tokens": 3}),
    "prefix_projected": (
        "PrefixTuningConfig",
        {"num_virtual_tokens": 3, "prefix_projection": True, "encoder_hidden_size": 6},
    ),
    "gralora": ("GraloraConfig", {"r": 4, "gralora_k": 2, "gralora_dropout": 0.1, "target_modules": LINEAR}),
    "gralora_hybrid": ("GraloraConfig", {"r": 4, "gralora_k": 2, "hybrid_r": 3, "target_modules": LINEAR}),
    "loha": ("LoHaConfig", {"r": 2, "alpha": 5, "rank_dropout": 0.1, "target_modules": LINEAR}),
    "lokr": ("LoKrConfig", {"r": 1, "alpha": 3, "target_modules": LINEAR}),
    "lokr_decomposed": (
        "LoKrConfig",
        {"r": 1, "decompose_both": True, "decompose_factor": 4, "target_modules": LINEAR},
    ),
    "lokr_lycoris": ("LoKrConfig", {"r": 8, "init_weights": "lycoris", "target_modules": LINEAR}),
    "oft": ("OFTConfig", {"r": 2, "oft_block_size": 0, "num_cayley_neumann_terms": 6, "target_modules": LINEAR}),
    "oft_exact": (
        "OFTConfig",
        {
            "oft_block_size": 4,
            "r": 0,
            "use_cayley_neumann": False,
            "num_cayley_neumann_terms": 7,
            "target_modules": LINEAR,
        },
    ),
    "randlora": ("RandLoraConfig", {"r": 3, "save_projection": False, "target_modules": LINEAR}),
    "fourierft": ("FourierFTConfig", {"n_frequency": 20, "random_loc_seed": 5, "target_modules": LINEAR}),
    "randlora_with_its_bases": ("RandLoraConfig", {"r": 3, "randlora_alpha": 6, "target_modules": LINEAR}),
    "ia3": ("IA3Config", {"target_modules": LINEAR, "feedforward_modules": []}),
    "ia3_in": ("IA3Config", {"target_modules": LINEAR, "feedforward_modules": LINEAR}),
    "miss": ("MissConfig", {"r": 4, "mini_r": 2, "miss_dropout": 0.1, "target_modules": LINEAR}),
    "miss_bat": ("MissConfig", {"r": 4, "miss_dropout": 0.1, "init_weights": "bat", "target_modules": LINEAR}),
    "delora": ("DeloraConfig", {"r": 3, "delora_lambda": 4, "target_modules": LINEAR}),
    "c3a": ("C3AConfig", {"block_size": 4, "target_modules": LINEAR}),
    "layernorm": ("LNTuningConfig", {}),
    "layernorm_some": ("LNTuningConfig", {"target_modules": ["input_layernorm"]}),
}


@pytest.mark.parametrize("case", FROM_PEFT)
def test_an_adapter_made_with_peft(tmp_path, case):
    name, fields = FROM_PEFT[case]
    theirs = peft.get_peft_model(base(), getattr(peft, name)(task_type="CAUSAL_LM", **fields)).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            if parameter.requires_grad and "embedding" not in key:
                parameter.add_(0.1 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    run = import_adapter(tmp_path / "theirs", tmp_path / "run", ["model=tiny_llama"])
    _, backbone, _ = load_run(run)
    ours = logits(backbone.model)
    assert (ours - logits(base())).abs().max() > 1e-3
    torch.testing.assert_close(ours, logits(theirs), **NEAR)
    again = in_peft(export_run(run, tmp_path / "again"))
    torch.testing.assert_close(logits(again), ours, **NEAR)


REFUSED_FROM_PEFT = [
    ("IA3Config", {"target_modules": LINEAR, "feedforward_modules": ["down_proj"]}, "tiny_llama", "scaled on one side"),
    (
        "IA3Config",
        {"target_modules": ["v_proj"], "feedforward_modules": []},
        "tiny_qwen2",
        "IA3 scales a bias too, which ia3 does not, got .*v_proj with one",
    ),
]


@pytest.mark.parametrize(("name", "fields", "model", "message"), REFUSED_FROM_PEFT)
def test_what_is_another_function_here_is_refused(tmp_path, name, fields, model, message):
    theirs = peft.get_peft_model(base(model), getattr(peft, name)(task_type="CAUSAL_LM", **fields))
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    with pytest.raises(UserError, match=message):
        import_adapter(tmp_path / "theirs", tmp_path / "run", [f"model={model}"])
    assert not (tmp_path / "run").exists()


TOO_LARGE = [
    ("method=shira r=2 mask_seed=5", {"r": 500}, "shira: r must be <= .* got r=500 .*; at most r=5$"),
    (
        "method=fourierft n_frequency=20",
        {"n_frequency": 10**6},
        "fourierft: n_frequency must be .*at most n_frequency=128$",
    ),
    ("method=c3a block_size=4", {"block_size": 5}, "c3a: block_size must divide .* every adapted weight: 4 or 8$"),
    ("method=oft block_size=4", {"oft_block_size": 5}, "oft: block_size must divide .* every adapted weight: 4 or 8$"),
    ("method=miss r=4", {"r": 64}, "miss: r must be <= in_features, got r=64"),
]


@pytest.mark.parametrize(("words", "change", "message"), TOO_LARGE, ids=[case[0] for case in TOO_LARGE])
def test_options_that_do_not_fit_the_weights_are_refused(make_run, tmp_path, words, change, message):
    run, _ = make_run(*words.split(), "model=tiny_llama")
    file = export_run(run, tmp_path / "peft") / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=message):
        import_adapter(tmp_path / "peft", tmp_path / "back", ["model=tiny_llama"])


def test_files_of_a_version_with_another_meaning_are_refused(make_run, tmp_path):
    run, _ = make_run("method=oft", "block_size=4", "model=tiny_llama")
    folder = export_run(run, tmp_path / "peft")
    config = json.loads((folder / "adapter_config.json").read_text())
    for version in (None, "0.17.1"):
        (folder / "adapter_config.json").write_text(json.dumps(config | {"peft_version": version}))
        with pytest.raises(UserError, match=r"OFT means another function in files before 0.18.0, got peft_version="):
            import_adapter(folder, tmp_path / "run")


def test_the_commands(make_run, tmp_path, capsys):
    run, _ = make_run("method=hira", "r=2", "model=tiny_llama")
    assert main(["export", str(run), "--format", "peft", "--out", str(tmp_path / "peft")]) == 0
    assert main(["import", str(tmp_path / "peft"), "--out", str(tmp_path / "back"), "task.n_test=2", "seed=4"]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "peft"), str(tmp_path / "back")]
    results = json.loads((tmp_path / "back" / "results.json").read_text())
    assert results["status"] == "imported"
    assert results["imported"]["peft_type"] == "HIRA"
    assert results["params"]["trainable"] > 0
    assert main(["merge", str(tmp_path / "back"), "--out", str(tmp_path / "merged")]) == 0
    capsys.readouterr()
    assert "Made by" not in (tmp_path / "merged" / "README.md").read_text()  # it was imported
    card = (tmp_path / "peft" / "README.md").read_text()
    assert "Made by" in card
    assert "W' = W + R ⊙ (A B)" in card
    assert main(["export", str(run), "--format", "peft", "--out", str(tmp_path / "peft")]) == 2
    assert "export: the output folder must be new or empty" in capsys.readouterr().err
    assert main(["import", str(tmp_path / "peft"), "--out", str(run)]) == 2
    assert "import: the output folder must be new or empty" in capsys.readouterr().err
    for words in ([], ["a", "b"], ["a", "--format", "onnx"]):
        assert main(["export", *words, "--out", "x"]) == 2
        assert "use: highrank export RUN --format peft|lora|merged --out DIR" in capsys.readouterr().err


NO_TYPE = [
    (["method=mora", "r=2"], "no type for this method, got method=mora"),
    (["method=hilora", "r1=1", "r2=1"], "no type for this method, got method=hilora"),
    (["method=full"], "no type for this method, got method=full"),
    (["method=bitfit", "model=tiny_qwen2"], "no type for this method, got method=bitfit"),
    (["method=hira", "r=2", "R=ones"], "PEFT's HiRA has R = W in full precision, got R=ones"),
    (["method=hira", "r=2", "official_numerics=true"], "got official_numerics=True"),
    (
        ["method=vera", "r=2", "model=tiny_phi3", "placement=qv"],
        r"vera adapts a fused matrix whole, got the slice .*\[q\]",
    ),
    (["method=boft", "model=tiny_gpt2", "placement=o"], "boft adapts linear layers only, got the Conv1D"),
    (["method=svft"], "no type for this method, got method=svft"),
    (["method=delora", "r=2"], "PEFT's DeLoRA subtracts no start, got start=copy"),
    (["method=ia3", "model=tiny_qwen2", "placement=[o,v]"], r"PEFT's ia3 scales a bias too, got .*v_proj with one"),
    (["method=lokr", "r=1", "model=tiny_gpt2", "placement=o"], "lokr adapts linear layers only, got the Conv1D"),
    (["method=oft", "block_size=4", "model=tiny_gpt2", "placement=o"], "oft adapts linear layers only, got the Conv1D"),
]


@pytest.mark.parametrize(("words", "message"), NO_TYPE)
def test_what_peft_cannot_say_is_refused_before_weights_load(make_run, tmp_path, monkeypatch, words, message):
    run, _ = make_run("model=tiny_llama", *words) if words[-1].count("tiny") == 0 else make_run(*words)
    monkeypatch.setattr("highrank.train.saved.build_model", None)
    with pytest.raises(UserError, match=f"{message}.*highrank merge RUN --out DIR"):
        export_run(run, tmp_path / "peft")
    assert not (tmp_path / "peft").exists()


def test_what_cannot_be_merged_either_is_not_sent_to_merge(make_run, tmp_path):
    run, _ = make_run("model=tiny_llama", "method=compacter", "reduction=4")
    with pytest.raises(UserError, match=r"no type for this method, got method=compacter; keep the run$"):
        export_run(run, tmp_path / "peft")


BAD_CONFIG = [
    ({"peft_type": "ADALORA"}, "peft_type=ADALORA"),
    ({"peft_type": "POLY"}, "peft_type=POLY; it is one of"),
    ({"rank_pattern": {"q_proj": 4}}, "rank_pattern="),
    ({"use_rslora": True, "use_dora": True}, "use_rslora=True"),
    ({"use_rslora": "yes"}, "use_rslora=yes"),
    ({"bias": "all"}, "bias=all"),
    ({"lora_bias": True}, "lora_bias=True"),
    ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\]"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights=pissa"),
    ({"trainable_token_indices": [1]}, "trainable_token_indices="),
    ({"a_later_option": 3}, "a_later_option=3"),
    ({"r": None}, "hold r"),
    ({"base_model_name_or_path": None}, "the base model is needed"),
    ({"base_model_name_or_path": 5}, "named by a text, got base_model_name_or_path=5"),
    ({"task_type": "SEQ_CLS"}, "task must be of the adapter's kind"),
    ({"r": "two"}, "r must be of type"),
]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    run, _ = write_run(folder / "run", "method=lora", "r=2", "model=tiny_llama", "placement=qv")
    return export_run(run, folder / "peft")


@pytest.fixture
def lora(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "peft")


@pytest.mark.parametrize(("change", "message"), BAD_CONFIG)
def test_options_without_counterpart_are_named(lora, tmp_path, monkeypatch, change, message):
    config = json.loads((lora / "adapter_config.json").read_text()) | change
    (lora / "adapter_config.json").write_text(json.dumps({k: v for k, v in config.items() if (k, v) != ("r", None)}))
    monkeypatch.setattr("highrank.train.build.load_backbone", None)
    with pytest.raises(UserError, match=message):
        import_adapter(lora, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_file_from_before_there_was_an_option(lora, tmp_path):
    config = json.loads((lora / "adapter_config.json").read_text())
    assert config.pop("use_rslora") is False
    (lora / "adapter_config.json").write_text(json.dumps(config))
    assert load_run(import_adapter(lora, tmp_path / "run"))[2].cfg.scaling == "alpha_over_r"


def rewrite(folder, change):
    held = change(safetensors.torch.load_file(folder / "adapter_model.safetensors"))
    safetensors.torch.save_file(held, folder / "adapter_model.safetensors")


def moved(held):
    return {key.replace("layers.1.", "layers.7."): tensor for key, tensor in held.items()}


BAD_TENSORS = [
    (moved, "got model.layers.7.self_attn.q_proj in a llama; is it an adapter of another model"),
    (lambda held: {k: v for k, v in held.items() if "layers.1.self_attn.q" not in k}, "same parts, got none for"),
    (lambda held: {k: v for k, v in held.items() if "lora_A" not in k}, "tensors must match the model"),
    (lambda held: {k: torch.cat([v, v], -1) for k, v in held.items()}, "shapes must match"),
    (lambda held: {**held, "base_model.model.lm_head.weight": torch.ones(2)}, "got base_model.model.lm_head.weight"),
    (lambda held: {"weight": torch.ones(2)}, "holds no LORA tensors"),
]


@pytest.mark.parametrize(("change", "message"), BAD_TENSORS)
def test_an_adapter_of_another_model_is_refused(lora, tmp_path, change, message):
    rewrite(lora, change)
    with pytest.raises(UserError, match=message):
        import_adapter(lora, tmp_path / "run")
    assert not (tmp_path / "run").exists()


DAMAGED = [
    (lambda raw: b"", "adapter_model.safetensors is damaged, got "),
    (lambda raw: raw[:100], "adapter_model.safetensors is damaged, got "),
    (lambda raw: raw[:-1], "adapter_model.safetensors is damaged, got "),
    (lambda raw: b"\xff" * 8 + raw[8:], "adapter_model.safetensors is damaged, got "),
    (lambda raw: raw[:-4] + b"\0\0\xc0\x7f", "holds finite numbers, got base_model"),
]


@pytest.mark.parametrize(("change", "message"), DAMAGED, ids=["empty", "header", "cut", "length", "nan"])
def test_damaged_weights_are_one_error(lora, tmp_path, monkeypatch, capsys, change, message):
    file = lora / "adapter_model.safetensors"
    file.write_bytes(change(file.read_bytes()))
    monkeypatch.setattr("highrank.train.build.load_backbone", None)
    assert main(["import", str(lora), "--out", str(tmp_path / "run")]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("error: import: ")
    assert message in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff{}", b'{"peft_type": 3}', b'{"peft_type": "LORA"'])
def test_a_damaged_description_is_one_error(lora, tmp_path, capsys, content):
    (lora / "adapter_config.json").write_bytes(content)
    assert main(["import", str(lora), "--out", str(tmp_path / "run")]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("error: import: ")
    assert "adapter_config.json" in said


@pytest.mark.parametrize("command", ["import", "export", "merge"])
def test_an_output_that_cannot_be_made_is_refused_before_weights_load(
    exported, lora, tmp_path, monkeypatch, capsys, command
):
    monkeypatch.setattr("highrank.train.build.load_backbone", None)
    (tmp_path / "file").write_text("mine")
    source = lora if command == "import" else exported.parent / "run"
    more = ["--format", "peft"] if command == "export" else []
    for out in (tmp_path / "file", tmp_path / "file" / "out"):
        assert main([command, str(source), "--out", str(out), *more]) == 2
        (said,) = capsys.readouterr().err.splitlines()
        assert said.startswith(f"error: {command}: the output folder must be ")
        assert f"got --out {out}" in said
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("command", ["import", "export", "merge"])
def test_a_full_disk_leaves_nothing(exported, lora, tmp_path, capsys, command):
    """The limit on file sizes stands for the disk: of each folder the largest file does not fit."""
    source = lora if command == "import" else exported.parent / "run"
    more = ["--format", "peft"] if command == "export" else []
    before = sorted(tmp_path.rglob("*"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, hard))
    try:
        status = main([command, str(source), "--out", str(tmp_path / "out"), *more])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert status == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(said) == 1
    assert f"error: {command}: the output folder must be writable, got --out {tmp_path / 'out'}" in said[0]
    assert "large" in said[0]
    assert sorted(tmp_path.rglob("*")) == before


def test_pickled_weights_and_folders_without_an_adapter_are_refused(lora, tmp_path):
    (lora / "adapter_model.safetensors").rename(lora / "adapter_model.bin")
    with pytest.raises(UserError, match=r"weights are read from adapter_model.safetensors only"):
        import_adapter(lora, tmp_path / "run")
    (lora / "adapter_config.json").write_text("{")
    for folder in (lora, tmp_path / "nowhere"):
        with pytest.raises(UserError, match=r"a PEFT adapter folder holds a readable adapter_config.json"):
            import_adapter(folder, tmp_path / "run")
    with pytest.raises(UserError, match=r"a run directory holds config.yaml"):
        export_run(tmp_path / "nowhere", tmp_path / "out")


def test_other_random_projections_are_refused(make_run, tmp_path):
    run, _ = make_run("method=vera", "r=4", "model=tiny_llama")
    folder = export_run(run, tmp_path / "peft")
    rewrite(folder, lambda held: {k: v + 1 if k == "base_model.vera_B" else v for k, v in held.items()})
    with pytest.raises(UserError, match=r"vera_B must be what .*projection_prng_key=0.* gives on this base"):
        import_adapter(folder, tmp_path / "run")


def test_prompts_of_another_width_are_refused(make_run, tmp_path):
    run, _ = make_run("method=prompt_tuning", "num_virtual_tokens=3", "model=tiny_llama")
    folder = export_run(run, tmp_path / "peft")
    rewrite(folder, lambda held: {"prompt_embeddings": torch.ones(3, 8)})
    with pytest.raises(UserError, match=r"hold prompt_embeddings for \(3, 16\), got .*\(3, 8\)"):
        import_adapter(folder, tmp_path / "run")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("HuggingFaceTB/SmolLM2-135M-Instruct", ["model=smollm2_135m"]),
        ("org/some-model", ["model=hf:org/some-model"]),
        ("tiny_llama", ["model=tiny_llama"]),
    ],
)
def test_the_base_model_that_an_adapter_names(name, words):
    from highrank.interop.peft import _base_words

    assert _base_words({"base_model_name_or_path": name}) == words
    assert compose_run(words).model["name"]


def test_a_base_model_in_a_folder(tmp_path):
    from highrank.interop.peft import _base_words

    words = _base_words({"base_model_name_or_path": str(tmp_path)})
    assert compose_run(words).core.path == str(tmp_path)


def test_an_adapter_that_names_another_base_is_taken_with_a_warning(make_run, tmp_path, capsys):
    run, _ = make_run("method=lora", "r=2", "model=tiny_llama")
    export_run(run, tmp_path / "peft")
    for model, warned in (("tiny_qwen2", True), ("tiny_llama", False)):
        capsys.readouterr()
        out = tmp_path / model
        assert main(["import", str(tmp_path / "peft"), "--out", str(out), f"model={model}"]) == 0
        said = capsys.readouterr().err
        assert (
            "warning: the adapter names another base, got model=tiny_qwen2 for base_model_name_or_path=" in said
        ) == warned
