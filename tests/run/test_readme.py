"""What the README shows is what happens."""

import importlib
import re
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from highrank.base import registry
from highrank.model.backbones import load_backbone
from highrank.model.method import Site

pytestmark = pytest.mark.integration

DOCS = Path(__file__).parents[2] / "docs"
README = (DOCS.parent / "README.md").read_text()


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """The README's example, installed as a distribution of its own with its entry point."""
    code = re.search(r'```python\n(""".*?)```', README, re.DOTALL)[1]
    entry = re.search(r"```toml\n\[project.entry-points.\"(.*?)\"\]\n(.*?)\n```", README, re.DOTALL)
    (tmp_path / "your_package").mkdir()
    (tmp_path / "your_package" / "__init__.py").touch()
    (tmp_path / "your_package" / "rowscale.py").write_text(code)
    info = tmp_path / "your_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: your_package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{entry[1]}]\n{entry[2].replace(chr(34), '')}\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    yield registry.load("methods", "rowscale")
    registry._registered["methods"].pop("rowscale")
    sys.modules.pop("your_package.rowscale")


def test_the_example_method_works(plugin, run_cli):
    cfg = plugin.config(start=0.5)
    adapter = plugin(3, 2, cfg)
    W = torch.randn(2, 3)
    adapter.reset_parameters(W, Site("w", 0, lambda: [W]))
    x = torch.randn(4, 3)
    torch.testing.assert_close(adapter(x, W), x @ (0.5 * W).T)
    assert sum(p.numel() for p in adapter.parameters()) == plugin.num_trainable(3, 2, cfg)
    status, out, err = run_cli("method=rowscale", "start=0.9", "model=tiny_llama", "max_steps=2", "task.n_test=2")
    assert status == 0, err
    assert "rowscale on tiny_llama: done" in out


def test_every_method_is_in_the_table():
    rows = set(re.findall(r"^\| `(\w+)` \|", README, re.MULTILINE))
    assert rows == {name for name, module in registry.available("methods").items() if module.startswith("highrank.")}


@pytest.mark.parametrize(
    "words", re.findall(r"^python run.py (method.*?|model=llama.*?)(?:\s+#.*)?$", README, re.MULTILINE)
)
def test_commands_compose(words):
    from highrank.config.words import compose_run

    compose_run(words.split())


@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")  # of a Trainer that finds no accelerator
@pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning")  # names that TRL calls
def test_the_page_on_the_library_runs_as_it_stands(tmp_path, monkeypatch, run_cli):
    backbone = load_backbone({"name": "tiny_llama", "dtype": "float32"}, None)
    for part in (backbone.model, backbone.tokenizer):
        part.save_pretrained(tmp_path / "path" / "to" / "model")
    monkeypatch.chdir(tmp_path)
    words = ["r=2", "model=tiny_llama", "max_steps=1", "task.n_train=4", "task.n_test=2", "eval_test=false"]
    assert run_cli(*words, "run_dir=path/to/run")[0] == 0
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", (DOCS / "library.md").read_text(), re.DOTALL):
        if "from trl import" in block and find_spec("trl") is None:
            continue
        exec(compile(block, "library.md", "exec"), names)
    assert names["update"].shape == (16, 16)
    assert (tmp_path / "checkpoints" / "checkpoint-2").is_dir()
    assert names["Mine"]().adapters.num_trainable() > 0
    assert names["adapters"].num_trainable() == 704
