"""Runs the host's trainer in this process, and records what it computed.

    python tests/run_trainer.py OUT ARGUMENTS

ARGUMENTS are those of ``torchtitan.train``. Every rank writes OUT.<rank>: losses and gradient
norms of every step, the gradients of the first step (thinned out where they are large) and a
digest of every parameter as it is made and after the last step, all whole whatever their sharding,
the biases of the experts' choice, and which backend every experts module has chosen.
``trainer_runs.py`` starts the ranks as forks of a process that has imported the host. The host is
any that we bind.
"""

import hashlib
import importlib
import os
import sys
import time
from functools import partial
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ezpz_moe.hosts.detect import host
from ezpz_moe.hosts.titan.base import titan
from ezpz_moe.hosts.titan_0_2.v0_2 import Titan02

ONE_UNIT = 2.0**-7
"""Distance of neighbouring bfloat16 numbers, whose significand has 8 bits, relative to 1."""

KEPT_ELEMENTS = 2**18

SKEWED_EXPERTS = (0, 1, 6)
"""Two of the first half of eight experts and one of the second, as two ranks share them out."""


def main(out: str, *arguments: str) -> None:
    from torchtitan.tools.logging import init_logger

    host = importlib.import_module(f"torchtitan.{'train' if is_titan_0_2() else 'trainer'}")
    host.time = _Clock()
    init_logger()
    rank = int(os.environ["RANK"])
    store = open_store(Path(f"{out}.port"), rank)
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "False", "MASTER_PORT": str(store.port)}
    record = run(list(arguments))
    torch.save(record, f"{out}.{rank}")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def open_store(file: Path, rank: int) -> torch.distributed.TCPStore:
    """The store of the ranks of one run, whose port they find in ``file``.

    Rank 0 opens it at a port of the system's choice, as one that the process group will share,
    so that no other process can take the port in between.
    """
    address = os.environ["MASTER_ADDR"]
    if rank == 0:
        own = torch.distributed.TCPStore(
            address, 0, is_master=True, multi_tenant=True, wait_for_workers=False
        )
        file.with_suffix(".new").write_text(str(own.port))
        file.with_suffix(".new").rename(file)
        return own
    while not file.exists():
        time.sleep(0.005)
    return torch.distributed.TCPStore(address, int(file.read_text()))


class _Clock:
    """``time`` for the trainer, which would sleep two seconds after each run, for other ranks."""

    def __getattr__(self, name: str) -> object:
        return getattr(time, name)

    def sleep(self, seconds: float) -> None:
        pass


def is_titan_0_2() -> bool:
    return type(host()) is Titan02


def run(arguments: list[str]) -> dict:
    """Train as ``torchtitan.train`` would, but for ten flags of our own.

    ``--rounding-noise=SEED`` perturbs the experts' outputs; ``--skewed-routing``, for a seed
    checkpoint, has every token choose the same experts; ``--count-on-cpu`` lets 0.2's own models
    route; ``--same-sequences`` has a step train on the same sequences however they are cut into
    microbatches and shared out to ranks (torchtitan 0.3), and ``--documents`` beside it cuts each
    into documents of its own lengths;
    ``--infinite-logit`` bars an expert of the last layer by a bias of the gate's that is -inf;
    ``--layers=N`` leaves the first N layers of the model, with narrow experts (torchtitan 0.3 or
    later); ``--tiny-bases`` gives the host the sizes of ``hf_cases`` (torchtitan 0.3);
    ``--count-sent`` records the shape of all that forward sends by all-to-all (torchtitan 0.3);
    ``--count-collectives`` records operator, shape and bytes of all that the last step sends;
    ``--side-stream`` has shared experts started first as on a device with streams, and records of
    how many rows (torchtitan 0.3).
    """
    own_flags, sys.argv[1:] = _own_flags(arguments)  # 0.2's door looks at sys.argv
    if "--tiny-bases" in own_flags:
        import hf_cases
        import pytest  # not above: beside pytest, tyro spends a second on checks of itself

        hf_cases.add_tiny_bases(pytest.MonkeyPatch())
    started = []
    if "--side-stream" in own_flags:
        started = _have_streams()
    trainer, Experts, MoE = _built_trainer(sys.argv[1:], own_flags.get("--layers"))
    if "--count-on-cpu" in own_flags:
        from ezpz_moe.hosts.titan_0_2.router import count_on_cpu

        for part in trainer.model_parts:
            count_on_cpu(part)
    modules = [module for part in trainer.model_parts for module in part.modules()]
    if "--skewed-routing" in own_flags:
        for module in modules:
            if isinstance(module, MoE):
                bias_E = module.expert_bias if is_titan_0_2() else module.expert_bias_E
                bias_E[list(SKEWED_EXPERTS)] = 10.0  # scores are below 1
    if "--checkpoint.create-seed-checkpoint" in arguments:
        trainer.checkpointer.save(curr_step=0, last_step=True)
        trainer.close()
        return {}
    if "--infinite-logit" in own_flags:
        last = [module for module in modules if isinstance(module, MoE)][-1]
        last.router.gate.bias.register_hook(torch.nan_to_num)
        with torch.no_grad():
            _whole(last.router.gate.bias)[0] = -torch.inf
    if "--same-sequences" in own_flags:
        cut = "--documents" in own_flags
        trainer.batch_generator = partial(_same_sequences, trainer, has_documents=cut)
    experts = [module for module in modules if isinstance(module, Experts)]
    if "--rounding-noise" in own_flags:
        noise = torch.Generator().manual_seed(int(own_flags["--rounding-noise"]))
        for module in experts:
            # What dispatches too adds an expert's rows up: there it is the last product's rows.
            rows = getattr(module, "w2", None)
            rows = rows if isinstance(rows, torch.nn.Module) else module
            rows.register_forward_hook(partial(_round_once_more, noise))
    record = {"losses": [], "gradient_norms": [], "gradients": {}, "sent": [], "started": started}
    if "--count-sent" in own_flags:
        _count_sent(record["sent"])
    _record_gradients(trainer, record)
    _record_metrics(trainer.metrics_processor, record)
    record["first_parameters"] = _digests(trainer)
    if "--count-collectives" in own_flags:
        with Collectives() as counting:
            _clear_before_each_step(trainer, counting.seen)
            trainer.train()
        record["collectives"] = counting.seen
    else:
        trainer.train()
    record["parameters"] = _digests(trainer)
    record["biases"] = {
        name: buffer.clone()
        for part in trainer.model_parts
        for name, buffer in part.named_buffers()
        if "expert_bias" in name
    }
    record["experts"] = [type(module).__name__ for module in experts]
    record["backends"] = [getattr(module, "compute_backend", "none") for module in experts]
    trainer.close()
    return record


def _same_sequences(trainer, dataloader, *, has_documents):
    """This rank's microbatches of steps whose sequences depend on the step and its size alone.

    Every sequence ends in padding (token 0) of another length, but the first, which has none, and
    is one document, or several of a length that no other sequence's have.
    """
    from ezpz_moe.hosts.titan.labelled import COUNTED, is_labelled

    config, dims = trainer.config, trainer.parallel_dims
    ranks = dims.dp_replicate * dims.dp_shard
    rank = dims.get_mesh("batch").get_local_rank() if dims.dp_enabled else 0
    size = config.training.local_batch_size
    if dims.pp_enabled:
        size = config.parallelism.pipeline_parallel_microbatch_size
    whole, length = config.training.global_batch_size, config.training.seq_len
    for step in range(config.training.steps):
        draw = torch.Generator().manual_seed(step)
        tokens_BL = torch.randint(1, 2048, (whole, length + 1), generator=draw)
        for sequence, tokens_L in enumerate(tokens_BL):
            tokens_L[length + 1 - sequence * 7 :] = 0
        of_documents_B1 = 31 + 7 * torch.arange(whole).unsqueeze(-1) if has_documents else length
        positions_BL = (torch.arange(length) % of_documents_B1).expand(whole, -1)
        of_rank = slice(rank * whole // ranks, (rank + 1) * whole // ranks)
        of_microbatches = (each[of_rank].split(size) for each in (tokens_BL, positions_BL))
        for of_rank_BL, positions_BL in zip(*of_microbatches, strict=True):
            trainer.metrics_processor.data_loading_times.append(0.0)
            inputs = {"input": of_rank_BL[:, :-1].clone(), "positions": positions_BL.clone()}
            if is_labelled(config.dataloader):  # as if the padding's labels were ignored
                inputs[COUNTED] = inputs["input"] != 0
            yield inputs, of_rank_BL[:, 1:].clone()


def _own_flags(arguments: list[str]) -> tuple[dict[str, str], list[str]]:
    """Our flags with their values, and the other arguments."""
    own = ("--rounding-noise", "--skewed-routing", "--count-on-cpu")
    own += ("--same-sequences", "--documents", "--infinite-logit", "--layers", "--tiny-bases")
    own += ("--count-sent", "--count-collectives", "--side-stream")
    ours = [argument for argument in arguments if argument.startswith(own)]
    flags = {flag: value for flag, _, value in (each.partition("=") for each in ours)}
    return flags, [argument for argument in arguments if argument not in ours]


def _built_trainer(arguments: list[str], layers: str | None) -> tuple:
    """The host's trainer, and its classes of routed experts and MoE layers."""
    from torchtitan.config import ConfigManager

    config = ConfigManager().parse_args(arguments)
    if is_titan_0_2():
        from torchtitan.models.moe.moe import GroupedExperts, MoE
        from torchtitan.train import Trainer

        return Trainer(config), GroupedExperts, MoE
    from torchtitan.models.common.moe import MoE

    if layers is not None:
        _shrink(config.model_spec.model, int(layers))
    return config.build(), titan().experts().HostExperts, MoE


def _shrink(model, layers: int) -> None:
    """Leave the first layers, and in these experts of a hidden dimension of 64, in place."""
    model.layers = model.layers[:layers]
    for _, experts, _, _ in model.traverse(titan().experts().HostExperts.Config):
        if hasattr(experts, "hidden_dim"):  # or its width is that of its linears
            experts.hidden_dim = 64


def _round_once_more(noise: torch.Generator, module, inputs, output):
    """Move one value in twelve by one unit: the variance of a rounding to nearest, unit^2 / 12."""
    draw = torch.rand(output.shape, generator=noise)
    direction = (draw < 1 / 24).float() - (draw > 23 / 24).float()
    return (output * (1 + ONE_UNIT * direction)).type_as(output)


def _count_sent(sent: list) -> None:
    """Append the shape of every floating-point tensor that a dispatcher sends in forward."""
    from torchtitan.models.common import token_dispatcher

    all_to_all_single = token_dispatcher.all_to_all_single

    def counting(rows, *arguments, **more):
        if rows.is_floating_point():
            sent.append(tuple(rows.shape))
        return all_to_all_single(rows, *arguments, **more)

    token_dispatcher.all_to_all_single = counting


def _clear_before_each_step(trainer, seen: list) -> None:
    train_step = trainer.train_step

    def train_step_alone(*args, **kwargs):
        seen.clear()
        return train_step(*args, **kwargs)

    trainer.train_step = train_step_alone


class Collectives(TorchDispatchMode):
    """Notes the operator, the shape and the bytes of the tensor of every collective.

    Of a tensor that is gathered, or scattered, the whole.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, tuple[int, ...], int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "_c10d_functional") and "wait" not in str(func):
            tensors = [each for each in tree_leaves(args) if isinstance(each, torch.Tensor)]
            whole = max(tensors, key=torch.Tensor.numel)
            name = str(func).split(".")[1].strip("_")
            self.seen.append((name, tuple(whole.shape), whole.numel() * whole.itemsize))
        return func(*args, **(kwargs or {}))


def _have_streams() -> list:
    """Take the streams of ``torch.cpu``, which order nothing where everything is in order.

    Returns the shapes of what is started on the side one, as it is.
    """
    from ezpz_moe.compute.side_stream import SideStream
    from ezpz_moe.hosts.titan import overlap

    started = []

    class Noted(SideStream):
        def start(self, compute, x, parameters):
            started.append(tuple(x.shape))
            return super().start(compute, x, parameters)

    side = Noted(torch.cpu)
    overlap.side_stream = lambda device: side
    torch.Tensor.record_stream = lambda tensor, stream: None  # which CUDA and XPU alone have
    return started


def _record_gradients(trainer, record: dict) -> None:
    def keep_the_first(*_) -> None:
        if not record["gradients"]:
            record["gradients"] = {
                name: _thinned(_whole(parameter.grad))
                for name, parameter in _parameters(trainer)
                if parameter.grad is not None  # a frozen one has none
            }

    next(iter(trainer.optimizers)).register_step_pre_hook(keep_the_first)


def _record_metrics(metrics_processor, record: dict) -> None:
    log = metrics_processor.log

    def keep(step, global_avg_loss, global_max_loss, grad_norm, **more) -> None:
        record["losses"].append(global_avg_loss)
        record["gradient_norms"].append(grad_norm)
        log(step, global_avg_loss, global_max_loss, grad_norm, **more)

    metrics_processor.log = keep


def _parameters(trainer):
    for part in trainer.model_parts:
        for name, parameter in part.named_parameters():
            yield (
                name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", ""),
                parameter,
            )


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _thinned(tensor: torch.Tensor) -> torch.Tensor:
    """Elements at even distances, at most KEPT_ELEMENTS of them."""
    return tensor.flatten()[:: 1 + tensor.numel() // KEPT_ELEMENTS].clone()


def _digests(trainer) -> dict[str, str]:
    return {name: digest(_whole(parameter)) for name, parameter in _parameters(trainer)}


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy()).hexdigest()


if __name__ == "__main__":
    main(*sys.argv[1:])
