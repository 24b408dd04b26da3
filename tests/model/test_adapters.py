"""Attach, merge, unmerge, disable, save and load on whole tiny models."""

import json

import pytest
import torch
from moved import move

from highrank.base.errors import UserError
from highrank.base.registry import available, load
from highrank.model.adapters import attach, fingerprint
from highrank.model.backbones import head_modules, load_backbone
from highrank.model.method import Method
from highrank.model.placement import resolve, weight_of
from highrank.model.tiny import DECODERS, ENCODERS

SMALL = {
    "hilora": [{"r1": 2, "r2": 2}],
    "hira": [
        {"r": 2},
        {"r": 2, "R": "w0_smooth"},
        {"r": 2, "R": "w0_trunc", "R_rank": 3},
        {"r": 2, "R": "random_scaled"},
    ],
    "lora": [{"r": 2}, {"r": 2, "init": "pissa"}, {"r": 2, "init": "olora"}],
    "dora": [{"r": 2}],
    "vera": [{"r": 4}],
    "boft": [{"butterfly_factor": 2}],
    "mora": [{"r": 2}, {"r": 2, "type": 1}],
}
WEIGHT_METHODS = [name for name in sorted(available("methods")) if load("methods", name).family.changes_weights]
CASES = [(name, fields) for name in WEIGHT_METHODS for fields in SMALL.get(name, load("methods", name).examples[:1])]


def backbone(name, dtype="float32", shuffled=False):
    spec = {"name": f"tiny_{name}", "dtype": dtype, "shuffled": shuffled}
    return load_backbone(spec, None, "classify" if name in ENCODERS else "generate").model


def adapted(name="llama", method="hira", fields=None, placement="all", dtype="float32", moved=True, **kwargs):
    model = backbone(name, dtype, kwargs.pop("shuffled", False))
    cls = load("methods", method)
    heads = head_modules(model) if name in ENCODERS else []
    views = resolve(model, placement, **kwargs)
    adapters = attach(model, views, cls, cls.config(**(fields or {})), heads=heads)
    if moved:
        move(adapters, 0.05, seed=5)
    return adapters


@torch.no_grad()
def logits(model):
    ids = torch.tensor([[5, 6, 7, 8, 9], [50, 60, 70, 80, 90]])
    return model(input_ids=ids).logits


def bases(adapters):
    return {path: weight_of(layer.base).clone() for path, layer in adapters.layers.items()}


@pytest.mark.parametrize(("method", "fields"), CASES)
@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "bert"])
def test_merged_equals_unmerged_and_unmerge_restores_every_bit(name, method, fields):
    adapters = adapted(name, method, fields)
    before, unmerged = bases(adapters), logits(adapters.model)
    adapters.merge()
    merged = logits(adapters.model)
    # fp32: W' is rounded once per entry, then the products are summed in another order.
    torch.testing.assert_close(merged, unmerged, rtol=1e-5, atol=1e-5 * unmerged.abs().max().item())
    adapters.unmerge()
    for path, layer in adapters.layers.items():
        assert torch.equal(weight_of(layer.base), before[path])
    assert torch.equal(logits(adapters.model), unmerged)


@pytest.mark.parametrize(("method", "fields"), CASES)
def test_starts_as_the_base_and_disabled_is_the_base(method, fields):
    base = logits(backbone("llama"))
    adapters = adapted("llama", method, fields, moved=False)
    # Exact up to the rounding of scalings that are 1 (DoRA's m / norm) and another order of sums.
    torch.testing.assert_close(logits(adapters.model), base, rtol=0, atol=2e-6)
    adapters = adapted("llama", method, fields)
    assert not torch.allclose(logits(adapters.model), base, atol=1e-4)
    with adapters.disabled():
        assert torch.equal(logits(adapters.model), base)


@pytest.mark.parametrize(("name", "placement"), [("phi3", "qv"), ("gpt2", "qv"), ("phi3", "fc")])
def test_slices_change_their_rows_only(name, placement):
    adapters = adapted(name, "hyperadapt", placement=placement, fused="split")
    before = bases(adapters)
    adapters.merge()
    for path, layer in adapters.layers.items():
        spans = [span or (0, len(before[path])) for span in layer.spans]
        touched = torch.zeros(len(before[path]), dtype=torch.bool)
        for start, stop in spans:
            touched[start:stop] = True
        changed = (weight_of(layer.base) != before[path]).any(1)
        assert torch.equal(changed, touched)


def test_split_and_whole_linear_agree_with_the_longhand_rows():
    """Each slice of a fused matrix is adapted as the matrix of its own that it stands for."""
    adapters = adapted("phi3", "hyperadapt", placement="qkv", fused="split")
    layer = adapters.layers["model.layers.0.self_attn.qkv_proj"]
    x = torch.randn(3, 16)
    W = weight_of(layer.base)
    expected = torch.cat([x @ (a.a[:, None] * W[slice(*span)] * a.b).T for a, span in layer.pairs()], dim=-1)
    torch.testing.assert_close(layer(x), expected)


def test_conv1d_bias_is_neither_scaled_nor_lost():
    adapters = adapted("gpt2", "hyperadapt", placement="qkvo")
    for layer in adapters.layers.values():
        with torch.no_grad():
            layer.base.bias.normal_()
        zero = torch.zeros(2, weight_of(layer.base).shape[1])
        torch.testing.assert_close(layer(zero), layer.base.bias.expand(2, -1), rtol=0, atol=0)


@pytest.mark.parametrize("method", ["hira", "lora", "hyperadapt"])
def test_heads_train_in_full_and_are_counted_apart(method):
    adapters = adapted("bert", method, {} if method == "hyperadapt" else {"r": 2})
    assert adapters.extra == ["classifier.weight", "classifier.bias"]
    assert adapters.num_head() == 16 * 2 + 2
    trains = {n for n, p in adapters.model.named_parameters() if p.requires_grad}
    assert all(".adapters." in n or n.startswith("classifier.") for n in trains)
    assert sum(p.numel() for p in adapters.model.parameters() if p.requires_grad) == (
        adapters.num_trainable() + adapters.num_head()
    )


def test_full_fine_tuning_trains_every_number_once():
    model = backbone("llama")
    total = sum(p.numel() for p in model.parameters())
    adapters = adapted("llama", "full", placement="fc_qkv")
    assert sum(p.numel() for _, p in adapters.named_parameters()) == total


def test_an_adapter_starts_the_same_whatever_else_is_placed():
    alone, all_of_them = adapted(placement="q", moved=False), adapted(placement="all", moved=False)
    for name, tensor in alone.state_dict().items():
        assert torch.equal(tensor, all_of_them.state_dict()[name])


def test_smooth_r_is_built_from_pristine_neighbours():
    adapters = adapted("llama", "hira", {"r": 2, "R": "w0_smooth"}, placement="q", moved=False)
    W = [adapters.base_weight(view) for view in adapters.views]
    for view in adapters.views:
        torch.testing.assert_close(adapters.by_view[view.name].R, (W[0] + W[1]) / 2)


@pytest.mark.parametrize(("method", "fields"), CASES)
def test_save_and_load(tmp_path, method, fields):
    first = adapted("llama", method, fields)
    first.save(tmp_path)
    second = adapted("llama", method, fields, moved=False)
    second.load(tmp_path)
    assert torch.equal(logits(first.model), logits(second.model))
    card = json.loads((tmp_path / "adapter.json").read_text())
    assert card["method"] == method
    stored = sum(t.numel() for t in first.state_dict().values())
    size = (tmp_path / "adapter.safetensors").stat().st_size
    assert size < 4 * stored + 16384  # trainable numbers and a header: no frozen R, no shared projections


def test_load_refuses_what_does_not_fit(tmp_path):
    saved = adapted("llama", "hira", {"r": 2})
    saved.save(tmp_path)

    with pytest.raises(UserError, match=r"the probe must match .*base model is not the one"):
        adapted("llama", "hira", {"r": 2}, shuffled=True).load(tmp_path)
    with pytest.raises(UserError, match=r"shapes must match"):
        adapted("llama", "hira", {"r": 3}).load(tmp_path)
    with pytest.raises(UserError, match=r"tensors must match .*missing"):
        adapted("llama", "hira", {"r": 2}, placement="q").load(tmp_path)
    with pytest.raises(UserError, match=r"method must match, got hira for a model with lora"):
        adapted("llama", "lora", {"r": 2}).load(tmp_path)
    with pytest.raises(UserError, match=r"has adapter.json, got none"):
        saved.load(tmp_path / "nowhere")

    untouched = adapted("llama", "hira", {"r": 2})
    before = untouched.state_dict()
    file = tmp_path / "adapter.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    with pytest.raises(UserError, match=r"is damaged, got sha256="):
        untouched.load(tmp_path)
    assert all(torch.equal(t, untouched.state_dict()[n]) for n, t in before.items())


def test_a_failed_probe_leaves_the_parameters_as_they_were(tmp_path):
    adapted("llama", "hira", {"r": 2}).save(tmp_path)
    other = adapted("llama", "hira", {"r": 2}, shuffled=True, moved=False)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(UserError, match="probe"):
        other.load(tmp_path)
    assert all(torch.equal(t, other.state_dict()[n]) for n, t in before.items())


def test_random_r_is_regenerated_not_stored(tmp_path):
    fields = {"r": 2, "R": "random_uniform"}
    first = adapted("llama", "hira", fields, placement="q")
    first.save(tmp_path)
    second = adapted("llama", "hira", fields, placement="q", moved=False)
    second.load(tmp_path)
    name = first.views[0].name
    assert torch.equal(first.by_view[name].R, second.by_view[name].R)
    assert not any(key.endswith(".R") for key in first.state_dict())


def test_merge_twice_and_unmerge_of_nothing_are_errors():
    adapters = adapted()
    with pytest.raises(UserError, match="unmerge: the adapter must be merged"):
        adapters.unmerge()
    adapters.merge()
    with pytest.raises(UserError, match="merged already"):
        adapters.merge()
    with pytest.raises(UserError, match="must not be merged"), adapters.disabled():
        pass


@pytest.mark.parametrize("name", [*DECODERS, *ENCODERS])
def test_unload_gives_a_plain_model_with_merged_weights(tmp_path, name):
    adapters = adapted(name, "hira", {"r": 2})
    expected = logits(adapters.model)
    adapters.merge()
    model = adapters.unload()
    assert not any(isinstance(module, Method) for module in model.modules())
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(again), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("method", "fields"), CASES)
def test_bf16_base_with_fp32_parameters(method, fields):
    adapters = adapted("llama", method, fields, dtype="bfloat16")
    assert all(p.dtype == torch.float32 for a in adapters.by_view.values() for p in a.parameters())
    loss = adapters.model(input_ids=torch.tensor([[5, 6, 7, 8]])).logits.float().square().mean()
    loss.backward()
    for name, parameter in adapters.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize("method", ["full", "lora"])
def test_everything_that_trains_is_fp32(method):
    """In bf16 an optimizer step of 1e-5 beside a weight of 1e-2 would be rounded away."""
    for name in ("llama", "bert"):
        adapters = adapted(name, method, {} if method == "full" else {"r": 2}, dtype="bfloat16", moved=False)
        assert all(p.dtype == torch.float32 for _, p in adapters.named_parameters())
        adapters.model(input_ids=torch.tensor([[5, 6, 7]])).logits.float().sum().backward()
        assert all(p.grad is not None for n, p in adapters.named_parameters() if "pooler" not in n)


@pytest.mark.parametrize(
    ("name", "words"), [("phi3", "placement=fc_qkv"), ("gpt2", "placement=qv"), ("llama", "layers=1")]
)
def test_full_fine_tuning_trains_what_the_plan_counts(name, words):
    """It ignores placement: matrices of which only some rows are placed train whole."""
    from highrank.config.words import compose_run
    from highrank.train.build import adapted_views
    from highrank.train.plan import count

    run = compose_run([f"model=tiny_{name}", "method=full", words])
    model = backbone(name)
    views = adapted_views(run, model)
    counted = count(model, views, run.method, run.method_cfg)
    adapters = attach(model, views, run.method, run.method_cfg)
    assert sum(p.numel() for _, p in adapters.named_parameters()) == counted.trainable == counted.total


def test_disabled_full_fine_tuning_is_the_base_again():
    base = logits(backbone("llama"))
    adapters = adapted("llama", "full")
    trained = logits(adapters.model)
    with adapters.disabled():
        assert torch.equal(logits(adapters.model), base)
    assert torch.equal(logits(adapters.model), trained)


def test_smooth_r_does_not_depend_on_which_layers_are_adapted():
    every = adapted("llama", "hira", {"r": 2, "R": "w0_smooth"}, placement="q", moved=False)
    one = adapted("llama", "hira", {"r": 2, "R": "w0_smooth"}, placement="q", moved=False, layers=1)
    name = one.views[0].name
    assert torch.equal(one.by_view[name].R, every.by_view[name].R)


def test_two_layers_that_share_a_weight_are_refused():
    model = backbone("llama")
    model.model.layers[1].self_attn.q_proj.weight = model.model.layers[0].self_attn.q_proj.weight
    cls = load("methods", "lora")
    with pytest.raises(UserError, match=r"must not share a weight, got .*layers.0.* and .*layers.1"):
        attach(model, resolve(model, "q"), cls, cls.config(r=2))


@pytest.mark.parametrize("method", ["lora", "prefix", "bitfit"])
@pytest.mark.parametrize("where", ["model.norm.weight", "lm_head.weight", "model.layers.1.self_attn.o_proj.weight"])
def test_a_base_whose_unadapted_weights_differ_is_refused(method, where, tmp_path):
    """One number, or two that changed places, in a weight that no adapter looks at."""
    cls = load("methods", method)

    def make(change=lambda weight: None, name="qwen2" if method == "bitfit" else "llama"):
        model = backbone(name)
        with torch.no_grad():
            change(model.get_parameter(where).view(-1))
        views = resolve(model, "q") if cls.family.changes_weights else []
        return attach(model, views, cls, cls.config())

    make().save(tmp_path)
    make().load(tmp_path)

    def add(weight):
        weight[-1] += 1e-3

    def swap(weight):
        weight[3], weight[4] = 2 * weight[3].clone(), weight[3].clone()

    for change in (add, swap):
        other = make(change)
        before = other.state_dict()
        with pytest.raises(UserError, match=f"base must be the one trained on, got other numbers in {where}"):
            other.load(tmp_path)
        assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())


def test_a_fingerprint_tells_an_order_and_is_the_same_in_pieces():
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    assert fingerprint(x) == fingerprint(x.clone())
    assert len({fingerprint(x), fingerprint(x.flip(0)), fingerprint(x.flip(1)), fingerprint(-x)}) == 4
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        assert len(fingerprint(x.to(dtype))) == 32


def test_unload_leaves_nothing_behind():
    adapters = adapted("llama", "vera", {"r": 4})
    assert not any("highrank" in name for name, _ in adapters.unload().named_modules())


def test_unloaded_full_fine_tuning_leaves_the_base_and_keeps_what_it_trained():
    pristine = {name: tensor.clone() for name, tensor in backbone("llama").state_dict().items()}
    adapters = adapted("llama", "full")
    ours, saved = logits(adapters.model), {name: tensor.clone() for name, tensor in adapters.state_dict().items()}
    updates = {name: change() for name, change in adapters.other_updates().items()}
    assert all(update.any() for update in updates.values())
    model = adapters.unload()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, pristine[name]), name
    for name, tensor in adapters.state_dict().items():
        assert torch.equal(tensor, saved[name]), name
    for name, change in adapters.other_updates().items():
        assert torch.equal(change(), updates[name]), name
    adapters.plug()
    assert torch.equal(logits(adapters.model), ours)


def test_the_update_of_a_layer_is_that_of_its_slices():
    adapters = adapted("phi3", "lora", {"r": 2}, placement="qv", fused="split")
    path = adapters.views[0].path
    whole = torch.zeros(weight_of(adapters.layers[path].base).shape)
    for view in adapters.views:
        if view.path == path:
            whole[slice(*view.rows)] = adapters.delta_weight(view)
    assert torch.equal(adapters.layer_update(path), whole)
    assert (whole == 0).any(dim=1).any()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("adapter.safetensors", None, "has adapter.safetensors, got none"),
        ("adapter.json", "{", "adapter.json is damaged"),
        ("adapter.json", "[]", "adapter.json is damaged"),
        ("adapter.json", "{}", "got no format_version"),
        (
            "adapter.json",
            '{"format_version": 9, "method": "", "fields": 0, "sha256": 0, "probe": 0}',
            "newest read here",
        ),
    ],
)
def test_a_damaged_adapter_folder_is_named(tmp_path, name, content, message):
    adapters = adapted("llama", "hira", {"r": 2})
    adapters.save(tmp_path)
    (tmp_path / name).unlink() if content is None else (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        adapters.load(tmp_path)
