"""DiaBlo against its formula; what it is equal to, and what a step keeps."""

import pytest
import torch

from highrank.base.registry import load


@pytest.mark.parity
@pytest.mark.parametrize("N", [1, 2, 8])
def test_formula(layer, agree_with_formula, N):
    def weight(W, D):
        rows = []
        for g in range(N):
            row = [torch.zeros(24 // N, 16 // N, dtype=W.dtype) for _ in range(N)]
            row[g] = D[g]
            rows.append(torch.cat(row, dim=1))
        return W + torch.cat(rows)

    agree_with_formula(layer.adapter("diablo", N=N), weight)


def test_one_block_reaches_every_update(layer):
    """Whatever full fine-tuning makes of W, with its output and the gradient of that block."""
    full, adapter = layer.adapter("full"), layer.adapter("diablo", N=1)
    with torch.no_grad():
        adapter.D[0] = full.weight - layer.W
    near = {"rtol": 1e-12, "atol": 1e-12}  # fp64, summed in another order
    torch.testing.assert_close(adapter.effective_weight(layer.W), full.weight, **near)
    for each in (full, adapter):
        (each(layer.x, layer.W, layer.bias) * layer.dy).sum().backward()
    torch.testing.assert_close(adapter(layer.x, layer.W), full(layer.x, layer.W), **near)
    torch.testing.assert_close(adapter.D.grad[0], full.weight.grad, **near)


def test_gralora_of_full_rank_blocks_with_its_diagonal_alone_is_diablo(layer):
    """A block of rank k/K with A_ii = I is any block: GraLoRA of r = k holds DiaBlo of N = K."""
    diablo, gralora = layer.adapter("diablo", N=2), layer.adapter("gralora", r=16, K=2, alpha=16.0)
    with torch.no_grad():
        gralora.A.zero_()
        gralora.B.zero_()
        for g in range(2):
            gralora.A[g][:, 8 * g : 8 * g + 8] = torch.eye(8)
            gralora.B[g][8 * g : 8 * g + 8] = diablo.D[g].T
    torch.testing.assert_close(gralora.effective_weight(layer.W), diablo.effective_weight(layer.W), rtol=0, atol=1e-12)


def test_the_update_may_have_full_rank(layer):
    delta = layer.adapter("diablo", N=8).effective_weight(layer.W) - layer.W
    assert torch.linalg.matrix_rank(delta) == 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_keeps_x_and_the_blocks(dtype):
    cls = load("methods", "diablo")
    adapter = cls(64, 96, cls.config(N=4))
    torch.nn.init.normal_(adapter.D)
    W, x = torch.randn(96, 64, dtype=dtype), torch.randn(5, 64, dtype=dtype, requires_grad=True)
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t) is None or t, lambda t: t):
        adapter(x, W)
    known = {t.data_ptr() for t in (x, W, *adapter.parameters())}
    own = sum(t.numel() for t in kept.values() if t.untyped_storage().data_ptr() not in known)
    assert own == (0 if dtype == torch.float32 else adapter.D.numel())  # cast


def test_dropout_acts_on_the_update_in_training_only(layer):
    plain, dropping = layer.adapter("diablo", N=4), layer.adapter("diablo", N=4, dropout=0.5)
    assert not torch.allclose(plain(layer.x, layer.W), dropping(layer.x, layer.W))
    torch.manual_seed(5)
    y = dropping(layer.x, layer.W)
    torch.manual_seed(5)
    dropped = torch.nn.functional.dropout(layer.x, 0.5)
    expected = layer.x @ layer.W.T + dropped @ torch.block_diag(*dropping.D).T
    torch.testing.assert_close(y, expected)
    assert torch.equal(plain.eval()(layer.x, layer.W), dropping.eval()(layer.x, layer.W))


def test_counts(params):
    """Of a square weight of 4096, N = 64 trains as much as LoRA r=32; of (1024, 4096) less."""
    cls = load("methods", "diablo")
    assert cls.num_trainable(4096, 4096, cls.config()) == 32 * (4096 + 4096)
    found = params("model=llama3_8b placement=fc_qkv method=diablo")
    q, kv, fc = 4096 * 4096, 1024 * 4096, 14336 * 4096
    assert (found.trainable, found.frozen_extra) == (32 * (q + 2 * kv + 2 * fc) // 64, 0)


@pytest.mark.parametrize(
    ("fields", "named"), [({"N": 0}, "N"), ({"N": 3}, "N"), ({"N": 64}, "N"), ({"dropout": 1.0}, "dropout")]
)
def test_bad_fields_are_named(refused, fields, named):
    refused("diablo", fields, named)


def test_the_nearest_numbers_of_blocks_are_named():
    cls = load("methods", "diablo")
    with pytest.raises(Exception, match=r"got N=64 for a weight of shape \(96, 160\); the nearest that do: 32"):
        cls.validate(160, 96, cls.config())
