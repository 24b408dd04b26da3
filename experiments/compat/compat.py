"""Which versions work: builds environments from pyproject.toml's ranges, runs tests in each, draws their table.

    python experiments/compat/compat.py lowest newest                every lower bound; the newest inside the upper ones
    python experiments/compat/compat.py newest --torch tested        with the PyTorch of constraints.txt, as CI does
    python experiments/compat/compat.py tested --python python3.13   constraints.txt on another Python

The newest include Hydra's release candidates. Standard library only; packages come from pip's configured index. An
environment is a temporary folder and goes when its tests have ended. Exit status 0 if all of them are green.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).with_name("results.json")
PAGE = Path(__file__).with_name("table.md")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TOOLS = ("pytest", "pytest-timeout", "pytest-xdist", "peft", "nltk")
"""Of the extra `test`, what the tests below need."""
CANDIDATES = ("hydra-core>=1.4.0rc1", "omegaconf>=2.4.0rc1")
"""Pre-releases that the newest environment takes; each lies inside its range."""
TESTS = [
    "tests/methods",
    "tests/train",
    "tests/run",
    "tests/model/test_internals.py",
    "tests/model/test_backbones.py",
    "tests/config/test_bad_input.py",
    "tests/report/test_dashboard.py",
    "tests/data/test_sources.py",
]
MAIN_JOB = [
    "run.py",
    "model=tiny_llama",
    "method=hira",
    "placement=fc_qkv",
    "r=4",
    "max_steps=4",
    "task.n_train=16",
    "task.n_test=4",
]


def called(requirement: str) -> str:
    return re.split(r"[\[<>=!~; ]", requirement)[0].lower().replace("_", "-")


def requirements() -> dict[str, str]:
    """Returns name -> requirement of the base and of `TOOLS`."""
    base = {called(line): line for line in PROJECT["dependencies"]}
    return base | {n: line for line in PROJECT["optional-dependencies"]["test"] if (n := called(line)) in TOOLS}


def constraints() -> dict[str, str]:
    """Returns name -> version of constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return {called(line): line.partition("==")[2] for line in lines if "==" in line}


def wanted(kind: str, torch: str | None) -> list[str]:
    """Returns what pip is asked for beside the project itself."""
    asked = requirements()
    if kind == "lowest":
        asked = {name: re.sub(r">=([^,]+).*", r"==\1", line) for name, line in asked.items()}
    elif kind == "tested":
        asked = {name: f"{name}=={constraints()[name]}" for name in asked}
    else:
        asked |= {called(line): line for line in CANDIDATES}
    if torch is not None:
        asked["torch"] = f"torch=={constraints()['torch'] if torch == 'tested' else torch}"
    return list(asked.values())


def run(*command: str | Path, **options: Any) -> tuple[int, list[str]]:
    """Runs a command, shows what it prints, and returns its exit status and lines."""
    lines = []
    with subprocess.Popen(
        [str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    ) as process:
        for line in process.stdout or ():
            print(line, end="", flush=True)
            lines.append(line.strip())
    return process.returncode, lines


def tried(kind: str, interpreter: str, torch: str | None) -> dict[str, Any]:
    """Returns what came out of one environment: versions, the tests' closing line, seconds."""
    with tempfile.TemporaryDirectory() as scratch:
        python = Path(scratch) / "venv" / "bin" / "python"
        start = time.monotonic()
        subprocess.run([interpreter, "-m", "venv", Path(scratch) / "venv"], check=True)
        pins = ["-c", ROOT / "constraints.txt"] if kind == "tested" else []
        status, lines = run(python, "-m", "pip", "install", "--quiet", *pins, *wanted(kind, torch), "-e", ROOT)
        built = time.monotonic() - start
        if status:
            return {"holds": False, "versions": {}, "tests": f"not installed: {lines[-1] if lines else status}"}
        code = "import json, sys; from importlib.metadata import version as v; print(sys.version.split()[0]); "
        code += "print(json.dumps({name: v(name) for name in sys.argv[1:]}))"
        _, (version, found) = run(python, "-c", code, *requirements())
        status, lines = run(
            python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not real_model", *TESTS, cwd=ROOT
        )
        output = Path(scratch) / "outputs"
        main_job, _ = run(python, *MAIN_JOB, f"output={output}", cwd=ROOT)
        seconds = time.monotonic() - start - built
    summary = re.sub(r" in [\d.]+s.*", "", lines[-1].strip("= "))
    return {
        "holds": status == 0 and main_job == 0,
        "python": version,
        "versions": json.loads(found),
        "tests": summary,
        "main job": "done" if main_job == 0 else f"exit status {main_job}",
        "seconds": {"install": round(built), "tests": round(seconds)},
    }


def page(results: dict[str, Any]) -> str:
    """Returns the table and what it stands for."""
    columns = list(results)

    def row(title: str, cells: list[str]) -> str:
        return f"| {' | '.join([title, *cells])} |"

    def facts(key: str) -> list[str]:
        return [str(results[name].get(key, "")) for name in columns]

    verdicts = ["holds" if results[name]["holds"] else "**fails**" for name in columns]
    head = row("package, range", columns)
    lines = [head, row("---", ["---"] * len(columns)), row("Python", facts("python"))]
    for name, line in requirements().items():
        limits = re.sub(r"^[\w\-\[\]]+", "", line).replace(",", ", ")
        lines.append(row(f"{name} {limits}", [results[column]["versions"].get(name, "") for column in columns]))
    lines += [row("tests", facts("tests")), row("main job, tiny model", facts("main job"))]
    lines.append(row("verdict", verdicts))
    return f"""# Compatibility

Each column is an environment that was built and tested: all lower bounds of `pyproject.toml`, the newest releases inside its
upper bounds (of Hydra and OmegaConf release candidates too), or `constraints.txt`. A warning is an error in each of them.

```bash
make compat                                                      # lowest and newest, and this page
python experiments/compat/compat.py tested --python python3.13   # constraints.txt on another Python
```

{chr(10).join(lines)}

Run in each: `{" ".join(TESTS)}`, and `python {" ".join(MAIN_JOB)}`; on the CPU, Linux. CI tries the newest of everything but
PyTorch, whose CUDA build is too large to fetch for every change:
it keeps the version of `constraints.txt`.
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="+", choices=("lowest", "newest", "tested"))
    parser.add_argument("--torch", help="a version, or `tested` for that of constraints.txt")
    parser.add_argument("--python", default=sys.executable, help="the interpreter that makes the environment")
    parser.add_argument("--write", action="store_true", help="note what came out, and draw the page again")
    options = parser.parse_args()
    green = True
    for kind in options.kinds:
        result = tried(kind, options.python, options.torch)
        green &= result["holds"]
        name = kind
        if result["versions"]:
            minor = ".".join(result["python"].split(".")[:2])
            name = f"{kind}, Python {minor}" + (f", torch {result['versions']['torch']}" if options.torch else "")
        print(f"{page({name: result})}\n{name}: {'holds' if result['holds'] else 'fails'}, {result}", flush=True)
        if options.write:
            results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
            results[name] = result
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
            PAGE.write_text(page(results))
    return 0 if green else 1


if __name__ == "__main__":
    sys.exit(main())
