"""BOFT against its formula and PEFT's; its permutations, one by one."""

import pytest
import torch

from highrank.base.registry import load

pytestmark = pytest.mark.parity


def cayley(R):
    S, eye = (R - R.T) / 2, torch.eye(len(R), dtype=R.dtype)
    return (eye - S) @ torch.linalg.inv(eye + S)


def permutation(k, b, i):
    """P_i: inside each group of b 2^i, chunks of b/2 with even places first, then odd. Row a holds its 1 at order[a]."""
    order = []
    for start in range(0, k, b * 2**i):
        chunks = [list(range(start + c * b // 2, start + (c + 1) * b // 2)) for c in range(2 ** (i + 1))]
        order += [place for chunk in chunks[0::2] + chunks[1::2] for place in chunk]
    return torch.eye(k, dtype=torch.float64)[order]


def dense(R):
    """Q = F_{m-1} ... F_0 with F_i = P_i blkdiag(Q_i) P_iᵀ, as k x k matrices."""
    m, blocks, b, _ = R.shape
    Q = torch.eye(blocks * b, dtype=R.dtype)
    for i in range(m):
        P = permutation(blocks * b, b, i) if m > 1 else torch.eye(blocks * b, dtype=R.dtype)
        Q = P @ torch.block_diag(*(cayley(block) for block in R[i])) @ P.T @ Q
    return Q


@pytest.mark.parametrize(("b", "m"), [(4, 1), (3, 1), (16, 1), (4, 2), (4, 3), (2, 4), (8, 2), (2, 2)])
def test_formula(layer, agree_with_formula, b, m):
    if 16 % b:
        layer.W, layer.x = layer.W[:, :15], layer.x[:, :15]
    cls = load("methods", "boft")
    adapter = cls(layer.W.shape[1], 24, cls.config(block_size=b, butterfly_factor=m)).double()
    torch.manual_seed(0)
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter)
    agree_with_formula(adapter, lambda W, R, s: torch.diag(s) @ W @ dense(R).T)


@pytest.mark.parametrize("block", [{"block_size": 4}, {"block_size": 0, "block_num": 2}])
@pytest.mark.filterwarnings("ignore:Failed to load the CUDA extension")  # PEFT, on a machine without nvcc
@pytest.mark.filterwarnings("ignore:Setting boft_n_butterfly_factor to 1")
def test_peft(layer, agree_with_peft, block):
    peft = pytest.importorskip("peft")
    theirs = {f"boft_{key}": value for key, value in {"block_num": 0, **block}.items()}
    config = peft.BOFTConfig(**theirs, target_modules=["fc"])
    agree_with_peft(layer.adapter("boft", **block), config, {"R": "boft_R", "s": "boft_s"})


@pytest.mark.parametrize(("b", "m"), [(4, 2), (4, 3), (2, 4), (8, 2)])
def test_permutations_are_those_of_peft(b, m):
    """PEFT drops every m to 1 here, but the method that lays out its permutations can be asked."""
    boft = pytest.importorskip("peft.tuners.boft.layer")
    for i in range(m):
        order = boft.BOFTLayer.block_butterfly_perm(None, 16, 16 // b // 2**i, b // 2, m - 1)
        theirs = boft.BOFTLayer.perm2mat(None, order)
        assert torch.equal(permutation(16, b, i), theirs.double())


def test_rotation_is_orthogonal(layer):
    Q = layer.adapter("boft", butterfly_factor=3).rotation()
    eye = torch.eye(16, dtype=torch.float64).expand_as(Q)
    torch.testing.assert_close(Q @ Q.mT, eye, rtol=0, atol=1e-12)  # fp64 rounding of sums of 16


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"block_size": -1}, "block_size"),
        ({"block_size": 0}, "block_size"),
        ({"block_num": 4}, "block_num"),
        ({"block_size": 5}, "block_size"),
        ({"block_size": 0, "block_num": 5}, "block_num"),
        ({"block_size": 0, "block_num": 32}, "block_num"),
        ({"butterfly_factor": 0}, "butterfly_factor"),
        ({"butterfly_factor": 4}, "butterfly_factor"),
        ({"block_size": 1, "butterfly_factor": 2}, "block_size"),
    ],
)
def test_bad_fields_are_named(refused, fields, named):
    refused("boft", fields, named)
