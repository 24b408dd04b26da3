"""What the README promises, as somebody who has nothing of ours: fresh clone, fresh environment, empty home, no caches.

    python3 .ci/stranger.py first     the README's first command, literally; the main job must gain at least 40 points
    python3 .ci/stranger.py second    its second command: the tests end green
    python3 .ci/stranger.py second FOLDER    the same; its environment stays, in FOLDER/venv
    python3 .ci/stranger.py wheel     the built wheel, without a clone: the main job from an empty folder

Exit status 0 if it holds. Standard library only; packages come from pip's configured index.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OURS = ("HIGHRANK_", "HF_", "TRANSFORMERS_", "XDG_", "PYTEST_", "PYTHON", "VIRTUAL_ENV", "OMP_", "TOKENIZERS_")
GAIN = 40
"""Points of accuracy that the main job must gain."""


def commands() -> list[str]:
    """Returns the first two bash blocks under the README's first heading."""
    section = (ROOT / "README.md").read_text().split("\n## ", 2)[1]
    found = re.findall(r"```bash\n(.*?)```", section, re.DOTALL)[:2]
    if len(found) != 2:
        sys.exit(f"README: two bash blocks are needed under its first heading, got {len(found)}")
    return found


def stranger(folder: Path) -> dict[str, str]:
    """Returns the variables of somebody with an empty home and a fresh environment in `folder`."""
    (folder / "home").mkdir()
    env = {key: value for key, value in os.environ.items() if not key.startswith(OURS)}
    env |= {"HOME": str(folder / "home"), "PIP_NO_CACHE_DIR": "1"}
    subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True, env=env)
    return env | {"PATH": f"{folder / 'venv' / 'bin'}{os.pathsep}{env['PATH']}"}


def run(command: str, cwd: Path, env: dict[str, str]) -> list[str]:
    """Runs a command, shows what it prints, and returns its lines; ends this program if it fails."""
    lines = []
    with subprocess.Popen(
        ["bash", "-ec", command], cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
    ) as process:
        for line in process.stdout or ():
            print(line, end="", flush=True)
            lines.append(line.strip())
    if process.returncode:
        sys.exit(f"a stranger's command must hold, got exit status {process.returncode} of: {command.strip()}")
    return lines


def check_gain(folder: Path) -> None:
    """Ends this program unless a run directory's main job is done and has gained enough."""
    results = json.loads((folder / "results.json").read_text())
    before, final = (results["metrics"][when]["accuracy"] for when in ("before", "final"))
    print(f"main job: {results['status']}, accuracy {before:.1f} -> {final:.1f}, {results['time']}", flush=True)
    if results["status"] != "done" or final - before < GAIN:
        sys.exit(f"main job: it must gain {GAIN} points, got {final - before:.1f}")


def main(what: str, kept: str | None = None) -> None:
    with nullcontext(kept) if kept else tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        env, clone = stranger(folder), folder / "clone"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        if what == "wheel":
            run("pip wheel --quiet --no-deps --wheel-dir wheel ./clone", folder, env)
            run("pip install --quiet -c clone/constraints.txt wheel/*.whl && rm -rf clone wheel", folder, env)
            (folder / "empty").mkdir()
            lines = run("highrank run method=hira placement=fc_qkv r=16", folder / "empty", env)
            check_gain(folder / "empty" / lines[-1])
        elif what == "first":
            check_gain(clone / run(commands()[0], clone, env)[-1])
        else:
            lines = run(commands()[1], clone, env)
            if not re.search(r"\d+ passed", lines[-1]) or "failed" in lines[-1]:
                sys.exit(f"tests: they must end green, got {lines[-1]}")


if __name__ == "__main__":
    if sys.argv[1:2] not in (["first"], ["second"], ["wheel"]) or len(sys.argv) > 3:
        sys.exit("usage: stranger.py first|second|wheel [FOLDER]")
    main(*sys.argv[1:])
