"""One flipped bit, or a cut: is a damaged checkpoint or adapter ever loaded?

    python experiments/reliability/damage.py --saves 100 --json damage.json

Every save is damaged `--per-save` times, each time a fresh copy: one bit anywhere in the file, or a cut at any length. A
checkpoint counts as loaded if `read` returns, an adapter if `Adapters.load` does; both of the adapter's files are hit. A
file that is as it was written must load, or the count would mean nothing.
"""

import argparse
import json
import random
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from highrank.base.errors import UserError
from highrank.base.registry import load
from highrank.config.run_config import RunConfig
from highrank.model.adapters import Adapters, attach
from highrank.model.backbones import load_backbone
from highrank.model.placement import resolve
from highrank.train.checkpoint import Damaged, generators, read, write
from highrank.train.optimizer import make_optimizer


def adapted(method: str = "hira") -> Adapters:
    """Returns the tiny model with an adapter that has been moved off its start."""
    model = load_backbone({"name": "tiny_llama", "dtype": "float32"}, None).model
    cls = load("methods", method)
    adapters = attach(model, resolve(model, "fc_qkv"), cls, cls.config(r=2))
    move(adapters)
    return adapters


def move(adapters: Adapters) -> None:
    with torch.no_grad():
        for _, parameter in adapters.named_parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))


def save_checkpoint(adapters: Adapters, file: Path) -> None:
    """Writes what a training checkpoint holds: weights, an optimizer with moments, random generators."""
    optimizer = make_optimizer(adapters, RunConfig(lr=1e-3))
    for _, parameter in adapters.named_parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    states = {"state_dict": adapters.state_dict(), "optimizer_states": [optimizer.state_dict()]}
    write(file, {"global_step": 1, **states, "processes": [{"generators": generators(torch.device("cpu"))}]})


def damage(raw: bytes, draw: random.Random) -> tuple[str, bytes]:
    """Returns what was done to a file, and the file."""
    if draw.random() < 0.25:
        return "truncation", raw[: draw.randrange(len(raw))]
    bit, flipped = draw.randrange(8 * len(raw)), bytearray(raw)
    flipped[bit // 8] ^= 1 << bit % 8
    return "flipped bit", bytes(flipped)


def loads(load: Callable[[], object]) -> bool:
    try:
        load()
    except (Damaged, UserError):
        return False
    return True


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--saves", type=int, default=100)
    parser.add_argument("--per-save", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    torch.manual_seed(options.seed)
    draw, adapters, counts = random.Random(options.seed), adapted(), dict[str, dict[str, int]]()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        readers: dict[str, Callable[[], object]] = {
            "last.ckpt": lambda: read(folder / "last.ckpt"),
            "adapter.safetensors": lambda: adapters.load(folder),
            "adapter.json": lambda: adapters.load(folder),
        }
        for _ in range(options.saves):
            move(adapters)
            adapters.save(folder)
            save_checkpoint(adapters, folder / "last.ckpt")
            for name, load_file in readers.items():
                raw = (folder / name).read_bytes()
                for _ in range(options.per_save):
                    kind, damaged = damage(raw, draw)
                    (folder / name).write_bytes(damaged)
                    found = counts.setdefault(f"{name}, {kind}", {"tried": 0, "survived": 0})
                    found["tried"] += 1
                    found["survived"] += not loads(load_file)
                (folder / name).write_bytes(raw)
                if not loads(load_file):
                    raise SystemExit(f"{name} does not load as it was written")
    for what, found in counts.items():
        silent = found["tried"] - found["survived"]
        print(f"{what}: tried {found['tried']}, survived {found['survived']}, silent loads {silent}")
    if options.json:
        options.json.write_text(json.dumps({"saves": options.saves, "damages": counts}, indent=1) + "\n")


if __name__ == "__main__":
    main()
