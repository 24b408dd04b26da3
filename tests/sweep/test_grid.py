"""From a sweep's words to its cells."""

import pytest

from highrank.base.errors import UserError
from highrank.cli import main
from highrank.config.words import compose_run
from highrank.sweep.grid import expand
from highrank.sweep.sweep import Sweep

TINY = ["model=tiny_llama", "task.n_train=8", "task.n_test=2"]


def axes_of(*words):
    return [cell.axes for cell in expand([*TINY, *words]).cells]


def test_every_value_meets_every_other():
    assert axes_of("method=hira,lora", "r=2,4", "seed=range(0,2)") == [
        {"method": m, "r": r, "seed": s} for m in ("hira", "lora") for r in (2, 4) for s in (0, 1)
    ]


def test_a_cell_is_a_run_of_its_own():
    for cell in expand([*TINY, "method=hira,hyperadapt", "r=2,4", "placement=[q,v],fc"]).cells:
        assert compose_run(cell.words).hash == cell.run.hash


def test_cells_that_mean_the_same_run_are_one():
    assert axes_of("method=lora,hyperadapt", "r=2,4") == [
        {"method": "lora", "r": 2},
        {"method": "lora", "r": 4},
        {"method": "hyperadapt"},
    ]
    assert axes_of("method=hyperadapt,lora", "r=2", "alpha=4") == [{"method": "hyperadapt"}, {"method": "lora"}]
    assert len(axes_of("placement=qv,[v,q]")) == 1
    assert len(axes_of("method=full,prompt_tuning", "placement=q,v")) == 2  # placement means nothing to either
    assert len(axes_of("method=hira", "method.r=2,4")) == 2


def test_values_have_their_types():
    assert axes_of("lr=1e-3,2e-3", "R=w0,ones", "eval_before=true,false")[0] == {
        "lr": 1e-3,
        "R": "w0",
        "eval_before": True,
    }


def test_the_order_of_the_words_does_not_matter_to_the_method():
    assert len(axes_of("r=2,4", "method=hira,hyperadapt")) == 3


def test_cases_vary_together():
    found = axes_of("method=hilora", "cases=[{r1:2,r2:30},{r1:4,r2:28}]", "seed=0,1")
    assert [(own["r1"], own["r2"], own["seed"]) for own in found] == [(2, 30, 0), (2, 30, 1), (4, 28, 0), (4, 28, 1)]
    assert axes_of("cases=[{method:lora,r:8,lr:1e-3},{method:hyperadapt}]") == [
        {"method": "lora", "r": 8, "lr": 1e-3},
        {"method": "hyperadapt"},
    ]


def test_members_of_a_family_are_values():
    cells = expand(["method=lora", "model=tiny_bert", "task=glue/cola,glue/rte"]).cells
    assert [cell.run.task_cfg.member for cell in cells] == ["cola", "rte"]


def test_a_presets_axes_give_way_to_the_command_line():
    preset = expand(["experiment=hira/table5_placement"])
    assert preset.axes["placement"] == ["fc", "qv", "qkv", "qk", "v", "q", "k"]
    assert len(expand(["experiment=hira/table5_placement", "placement=q"]).cells) < len(preset.cells)
    assert expand(["experiment=hira/table5_placement", "placement=q,k"]).axes["placement"] == ["q", "k"]
    assert expand(["experiment=hira/commonsense170k", "method=hira", "lr=1e-3", "batch_size=8"]).axes == {
        "model": ["llama3_8b", "llama2_7b"],
        "r": [32, 16],
        "dropout": [0.05],
    }
    found = expand(["experiment=hira/commonsense170k", "method=hira", "model=llama3_8b", "lr=1e-3", "batch_size=8"])
    assert [cell.axes for cell in found.cells] == [{"r": 32}, {"r": 16}]  # dropout is no field of hira


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["method=hira,hirra"], "unknown name, got method=hirra"),
        (["method=hira,lora", "rank=2,4"], "no field 'rank'"),
        (["r=2,-1", "method=hira"], "r=-1: hira: r must be >= 1"),
        (["lr=1e-3,-1"], "lr must be a positive number, got lr=-1"),
        (["lr=interval(0.1,1)"], "an axis has listed values"),
        (["cases=[{r:2},3]"], "cases is a list of mappings"),
        (["seed=0,"], "config:"),
        (["method"], "give key=value, got method"),
    ],
)
def test_an_impossible_cell_is_said_before_anything_starts(words, said):
    with pytest.raises(UserError) as error:
        Sweep([*TINY, *words], main).plan()
    assert said in str(error.value)


def test_every_impossible_cell_is_listed():
    with pytest.raises(UserError) as error:
        expand([*TINY, "lr=1,-1,-2"])
    assert "lr=-1: " in str(error.value)
    assert "lr=-2: " in str(error.value)


def test_a_sweeps_own_key_may_have_a_plus():
    words = [*TINY, "method=hira,lora"]
    given = [Sweep([*words, word], main) for word in ("+jobs=2", "jobs=2")]
    assert [sweep.launcher.jobs for sweep in given] == [2, 2]
