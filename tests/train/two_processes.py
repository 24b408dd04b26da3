"""Run as two processes by test_devices.py: every method's gradients and first step under DDP and under FSDP2.

Prints one line per method and kind: the largest difference to one process that takes both batches.
"""

import json
import sys

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from highrank.base.registry import available, load
from highrank.config.run_config import RunConfig
from highrank.model.adapters import attach
from highrank.model.backbones import load_backbone
from highrank.model.placement import resolve
from highrank.model.sharding import whole
from highrank.train.fsdp import shard
from highrank.train.module import FineTuner


def make(name: str) -> FineTuner:
    model = "tiny_qwen2" if name == "bitfit" else "tiny_llama"
    backbone = load_backbone({"name": model, "dtype": "float32"}, None)
    method = load("methods", name)
    cfg = method.config(**method.examples[0])
    views = resolve(backbone.model, "all") if method.family.changes_weights else []
    adapters = attach(backbone.model, views, method, cfg, tokenizer=backbone.tokenizer)
    with torch.no_grad():
        for _, parameter in adapters.named_parameters():
            generator = torch.Generator().manual_seed(parameter.numel())
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))

    class Kind:
        kind = "generate"

    return FineTuner(adapters, Kind, backbone.tokenizer, RunConfig(lr=0.1), 10)  # type: ignore[arg-type]


class Loss(nn.Module):
    def __init__(self, tuner: FineTuner):
        super().__init__()
        self.tuner = tuner

    def forward(self, batch):
        return self.tuner.loss(batch)[0]


def batch(seed: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(4, 260, (2, 9 + 4 * seed), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def two_steps(tuner: FineTuner, loss_of, batches) -> dict[str, torch.Tensor]:
    """Returns the gradients of the first step and the parameters after the second."""
    parameters = dict(tuner.adapters.named_parameters())
    optimizer = torch.optim.SGD(parameters.values(), lr=0.1)
    found = {}
    for step in range(2):
        optimizer.zero_grad()
        for each in batches:
            (loss_of(each) / len(batches)).backward()
        if step == 0:
            found = {f"gradient of {n}": whole(p.grad).clone() for n, p in parameters.items()}
        optimizer.step()
    return found | tuner.adapters.state_dict()


def main(rank: int, port: str) -> None:
    distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    for name in available("methods"):
        torch.manual_seed(0)
        reference, ddp, fsdp = (make(name).train() for _ in range(3))
        expected = two_steps(reference, Loss(reference), [batch(0), batch(1)])
        shard(fsdp.model, mesh)
        for kind, found in {
            "ddp": two_steps(ddp, DistributedDataParallel(Loss(ddp)), [batch(rank)]),
            "fsdp": two_steps(fsdp, Loss(fsdp), [batch(rank)]),
        }.items():
            difference = max(float((found[key] - expected[key]).abs().max()) for key in expected)
            size = max(float(tensor.abs().max()) for tensor in expected.values())
            if rank == 0:
                print(json.dumps({"method": name, "kind": kind, "difference": difference, "size": size}), flush=True)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
