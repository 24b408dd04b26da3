"""Singular values of ΔW for every weight method: against numpy on what merging changes, and the papers' rank bounds."""

import numpy as np
import pytest
import torch
from moved import move

from highrank.analysis import spectra
from highrank.analysis.spectra import EXACT, Settings, measure
from highrank.analysis.statistics import numerical_rank
from highrank.base.errors import UserError
from highrank.base.registry import available, load
from highrank.model.adapters import attach
from highrank.model.backbones import load_backbone
from highrank.model.method import Site
from highrank.model.placement import resolve

METHODS = [name for name in sorted(available("methods")) if load("methods", name).family.changes_weights]
HIRA = [{"r": 2, "R": R} for R in ("random_uniform", "random_scaled", "w0_smooth", "ones")]
HIRA += [{"r": 2, "R": "w0_trunc", "R_rank": 3}, {"r": 2, "official_numerics": True}]
CASES = [pytest.param(name, load("methods", name).examples[0], id=name) for name in METHODS]
CASES += [pytest.param("hira", fields, id="-".join(map(str, fields.values()))) for fields in HIRA]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HIGHRANK_CACHE", str(tmp_path / "cache"))


def adapted(method, fields=None, model="llama", moved=True, fused="auto", placement="all"):
    loaded = load_backbone({"name": f"tiny_{model}", "dtype": "float32", "shuffled": False}, None).model
    cls = load("methods", method)
    fields = cls.examples[0] if fields is None else fields
    adapters = attach(loaded, resolve(loaded, placement, fused=fused), cls, cls.config(**fields))
    if moved:
        move(adapters, 0.1, seed=5)
    return adapters


def measured(adapters, settings=EXACT):
    return measure(adapters, {}, settings)


def svd(M):
    return np.linalg.svd(M, compute_uv=False)


@pytest.mark.parametrize(
    "where", [("llama", "auto"), ("phi3", "fused"), ("phi3", "split"), ("gpt2", "split")], ids="-".join
)
@pytest.mark.parametrize(("method", "fields"), CASES)
def test_values_are_those_of_what_merging_changes(method, fields, where):
    model, fused = where
    if not load("methods", method).family.keeps_base and fused == "split":
        pytest.skip("trains matrices whole")
    adapters = adapted(method, fields, model, fused=fused)
    before = {view.name: adapters.base_weight(view).double().numpy().copy() for view in adapters.views}
    found = measured(adapters)
    adapters.merge()
    assert len(adapters.views) >= 8
    for view in adapters.views:
        layer, W = adapters.layers[view.path], before[view.name]
        merged = layer.weight.detach().T if model == "gpt2" else layer.weight.detach()
        delta = (merged if view.rows is None else merged[slice(*view.rows)]).double().numpy() - W
        # Merging rounds each entry of W' to fp32: 2^-24 of entries up to 1, over 64 x 16 of them.
        np.testing.assert_allclose(found.values[f"delta/{view.name}"], svd(delta), rtol=1e-5, atol=3e-6)
        np.testing.assert_allclose(found.values[f"base/{view.name}"], svd(W), rtol=1e-12, atol=1e-12)
        assert svd(delta)[0] > 1e-3
        assert found.notes[f"delta/{view.name}"]["error"] == 0


@pytest.mark.parametrize("method", METHODS)
def test_nothing_has_changed_at_the_start(method):
    """DoRA starts from norms rounded to fp32, the others from W itself."""
    found = measured(adapted(method, moved=False))
    for name, values in found.values.items():
        if name.startswith("delta/"):
            limit = 1e-7 * found.values[name.replace("delta/", "base/")][0] if method == "dora" else 0
            assert values[0] <= limit


def test_the_quotient_of_full_fine_tuning():
    adapters = adapted("full")
    view = adapters.views[0]
    with torch.no_grad():
        adapters.base_weight(view)[0, :3] = torch.tensor([0.0, 1e-9, -1e-9])
    found = measured(adapters)
    W = adapters.base_weight(view).double().numpy()
    E = adapters.by_view[view.name].weight.detach().double().numpy() - W
    masked = np.zeros_like(W, dtype=bool)
    masked[0, :3] = True
    quotient = np.where(masked, 0, E / np.where(masked, 1, W))
    np.testing.assert_allclose(found.values[f"ratio/{view.name}"], svd(quotient), rtol=1e-6)
    notes = found.notes[f"ratio/{view.name}"]
    assert notes["masked"] == 3
    assert notes["left_out"] == pytest.approx(np.linalg.norm(E[0, :3]))
    assert measured(adapters, Settings(tiny=0.0)).notes[f"ratio/{view.name}"]["masked"] == 1
    assert not any(name.startswith("ratio/") for name in measured(adapted("hira")).values)


def update(method, W, **fields):
    """Returns ΔW of one adapter away from its start."""
    n, k = W.shape
    cls = load("methods", method)
    cfg = cls.config(**fields)
    adapter = cls(k, n, cfg, cls.shared([(n, k)], cfg))
    torch.manual_seed(0)
    adapter.reset_parameters(W, Site("w", 0, lambda: [W]))
    move(adapter, 0.3)
    with torch.no_grad():
        return adapter.delta_weight(W)


def rank_of(M):
    return numerical_rank(spectra.singular_values(M).values, tuple(M.shape))


def low_rank(n, k, rank):
    rng = torch.Generator().manual_seed(7)
    return torch.randn(n, rank, generator=rng) @ torch.randn(rank, k, generator=rng) / rank**0.5


class TestRankBounds:
    """Each bound is attained: the parameters are random."""

    W = low_rank(64, 48, 48)

    @pytest.mark.parametrize("r", [1, 4])
    def test_lora(self, r):
        assert rank_of(update("lora", self.W, r=r)) == r

    def test_vera(self):
        assert rank_of(update("vera", self.W, r=5)) == 5

    @pytest.mark.parametrize(("rank", "expected"), [(3, 6), (20, 40), (48, 48)])
    def test_hyperadapt_is_twice_the_rank_of_w(self, rank, expected):
        assert rank_of(update("hyperadapt", low_rank(64, 48, rank))) == expected

    @pytest.mark.parametrize(("v", "r", "expected"), [(3, 2, 6), (5, 4, 20), (30, 2, 48)])
    def test_hira_is_r_times_the_rank_of_R(self, v, r, expected):
        assert rank_of(update("hira", self.W, R="w0_trunc", R_rank=v, r=r)) == expected

    def test_hilora_is_the_sum_of_its_parts(self):
        assert rank_of(update("hilora", low_rank(64, 48, 3), r1=2, r2=4)) == 3 * 2 + 4

    def test_mora_by_rotation_has_full_rank_and_by_sharing_at_most_the_side_of_M(self):
        W = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
        side = load("methods", "mora").config(r=4).side(256, 256)
        assert side < 50
        assert rank_of(update("mora", W, r=4)) == 256
        assert rank_of(update("mora", W, r=4, type=1)) <= side + 1

    @pytest.mark.parametrize("method", ["boft", "dora", "full"])
    def test_full_rank(self, method):
        assert rank_of(update(method, self.W)) == 48


class TestRefused:
    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    @pytest.mark.parametrize("method", METHODS)
    def test_an_update_that_is_not_finite(self, method, bad):
        adapters = adapted(method, placement="v")
        with torch.no_grad():
            next(adapters.by_view[adapters.views[1].name].parameters()).fill_(bad)
        with pytest.raises(
            UserError, match=r"analyze: ΔW must be finite, got NaN or inf in .*layers\.1\.self_attn\.v_proj;"
        ):
            measured(adapters)

    def test_a_weight_that_is_zero(self):
        adapters = adapted("lora")
        with torch.no_grad():
            adapters.base_weight(adapters.views[2]).zero_()
        with pytest.raises(UserError, match=r"a base weight must not be zero, got 0 in all of .*v_proj"):
            measured(adapters)

    @pytest.mark.parametrize("values", [{"tiny": -1.0}, {"tiny": float("nan")}, {"sketch": 0}])
    def test_settings(self, values):
        with pytest.raises(UserError, match=f"analyze: {next(iter(values))} must be"):
            Settings(**values)


class TestOnDisk:
    def test_read_is_what_was_written(self, tmp_path):
        found = measured(adapted("full"))
        spectra.write(tmp_path, found)
        again = spectra.read(tmp_path, {})
        assert again.notes == found.notes
        assert again.values.keys() == found.values.keys()
        assert all((again.values[name] == values).all() for name, values in found.values.items())

    def test_another_key_or_a_damaged_file_is_not_read(self, tmp_path):
        spectra.write(tmp_path, measured(adapted("lora")))
        assert spectra.read(tmp_path, {"adapter": "another"}) is None
        file = tmp_path / spectra.FILE
        whole = file.read_bytes()
        for damaged in (b"", whole[:100], whole[:-8], b"\xff" * len(whole)):
            file.write_bytes(damaged)
            assert spectra.read(tmp_path, {}) is None
        file.unlink()
        assert spectra.read(tmp_path, {}) is None

    def test_a_base_weight_is_decomposed_once_for_all_runs(self, tmp_path, monkeypatch):
        first = measured(adapted("lora"))
        stored = sorted((tmp_path / "cache" / "spectra").iterdir())
        assert len(stored) == 14
        decomposed = []
        monkeypatch.setattr(spectra, "singular_values", lambda M, sketch=None: decomposed.append(M) or first_of(M))
        second = measured(adapted("hira"))
        assert len(decomposed) == 14  # the updates alone
        for name, values in first.values.items():
            if name.startswith("base/"):
                assert (second.values[name] == values).all()
        stored[0].write_bytes(b"damaged")
        measured(adapted("hira"))
        assert len(decomposed) == 2 * 14 + 1


def first_of(M):
    return spectra.Spectrum(np.zeros(min(M.shape)))
