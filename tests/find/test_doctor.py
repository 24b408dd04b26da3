"""`highrank doctor`: a line per thing that a run depends on, with the fix where one is needed."""

import errno
import importlib.metadata

import pytest

from highrank.base import hub
from highrank.find import doctor
from highrank.find.doctor import examined


@pytest.fixture
def sound(monkeypatch, tmp_path):
    """Makes what differs from machine to machine the same."""
    monkeypatch.chdir(tmp_path)
    for key in ("HIGHRANK_CACHE", "HF_HOME", "HIGHRANK_DATA"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("HIGHRANK_CACHE", str(tmp_path / "cache"))


def lines(check):
    return [(line.state, line.what) for line in examined(check)]


def test_every_check_has_its_line(sound, highrank):
    status, out, _ = highrank("doctor")
    rows = [line.split("\t") for line in out.splitlines()]
    assert rows[0] == ["", "what", "found", "what to do"]
    found = {row[1]: row for row in rows[1:]}
    assert {"Python", "packages", "CPU", "GPU", "float32", "bfloat16", "memory", "cache", "outputs", "data"} <= {
        *found,
        *("GPU" for name in found if name.startswith("cuda:")),
    }
    assert found["Hugging Face Hub"][0] == "note"
    assert found["Hugging Face Hub"][2:] == ["HF_HUB_OFFLINE is set", found["Hugging Face Hub"][3]]
    assert all(row[3] for row in rows[1:] if row[0] == "fix")
    assert status == int(any(row[0] == "fix" for row in rows))


def test_a_terminal_gets_a_table(sound, highrank, terminal):
    assert " to fix" in highrank("doctor")[1]
    assert "│ ok " in highrank("doctor")[1]


def test_a_package_outside_the_tested_range_or_not_there_is_to_be_installed(monkeypatch):
    wanted = ["torch<2", "no-such-package>=3", 'peft<0.1; extra == "bench"', 'no-such-extra; extra == "x"', "rich>=1"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: wanted)
    found = {line.what: line for line in examined(doctor._packages)}
    assert found["torch"].state == found["no-such-package"].state == found["peft"].state == "fix"
    assert found["torch"].fix == 'pip install "torch<2"'
    assert found["no-such-package"].found == "not installed"
    assert "(extra bench)" in found["peft"].found
    assert "no-such-extra" not in found
    assert found["packages"].found.startswith("1 in the tested ranges")


def test_the_pins_of_a_clone_are_compared(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "__file__", str(tmp_path / "src/highrank/find/doctor.py"))
    assert examined(doctor._pins) == []
    rich = importlib.metadata.version("rich")
    (tmp_path / "constraints.txt").write_text(f"# made by\nrich=={rich}\nno-such-package==1\n")
    assert lines(doctor._pins) == [("ok", "pinned versions")]
    (tmp_path / "constraints.txt").write_text("rich==0.1\n")
    (line,) = examined(doctor._pins)
    assert (line.state, line.found.partition(":")[0]) == ("note", f"rich {rich} for 0.1")


def test_a_folder_that_cannot_be_written_and_a_full_disk_are_told(monkeypatch, tmp_path):
    folder = tmp_path / "a/b"
    assert doctor._writable("cache", folder, "HIGHRANK_CACHE").state in ("ok", "note")
    assert not folder.exists()

    def refuse(**words):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", refuse)
    line = doctor._writable("cache", folder, "HIGHRANK_CACHE")
    assert (line.state, line.fix) == ("fix", "HIGHRANK_CACHE=<another folder>")
    assert "Read-only file system" in line.found
    monkeypatch.undo()
    monkeypatch.setattr(doctor, "ENOUGH_DISK", 1e30)
    assert doctor._writable("cache", folder, "HIGHRANK_CACHE").state == "note"


def test_a_data_folder_that_is_none_is_to_be_set(monkeypatch, tmp_path):
    monkeypatch.setenv("HIGHRANK_DATA", str(tmp_path / "none"))
    assert lines(doctor._data) == [("fix", "data")]
    monkeypatch.setenv("HIGHRANK_DATA", str(tmp_path))
    assert lines(doctor._data) == [("ok", "data")]


@pytest.mark.parametrize(
    ("reason", "state", "fix"),
    [(None, "ok", ""), ("HF_HUB_OFFLINE is set", "note", "unset HF_HUB_OFFLINE"), ("ConnectError", "note", "proxy")],
)
def test_the_hub_is_asked_and_not_needed(monkeypatch, reason, state, fix):
    monkeypatch.setattr(hub, "unreachable", lambda: reason)
    (line,) = examined(doctor._network)
    assert line.state == state
    assert fix in line.fix


def test_a_check_that_breaks_is_a_line_too(monkeypatch):
    def _devices():
        yield doctor.Line("ok", "CPU", "2 cores")
        raise ImportError("libtorch.so: cannot open shared object file")

    first, second = examined(_devices)
    assert first.state == "ok"
    assert (second.state, second.what) == ("fix", "devices")
    assert "libtorch.so" in second.found
