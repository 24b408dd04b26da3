"""`highrank completion`: what could stand at the end of a line, and scripts that bash, zsh and fish take."""

import io
import shutil
import subprocess
import sys

import pytest

from highrank.base import registry
from highrank.base.options import Words
from highrank.cli import COMMANDS
from highrank.config import run_config
from highrank.find import completion
from highrank.find.completion import SCRIPTS, offered

NO_TORCH = """
import sys
from highrank.find import completion, runs
for line in ("highrank run ", "highrank run method=lora init=", "highrank run task.", "highrank merge --", "highrank run placement="):
    assert list(completion.offered(line)), line
print([name for name in ("torch", "transformers", "lightning", "hydra", "datasets") if name in sys.modules])
"""


def words(line):
    return [offer.word for offer in offered(line)]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("highrank me", ["methods", "merge"]),
        ("cd x && highrank comp", ["completion"]),
        ("highrank completion ", ["bash", "zsh", "fish"]),
        ("highrank methods hyp", ["hyperadapt"]),
        ("highrank experiments hira/table5", ["hira/table5_placement", "hira/table5_placement_small"]),
        ("highrank run method=hil", ["method=hilora"]),
        ("highrank run -m method=hira,hil", ["method=hira,hilora"]),
        ("highrank run R", ["R=", "R_rank="]),
        ("highrank run method=lora init", ["init="]),
        ("highrank run method=lora init=pis", ["init=pissa"]),
        ("highrank run -m method=hira,lora R", ["R=", "R_rank="]),
        ("highrank run experiment=hyperadapt/glue_small si", ["sides="]),
        ("highrank run task=glue/m", ["task=glue/mrpc", "task=glue/mnli"]),
        ("highrank run task.n_", ["task.n_train=", "task.n_test="]),
        ("highrank run task=math10k task.train_set=1", ["task.train_set=10k", "task.train_set=14k"]),
        ("highrank run placement=fc", ["placement=fc", "placement=fc_qkv"]),
        ("highrank run placement=[q,v,u", ["placement=[q,v,up"]),
        ("highrank run schedule=c", ["schedule=constant", "schedule=cosine"]),
        ("highrank run eval_before=", ["eval_before=false", "eval_before=true"]),
        ("highrank run model=tiny_g", ["model=tiny_gemma", "model=tiny_gpt2"]),
        ("highrank run model.dtype=b", ["model.dtype=bfloat16"]),
        ("highrank run protocol.too", ["protocol.too_long="]),
        ("highrank run protocol.too_long=", ["protocol.too_long=drop", "protocol.too_long=cut"]),
        ("highrank run trainer.precision=bf", ["trainer.precision=bf16-mixed"]),
        ("highrank run trainer.strat", ["trainer.strategy="]),
        ("highrank run sca", ["scale="]),
        ("highrank run launcher=", ["launcher=local", "launcher=ray", "launcher=slurm"]),
        ("highrank run -", ["-m"]),
        ("highrank run pro", ["protocol=", "protocol."]),
        ("highrank merge x --", ["--out", "--dtype", "--accept", "--force"]),
        ("highrank export x --form", ["--format"]),
        ("highrank export x --format l", ["lora"]),
        ("highrank export x task=gs", ["task=gsm8k"]),
        ("highrank combine x --de", ["--density"]),
        ("highrank runs --sort s", ["status", "score", "size"]),
        ("highrank runs --where sch", ["schedule="]),
        ("highrank runs --where schedule=l", ["schedule=linear"]),
        ("highrank run method='hil", ["method=hilora"]),
        ("highrank nothing x", []),
        ("highrank run nothing=", []),
        ("highrank run task=nothing/", []),
        ("highrank methods hira x", []),
    ],
)
def test_a_word_is_completed(line, expected):
    assert words(line) == expected


def test_before_anything_is_typed_every_command_and_key_is_offered():
    assert set(words("highrank ")) == {*COMMANDS, "help"}
    keys = set(words("highrank run "))
    assert {f"{key}=" for key in (*run_config.CORE_KEYS, *run_config.GROUPS, "R", "r", "lr_search", "jobs")} <= keys
    assert {"task.", "model.", "protocol.", "trainer."} <= keys
    assert completion.GROUPS == run_config.GROUPS
    assert set(words("highrank run method=")) == {f"method={name}" for name in registry.available("methods")}


def test_the_options_of_every_command_are_those_it_parses(monkeypatch):
    """They are read from its file: here its parser says which it has."""

    class Parsed(Exception):
        pass

    def stop(parser, *args, **kwargs):
        raise Parsed({word for action in parser._actions for word in action.option_strings})

    for method in ("parse_args", "parse_intermixed_args"):
        monkeypatch.setattr(Words, method, stop)
    for name, place in COMMANDS.items():
        if name in ("run", "completion"):
            continue
        module, function = place.split(":")
        with pytest.raises(Parsed) as parsed:
            getattr(__import__(module, fromlist=[function]), function)(["x"])
        assert set(words(f"highrank {name} -")) == parsed.value.args[0]


def test_runs_and_the_folders_on_the_way_to_them_are_offered(outputs):
    runs = [f"outputs/2026-01-01/{name}" for name in ("damaged", "failed", "hira", "lora", "running")]
    assert sorted(words("highrank show ")) == sorted([*runs, "outputs/"])
    assert words("highrank show out") == ["outputs/"]
    assert words("highrank show outputs/") == ["outputs/2026-01-01/", "outputs/notes/"]
    assert words("highrank eval outputs/2026-01-01/hira outputs/2026-01-01/l") == ["outputs/2026-01-01/lora"]
    assert words("highrank show outputs/2026-01-01/hira --against outputs/2026-01-01/l") == ["outputs/2026-01-01/lora"]
    assert words("highrank export outputs/2026-01-01/l") == ["outputs/2026-01-01/lora"]
    (outputs / "2026-01-01/sweep.json").write_text("{}")
    assert words("highrank watch outputs/2") == ["outputs/2026-01-01", "outputs/2026-01-01/"]
    assert words("highrank eval outputs/2026-01-01/hira task=gs") == ["task=gsm8k"]
    assert words("highrank run output=outputs/n") == ["output=outputs/notes/"]


def test_an_answer_is_lines_of_words_with_meanings_or_what_bash_puts_in(highrank, monkeypatch):
    def answered(line, *breaks):
        monkeypatch.setattr(sys, "stdin", io.StringIO(line))
        status, out, _ = highrank("completion", "answer", *breaks)
        assert status == 0
        return out.splitlines()

    assert answered("highrank run R_") == ["R_rank=\tRank v of R; for R=w0_trunc alone."]
    assert answered("highrank run R_", " =:") == ["R_rank="]
    assert answered("highrank run method=hil", " =:") == ["hilora "]  # bash ends a word at =
    assert answered("highrank run method=hil", " ") == ["method=hilora "]
    assert answered("highrank show nowhere/") == []  # nothing to offer is no error while a person types


def test_a_folder_with_a_space_is_quoted_for_bash(outputs, highrank, monkeypatch):
    shutil.copytree(outputs / "2026-01-01/hira", outputs / "my run")
    monkeypatch.setattr(sys, "stdin", io.StringIO("highrank show outputs/my"))
    assert highrank("completion", "answer", " =:")[1] == "outputs/my\\ run \n"


@pytest.mark.parametrize("shell", SCRIPTS)
def test_a_script_says_where_it_belongs_and_is_the_shells_own_language(shell, highrank):
    status, out, _ = highrank("completion", shell)
    assert status == 0
    assert "completion" in out.splitlines()[0]
    assert "highrank completion answer" in out
    if shutil.which(shell):
        assert subprocess.run([shell, "-n"], input=out, text=True, capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize("words", [[], ["csh"], ["bassh"], ["bash", "zsh"]])
def test_another_shell_is_refused_with_those_there_are(words, highrank):
    status, _, err = highrank("completion", *words)
    assert status == 2
    assert "completion: a shell is needed, got" in err
    assert 'eval "$(highrank completion bash)"' in err


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
def test_bash_completes_with_the_script():
    python = f"{sys.executable} -c 'import highrank.cli, sys; sys.exit(highrank.cli.main(sys.argv[1:]))'"
    script = completion.BASH.replace("| highrank", f"| {python}")
    line = "highrank run method=hil"
    ask = f"{script}\nCOMP_LINE='{line}' COMP_POINT={len(line)}; _highrank; printf '<%s>' \"${{COMPREPLY[@]}}\""
    done = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=True)
    assert done.stdout == "<hilora >"


def test_an_answer_and_a_list_of_runs_import_no_torch():
    """Which is what keeps them fast."""
    done = subprocess.run([sys.executable, "-c", NO_TORCH], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
