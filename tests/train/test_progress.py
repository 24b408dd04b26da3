"""What a log says of a run that is under way."""

import re
import threading

import pytest
from lightning.pytorch.callbacks import RichProgressBar

from highrank.base import console as console_module
from highrank.base.console import arriving, console
from highrank.train.progress import Progress, duration, progress, shown

TINY = ["model=tiny_llama", "batch_size=2", "task.n_train=8", "task.n_test=8", "eval_batch_size=2", "r=2"]


def test_a_log_gets_steps_with_their_loss_and_test_sets_by_quarters(run_cli, tmp_path):
    status, out, err = run_cli(*TINY, "max_steps=20", "accumulate=2", f"run_dir={tmp_path / 'run'}")
    assert status == 0
    assert "%|" not in err
    assert re.findall(r"^step (\d+)/20: loss \d+\.?\d*", out, re.M) == ["1", "10", "12", "14", "16", "18", "20"]
    left = [bool(re.search(r", about \d+ s left$", line)) for line in out.splitlines() if line.startswith("step ")]
    assert left == [False, *5 * [True], False]
    said = re.findall(r"^wordmath: (\d) of 8 evaluated$", out, re.M)
    assert said == 2 * ["2", "4", "6", "8"]
    assert out.splitlines()[-1] == str(tmp_path / "run")


def test_a_terminal_gets_lightnings_bar_and_the_time_left_once(monkeypatch):
    monkeypatch.setattr(console, "is_interactive", True)
    bar, line = progress()
    assert isinstance(bar, RichProgressBar)
    assert not line.lines
    monkeypatch.setattr(console, "is_interactive", False)
    assert [type(callback) for callback in progress()] == [Progress]


def test_lines_are_few_however_many_steps_there_are():
    assert [step for step in range(1, 41) if shown(step, 40)] == [1, 10, 12, 16, 20, 24, 28, 32, 36, 40]
    assert sum(shown(step, 10_000) for step in range(1, 10_001)) == 102


@pytest.mark.parametrize(
    ("seconds", "said"), [(3.6, "4 s"), (80, "1 min 20 s"), (119.9, "2 min 0 s"), (3900, "1 h 5 min")]
)
def test_a_time_is_told_in_its_two_largest_units(seconds, said):
    assert duration(seconds) == said


def test_a_download_is_told_of_by_tenths(monkeypatch, capsys):
    monkeypatch.setattr(console_module, "LOOK_S", 0.001)
    sizes, over = iter([0, 9, 10, 19, 20, 55, 100, 130]), threading.Event()

    def arrived():
        size = next(sizes, None)
        if size is None:
            over.set()
        return size or 0

    with arriving("model", 100_000_000, lambda: 1_000_000 * arrived()):
        assert over.wait(60)
    assert re.findall(r"^model: (\d+) % of 100 MB$", capsys.readouterr().out, re.M) == ["10", "20", "50", "100"]
