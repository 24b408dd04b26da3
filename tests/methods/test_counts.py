"""Parameter counts, to the last digit, of every row that both papers print and of PEFT's own method comparison.

Counted from the models' public shapes, without weights. `percent` is 100 trainable / (base + trainable), the convention
of both papers' tables (HyperAdapt, arXiv 2509.18629, tables of arithmetic and commonsense; HiRA, ICLR 2025, Tables 1-3).
"""

import pytest

TOTALS = {
    "llama2_7b": 6_738_415_616,
    "llama3_8b": 8_030_261_248,
    "qwen2.5_7b": 7_615_616_512,
    "phi4": 14_659_507_200,
    "llama3.2_3b": 3_212_749_824,
    # HF's encoder for classification has no pooler; the head is counted apart.
    "roberta_large": 354_310_144,
}


@pytest.mark.parametrize(("name", "total"), TOTALS.items())
def test_totals(params, name, total):
    placement = "qkvo" if name == "roberta_large" else "all"
    assert params(f"model={name} method=hyperadapt placement={placement}").total == total


HYPERADAPT_PAPER = [
    # words after `placement=all`, trainable, percent as computed from the exact numbers, frozen beside the base
    ("llama3_8b method=hyperadapt", 2_621_440, 0.0326, 0),
    ("llama3_8b method=lora r=1", 2_621_440, 0.0326, 0),
    ("llama3_8b method=lora r=32", 83_886_080, 1.0338, 0),
    ("llama3_8b method=dora r=32", 85_262_336, 1.0506, 0),
    ("llama3_8b method=vera r=1024", 1_605_632, 0.0200, 29_360_128),
    ("llama3_8b method=boft butterfly_factor=4", 21_299_200, 0.2645, 0),  # what the text states
    ("llama3_8b method=boft butterfly_factor=1", 6_356_992, 0.0791, 0),  # what the table's 0.08 % is
    ("qwen2.5_7b method=hyperadapt", 2_523_136, 0.0331, 0),
    ("qwen2.5_7b method=lora r=1", 2_523_136, 0.0331, 0),
    ("qwen2.5_7b method=lora r=32", 80_740_352, 1.0491, 0),
    ("qwen2.5_7b method=dora r=32", 82_130_944, 1.0669, 0),
    ("qwen2.5_7b method=vera r=1024", 1_591_296, 0.0209, 38_797_312),
    ("qwen2.5_7b method=boft butterfly_factor=4", 19_511_296, 0.2555, 0),
    ("qwen2.5_7b method=boft butterfly_factor=1", 5_920_768, 0.0777, 0),
    ("phi4 method=hyperadapt", 3_481_600, 0.0237, 0),  # `all` on Phi-4 adapts the fused matrices
    ("phi4 method=lora r=1", 3_481_600, 0.0237, 0),
    ("phi4 method=lora r=32", 111_411_200, 0.7543, 0),
    ("phi4 method=dora r=32", 113_561_600, 0.7687, 0),
    ("phi4 method=vera r=2048", 2_478_080, 0.0169, 110_100_480),
    ("phi4 method=boft butterfly_factor=1", 7_475_200, 0.0510, 0),
    ("phi4 method=hyperadapt fused=split", 4_096_000, 0.0279, 0),
    ("phi4 method=lora r=32 fused=split", 131_072_000, 0.8862, 0),
    ("phi4 method=dora r=32 fused=split", 133_222_400, 0.9006, 0),
    ("phi4 method=vera r=2048 fused=split", 2_723_840, 0.0186, 73_400_320),
]


@pytest.mark.parametrize(("words", "trainable", "percent", "frozen"), HYPERADAPT_PAPER)
def test_hyperadapt_paper(params, words, trainable, percent, frozen):
    found = params(f"placement=all model={words}")
    assert (found.trainable, found.frozen_extra) == (trainable, frozen)
    assert round(found.percent, 4) == percent


def test_hyperadapt_is_one_32nd_of_lora_r32_on_every_model(params):
    """The paper says 34 and 37 times fewer, ratios of its rounded percentages."""
    for name in ("llama3_8b", "qwen2.5_7b", "phi4"):
        lora, ours = (
            params(f"placement=all model={name} {m}").trainable for m in ("method=lora r=32", "method=hyperadapt")
        )
        assert lora == 32 * ours


def test_roberta_large(params):
    ours = params("model=roberta_large placement=qkvo method=hyperadapt")
    assert ours.trainable == 196_608
    assert round(100 * ours.trainable / ours.total, 4) == 0.0555
    assert ours.head == 1_051_650
    assert params("model=roberta_large placement=qv method=lora r=8").trainable == 786_432
    assert params("model=roberta_large placement=qv method=vera r=256").trainable == 61_440


HIRA_PAPER = [
    ("llama2_7b method=lora r=32", 56_098_816, 0.8256),
    ("llama2_7b method=hira r=32", 56_098_816, 0.8256),
    ("llama2_7b method=hira r=16", 28_049_408, 0.4145),  # printed 0.4128, half of r = 32
    ("llama2_7b method=dora r=32", 56_975_360, 0.8384),  # printed 0.8256, without magnitudes
    ("llama2_7b method=mora r=32", 55_990_528, 0.8241),
    ("llama3_8b method=lora r=32", 56_623_104, 0.7002),
    ("llama3_8b method=hira r=32", 56_623_104, 0.7002),
    ("llama3_8b method=hira r=16", 28_311_552, 0.3513),
    ("llama3_8b method=dora r=32", 57_409_536, 0.7098),  # printed 0.7002
    ("llama3_8b method=mora r=32", 56_583_168, 0.6997),
    ("llama2_7b method=mora type=1 r=32", 56_079_424, 0.8254),  # not what the table has
    ("llama3_8b method=mora type=1 r=32", 56_634_944, 0.7003),
    ("llama2_7b method=prompt_tuning", 81_920, 0.0012),
    ("llama2_7b method=p_tuning", 50_425_856, 0.7428),  # version 1, whatever the text says of every layer
    ("llama3_8b method=prompt_tuning", 81_920, 0.0010),
    ("llama3_8b method=p_tuning", 50_425_856, 0.6240),
    ("llama3_8b method=prefix", 1_310_720, 0.0163),  # 20 · 2 · 32 · 1024: eight key-value heads
]


@pytest.mark.parametrize(("words", "trainable", "percent"), HIRA_PAPER)
def test_hira_paper(params, words, trainable, percent):
    found = params(f"placement=fc_qkv model={words}")
    assert found.trainable == trainable
    assert round(found.percent, 4) == percent


RANKS = {
    2: 3_538_944,
    4: 7_077_888,
    8: 14_155_776,
    16: 28_311_552,
    24: 42_467_328,
    28: 49_545_216,
    30: 53_084_160,
    32: 56_623_104,
}


@pytest.mark.parametrize(("r", "trainable"), RANKS.items())
def test_hira_rank_sweep(params, r, trainable):
    assert params(f"model=llama3_8b method=hira r={r}").trainable == trainable
    if 2 <= r <= 30:  # every HiLoRA split of Table 6 has the parameters of r = 32
        assert params(f"model=llama3_8b method=hilora r1={r} r2={32 - r}").trainable == 56_623_104


PLACEMENTS = {
    "fc": 37_748_736,
    "qv": 13_631_488,
    "qkv": 18_874_368,
    "qk": 13_631_488,
    "q": 8_388_608,
    "k": 5_242_880,
    "v": 5_242_880,
}


@pytest.mark.parametrize(("placement", "trainable"), PLACEMENTS.items())
def test_hira_placements(params, placement, trainable):
    """HiRA Table 5 does not equalise parameters."""
    assert params(f"model=llama3_8b method=hira r=32 placement={placement}").trainable == trainable


FROZEN_R = {
    "R=random_uniform": 4_563_402_752,
    "R=w0_smooth": 4_563_402_752,
    "R=w0_trunc R_rank=32": 56_623_104,
    "R=w0_trunc R_rank=128": 226_492_416,
    "R=w0_trunc R_rank=512": 905_969_664,
    "R=w0": 0,
    "R=ones": 0,
}


@pytest.mark.parametrize(("words", "frozen"), FROZEN_R.items())
def test_frozen_numbers_of_r(params, words, frozen):
    assert params(f"model=llama3_8b method=hira r=32 {words}").frozen_extra == frozen


PEFT_COMPARISON = {
    "method=hira r=32": 9_175_040,
    "method=lora r=32": 9_175_040,
    "method=dora r=32": 9_289_728,
    "method=vera r=256": 129_024,
    "method=boft": 802_816,
    "method=prompt_tuning num_virtual_tokens=200": 614_400,
    "method=p_tuning": 28_382_208,
}


@pytest.mark.parametrize(("words", "trainable"), PEFT_COMPARISON.items())
def test_peft_method_comparison(params, words, trainable):
    """Llama-3.2-3B, q and v, as listed in huggingface/peft method_comparison/MetaMathQA."""
    assert params(f"model=llama3.2_3b placement=qv {words}").trainable == trainable


def test_bitfit(params):
    assert params("model=qwen2.5_7b method=bitfit").trainable == 129_024  # q, k and v
    assert params("model=roberta_large method=bitfit").trainable == 271_360  # linear layers and norms of the encoder


def test_full_fine_tuning_trains_everything(params):
    found = params("model=llama3_8b method=full")
    assert (found.trainable, found.percent) == (8_030_261_248, 100.0)
