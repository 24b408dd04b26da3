"""Builds the wheel that the tests of this folder install."""

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def pip(*words):
    done = subprocess.run([sys.executable, "-m", "pip", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def build_wheel(tree, out):
    """Returns a wheel built from a copy of the tree, which gets its build files instead of the checkout."""
    ignore = shutil.ignore_patterns(".*", "*.egg-info", "build", "dist", "outputs", "__pycache__")
    shutil.copytree(ROOT, tree, ignore=ignore)
    pip("wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(out), str(tree))
    (file,) = out.iterdir()
    return file
