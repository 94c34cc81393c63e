"""Builds the host's trainer with several numbers of ranks, and records what it begins with.

    python tests/run_initial_values.py SCENARIOS.json OUT

SCENARIOS.json maps a name to a number of ranks and the arguments of ``torchtitan.train``. Every
rank writes OUT.<name>.<rank>.json: digests of all parameters of its part of the model, whole
whatever their sharding, of every expert by itself, and of the generator's state afterwards. Nothing
is trained. The host is imported once, and every rank is a fork of this process, which has no
threads: a fork has none of them, and what they had locked stays locked in it for ever.
"""

import hashlib
import importlib
import json
import multiprocessing
import os
import sys
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from run_trainer import open_store

from ezpz_moe.hosts.detect import check_host, host
from ezpz_moe.hosts.titan_0_2.v0_2 import Titan02


def main(scenarios: str, out: str) -> None:
    check_host()
    module = "train" if type(host()) is Titan02 else "trainer"
    Trainer = importlib.import_module(f"torchtitan.{module}").Trainer
    from torchtitan.config import ConfigManager
    from torchtitan.tools.logging import init_logger

    init_logger()
    fork = multiprocessing.get_context("fork")
    os.environ |= {"MASTER_ADDR": "localhost", "TORCHELASTIC_USE_AGENT_STORE": "False"}
    for name, (ranks, arguments) in json.loads(Path(scenarios).read_text()).items():
        os.environ |= {"WORLD_SIZE": str(ranks), "RANK": "0"}
        sys.argv[1:] = arguments  # 0.2's door looks at it
        config = ConfigManager().parse_args(arguments)
        children = [
            fork.Process(target=_build_and_save, args=(Trainer, config, rank, f"{out}.{name}"))
            for rank in range(ranks)
        ]
        for child in children:
            child.start()
        _wait_for(children)
        if any(child.exitcode for child in children):
            raise SystemExit(f"scenario {name!r} failed")


def _wait_for(ranks: list[BaseProcess]) -> None:
    """When one fails, the others are ended, which would wait for it."""
    running = {rank.sentinel: rank for rank in ranks}
    while running:
        for ended in wait(running):
            if running.pop(ended).exitcode:
                for rank in running.values():
                    rank.kill()


def _build_and_save(Trainer: type, config: object, rank: int, out: str) -> None:
    store = open_store(Path(f"{out}.port"), rank)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_PORT": str(store.port)}
    trainer = Trainer(config)
    generator = _digest(torch.get_rng_state())
    whole = {
        _plain(name): parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
        for part in trainer.model_parts
        for name, parameter in part.named_parameters()
    }
    record = {
        "parameters": {name: _digest(tensor) for name, tensor in whole.items()},
        "experts": {
            name: [_digest(expert) for expert in tensor]
            for name, tensor in whole.items()
            if tensor.ndim > 2
        },
        "generator": generator,
    }
    Path(f"{out}.{rank}.json").write_text(json.dumps(record))
    torch.distributed.barrier()
    trainer.close()


def _plain(name: str) -> str:
    """A pipeline's parts are wrapped by activation checkpointing each in its own way."""
    return name.replace("_checkpoint_wrapped_module.", "")


def _digest(tensor: torch.Tensor) -> str:
    data = tensor.detach().contiguous().view(torch.uint8)
    return hashlib.sha256(data.numpy()).hexdigest()


if __name__ == "__main__":
    main(*sys.argv[1:])
