"""`highrank show`: what a run was and what came out, in every state; and what differs between two."""

import json
import os
import time

import pytest


def test_a_finished_run_is_shown_with_its_scores(outputs, highrank):
    run = outputs / "2026-01-01/lora"
    results = json.loads((run / "results.json").read_text())
    status, out, _ = highrank("show", run)
    assert status == 0
    assert out.startswith("lora on tiny_llama: done\n")
    assert "method: lora (r=4, " in out
    assert "training: lr=0.001 " in out
    assert f"trainable / total: {results['params']['trainable']:,} / " in out
    before, after = (results["metrics"][when]["sets"]["wordmath"]["loss"] for when in ("before", "final"))
    assert f"wordmath\tloss\t{before:.4f}\t{after:.4f}\t{after - before:+.4f}\n" in out
    assert f"  highrank eval {run}\n" in out


def test_a_terminal_gets_tables(outputs, highrank, terminal):
    _, out, _ = highrank("show", outputs / "2026-01-01/lora")
    assert "│ method            │ lora (r=4, " in out
    _, out, _ = highrank("show", outputs / "2026-01-01/lora", "--against", outputs / "2026-01-01/hira")
    assert "│ method " in out
    assert "other: outputs/2026-01-01/hira" in out


def test_a_run_that_is_going_says_how_far_it_is(outputs, highrank):
    run = outputs / "2026-01-01/running"
    _, out, _ = highrank("show", run)
    assert out.startswith("hira on tiny_llama: running, last written ")
    assert "still going?" not in out
    assert f"highrank watch {run}" in out
    for file in run.rglob("*"):
        os.utime(file, times=(time.time() - 7200,) * 2)
    _, out, _ = highrank("show", run)
    assert "last written 2 h 0 min ago; is it still going?" in out


def test_a_failed_run_says_why_and_a_new_one_shows_what_there_is(outputs, highrank):
    _, out, _ = highrank("show", outputs / "2026-01-01/failed")
    assert out.startswith("hira on tiny_llama: failed: the loss went away at step 1 of 3\n")
    (outputs / "new").mkdir()
    (outputs / "new/results.json").write_text('{"status": "running", "config_hash": "0"}')
    status, out, _ = highrank("show", outputs / "new")
    assert status == 0
    assert out.startswith("a run on its model: running")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "the following arguments are required: run; use: highrank show RUN [--against RUN]"),
        (["outputs"], "got outputs, which holds runs: outputs/2026-01-01/damaged, outputs/2026-01-01/failed, "),
        (["outputs/notes"], "got outputs/notes, which has no results.json"),
        (["outputs/2026-01-01/hirra"], "which is not there; did you mean 'hira'?"),
        (["outputs/2026-01-01/hira/config.yaml"], "a file"),
        (["outputs/2026-01-01/damaged"], "run: results.json is damaged, got Unterminated string"),
        (["outputs/2026-01-01/hira", "--against", "outputs"], "show: a run directory is needed, got outputs"),
    ],
)
def test_what_is_no_whole_run_is_said_with_what_it_is(outputs, highrank, words, said):
    status, out, err = highrank("show", *words)
    assert (status, out) == (2, "")
    assert said in err


def test_a_sweep_and_a_dry_run_are_named_as_such(outputs, highrank):
    for name, file, said in (("s", "sweep.json", "a sweep; highrank runs"), ("d", "plan.json", "a dry run;")):
        (outputs / name).mkdir()
        (outputs / name / file).write_text("{}")
        assert said in highrank("show", outputs / name)[2]


def test_two_runs_differ_in_the_keys_that_differ(outputs, highrank):
    one, other = outputs / "2026-01-01/lora", outputs / "2026-01-01/hira"
    status, out, _ = highrank("show", one, "--against", other)
    assert status == 0
    lines = out.splitlines()
    keys = lines[lines.index("key\tthis\tother") + 1 : lines.index("result\tthis\tother\tdifference")]
    differing = dict(line.split("\t", 1) for line in keys)
    assert differing["method"] == "lora\thira"
    assert differing["r"] == "4\t2"
    assert differing["lr"] == "0.001\t0.005"
    assert differing["seed"] == "1\t0"
    assert differing["R"] == "–\tw0"
    assert not {"run_dir", "placement", "batch_size"} & differing.keys()
    loss = [json.loads((run / "results.json").read_text())["metrics"]["final"]["loss"] for run in (one, other)]
    assert f"wordmath loss\t{loss[0]:.4f}\t{loss[1]:.4f}\t{loss[0] - loss[1]:+.4f}" in lines
    trainable = [json.loads((run / "results.json").read_text())["params"]["trainable"] for run in (one, other)]
    assert f"trainable\t{trainable[0]:,}\t{trainable[1]:,}\t× {trainable[0] / trainable[1]:.3g}" in lines


def test_a_run_against_itself_and_against_one_that_is_going(outputs, highrank):
    hira, running = outputs / "2026-01-01/hira", outputs / "2026-01-01/running"
    _, out, _ = highrank("show", hira, "--against", hira)
    assert "Their configs are the same." in out
    status, out, _ = highrank("show", hira, "--against", running)
    assert status == 0
    assert "status\tdone\trunning\t" in out
    assert "steps\t3\t–\t" in out


@pytest.mark.parametrize("name", ["config.yaml", "adapter/adapter.json"])
def test_a_run_that_has_lost_a_file_says_so_and_offers_nothing_that_needs_it(outputs, highrank, name):
    run = outputs / "2026-01-01/lora"
    (run / name).unlink()
    status, out, _ = highrank("show", run)
    assert status == 0
    assert f"missing: {name}, without which it is neither evaluated nor merged; bring it back\n" in out
    assert "highrank eval" not in out
