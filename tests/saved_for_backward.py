"""Trains one step of a job on the CPU and prints, as JSON, what its forward saves for backward.

    python tests/saved_for_backward.py JOB.toml

A program of its own, because the host keeps global state. It prints the bytes of all storages that
autograd is given to save ("saved"), weights and buffers left out, and what of them is the model's
output alone ("output"): that lives as well, whether saved or not.
"""

import json
import os
import sys

import torch
from torch.distributed.tensor import DTensor

from ezpz_moe.hosts.cpu import import_host_on_cpu


def main(job: str) -> None:
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}
    os.environ |= {"MASTER_PORT": "0"}
    import_host_on_cpu()
    from torchtitan.config import ConfigManager

    trainer = ConfigManager().parse_args(["--module", "ezpz_moe", "--config", job]).build()
    (model,) = trainer.model_parts
    counted: dict = {}

    def step(*args, **kwargs):
        saved: dict[int, torch.UntypedStorage] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = local(tensor).untyped_storage()
            saved[storage._cdata] = storage
            return tensor

        given = [*model.parameters(), *model.buffers(), *args, *kwargs.values()]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = forward(*args, **kwargs)
        given += model.parameters()  # those that FSDP still holds gathered
        for tensor in given:
            if isinstance(tensor, torch.Tensor):
                saved.pop(local(tensor).untyped_storage()._cdata, None)
        own = output.untyped_storage()
        # After forward: those that FSDP has gathered and given back are empty again.
        counted["saved"] = sum(storage.nbytes() for storage in saved.values())
        counted["output"] = 0 if own._cdata in saved else own.nbytes()
        return output

    forward, model.forward = model.forward, step
    trainer.train()
    trainer.close()
    print(json.dumps(counted))


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


if __name__ == "__main__":
    main(sys.argv[1])
