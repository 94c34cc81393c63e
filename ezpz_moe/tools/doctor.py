"""What is installed, what the binding relies on, and whether a job fits: ``ezpz-moe doctor``.

Takes seconds and needs no accelerator. This module gathers; the command line prints. It accepts
any host, even one that no binding fits: then it reports the nearest generation's list.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from statistics import mean
from typing import Any, TypeVar

import torch
from torch import nn

from ezpz_moe.compute import Backend, backend_names, get_backend
from ezpz_moe.compute.native import is_emulated
from ezpz_moe.config.flavors import load_flavor
from ezpz_moe.config.job import Job, flavor_of, job_for_flavor
from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts import detect
from ezpz_moe.hosts.host import Host
from ezpz_moe.hosts.installed import host, version
from ezpz_moe.hosts.jobs import find_job
from ezpz_moe.hosts.model_summary import ModelSummary
from ezpz_moe.hosts.parts import TrainerConfig
from ezpz_moe.hosts.precision import REASON, is_host_path, trains_in_float32
from ezpz_moe.hosts.ranks import outside_of_a_run
from ezpz_moe.hosts.reliance import NO_FLAVOR, NO_SIZES, Reliance, in_words
from ezpz_moe.hosts.untested import is_tested, tested_pairs
from ezpz_moe.tools import device
from ezpz_moe.tools.resuming import resumption
from ezpz_moe.tools.verify import default_device

# Nobody needs all of these; without a package, what stands beside it does not work.
OPTIONAL_PACKAGES = {
    "triton": "torch.compile on accelerators",
    "torchao": "quantized experts of torchtitan's own configs",
    "deep_ep": 'parallelism.expert_parallel_comm_backend = "deepep" and "hybridep"',
    "wandb": "metrics.enable_wandb",
    "tensorboard": "metrics.enable_tensorboard",
}

_TRIED = "debugmodel_sdpa"
"""The flavor that shows whether the host still builds what the binding asks for."""

T = TypeVar("T")


@dataclass(frozen=True)
class Finding:
    """One line that holds or is broken, or that only informs.

    Attributes:
        what: the thing that was checked.
        used_for: its purpose.
        problem: what is wrong with it; empty if it holds.
        meaning: what that means for the user.
        is_note: whether nothing depends on it, so a problem breaks nothing.
        vital: whether no run can start without it.
    """

    what: str
    used_for: str
    problem: str = ""
    meaning: str = ""
    is_note: bool = False
    vital: bool = False

    @property
    def holds(self) -> bool:
        return self.is_note or not self.problem

    @property
    def state(self) -> str:
        """The state in one word."""
        return "note" if self.is_note else "holds" if self.holds else "BROKEN"


def facts(*, in_full: bool) -> dict[str, str]:
    """Return what is installed and what it runs on.

    Args:
        in_full: also why a backend cannot run here, and which optional packages there are.
    """
    known = {
        "torch": torch.__version__,
        "torchtitan": _host_version(),
        "binding": _binding(),
        "tested together": "yes" if is_tested() else f"no (tested: {tested_pairs()})",
        "device": device.in_words(),
        "precision": _precision(),
    }
    if not in_full:
        return known | {"backends": _usable_in_words()}
    return {
        **known,
        **{f"backend {name}": _usability(name) for name in backend_names()},
        **{f"{name} (optional)": _optional(name) for name in OPTIONAL_PACKAGES},
    }


def host_findings() -> list[Finding]:
    """Check everything that the binding relies on in the host.

    Raises:
        EzpzError: there is no host.
    """
    refusal = ""
    try:
        generation = detect.host()
    except EzpzError as error:
        if host() is None:
            raise
        generation, refusal = nearest_generation(), str(error)
    # The evidence first: if it is gone, no other line means much.
    findings = [_finding(line) for line in (generation.evidence, *generation.relied_on)]
    # Building a model would fail with a longer error that says the same.
    if can_train(findings):
        findings += _binding_findings(generation, refusal)
    return findings


def can_train(findings: Iterable[Finding]) -> bool:
    """Return whether nothing vital is broken."""
    return all(finding.holds for finding in findings if finding.vital)


def verdict(of_host: Sequence[Finding], of_job: Sequence[Finding], config: str | None) -> str:
    """Return in a line whether a run can start here.

    Args:
        of_host: what :func:`host_findings` found.
        of_job: what :func:`job_findings` found; empty if no job was checked.
        config: the job that was asked about; None without one.
    """
    states = [each.state for each in (*of_host, *of_job)]
    counted = f"{states.count('holds')} hold, {states.count('BROKEN')} broken"
    if not can_train(of_host):
        unchecked = f", and {config} was not checked" if config else ""
        return f"This host cannot start a run{unchecked}: {counted}."
    if not all(each.holds for each in of_job):
        return f"{config} is not ready here: {counted}."
    ready = f"{config} is ready here" if config else "Runs can start here"
    lacking = "" if all(each.holds for each in of_host) else ", without what is broken in the host"
    return f"{ready}{lacking}: {counted}."


def nearest_generation() -> Host:
    """Return the generation nearest to a host that no binding fits: by its files, or what holds."""
    written = [each for each in detect.HOSTS if each.is_written]
    return written[0] if written else min(detect.HOSTS, key=_share_broken)


@dataclass(frozen=True)
class Asked:
    """The run that is asked about.

    Attributes:
        config: a flavor's name or the path of a job's TOML.
        ranks: their number; without it, the checks that depend on it are skipped.
        nproc: how many of them run on one machine; None if not known.
        host_flags: the trainer's own flags, which override the job.
        from_last_whole: whether it resumes from an earlier step if the newest is damaged.
    """

    config: str
    ranks: int | None = None
    nproc: int | None = None
    host_flags: Sequence[str] = ()
    from_last_whole: bool = False


def job_findings(asked: Asked) -> list[Finding]:
    """Check a job against the installed host: its keys, conflicts, files and memory."""
    try:
        return list(_job_findings(asked))
    except EzpzError:
        raise
    except Exception as error:  # the host's: no check foresees how each of its models can fail
        words = in_words(error)
        return [Finding(asked.config, "built by the host", words, "it cannot be trained")]


def _job_findings(asked: Asked) -> Iterator[Finding]:
    config, settings = asked.config, "its keys and how they combine"
    with outside_of_a_run():
        try:
            job = find_job(config)
            trainer_config = detect.host().trainer_config(job, asked.host_flags)
        except EzpzError as error:
            problem = str(error).removeprefix(f"{config}: ")
            yield Finding(config, settings, problem, "it is refused")
            return
        flavor = flavor_of(job)
        problems = detect.host().machine_problems(trainer_config, flavor, asked.ranks)
    yield Finding(config, settings)
    precision = detect.host().precision_in_words(trainer_config, flavor)
    yield Finding(config, precision, is_note=True)
    for remark in detect.host().remarks(trainer_config):
        yield Finding(config, "its routers", remark, is_note=True)
    for problem in problems:
        yield Finding(config, "this machine", problem, "it is refused here")
    yield from _resuming(job, trainer_config, asked)
    summary = detect.host().summarize(flavor)
    if summary.num_experts:
        yield from _alignment(summary, flavor.moe_latent_dim or summary.dim)
    states = device.model_states(trainer_config, summary.total, asked.ranks or 1, asked.nproc)
    if asked.ranks is not None:
        yield _memory(states)
    elif not states.fit:
        few = "more than the device has; for more ranks name them: --nproc or --world-size"
        yield Finding(states.needed, states.room, few, is_note=True)


def _finding(line: Reliance) -> Finding:
    return Finding(line.thing, line.used_for, line.why_broken(), line.if_broken, vital=line.vital)


def _share_broken(generation: Host) -> float:
    # A share, because generations rely on different numbers of things.
    return mean(bool(line.why_broken()) for line in generation.relied_on)


def _binding_findings(generation: Host, refusal: str) -> Iterator[Finding]:
    """Check what no single line shows: the binding loads, and builds a model and a config."""
    if refusal:  # every line holds, so it is about this machine's device
        yield Finding("the host", "training on this machine", refusal, NO_FLAVOR, vital=True)
        return
    for module in generation.modules():
        _, problem = _tried(import_module, module)
        if problem:
            yield Finding(module, "a part of the binding", problem, "what it does cannot be done")
    model, problem = _tried(_model, generation)
    yield Finding(f"the model of {_TRIED}", "built on the meta device", problem, NO_SIZES)
    if model is None:
        return
    yield from _state_dict_findings(model, generation)
    _, problem = _tried(_trainer_config, generation)
    yield Finding(f"the config of {_TRIED}", "what the trainer is told", problem, NO_FLAVOR)


def _model(generation: Host) -> nn.Module:
    return generation.build_on_meta(load_flavor(_TRIED))


def _trainer_config(generation: Host) -> Any:
    return generation.trainer_config(job_for_flavor(_TRIED))


def _tried(make: Callable[..., T], *args: Any) -> tuple[T | None, str]:
    """Call ``make``; return its result or, for any exception, the error in words."""
    try:
        return make(*args), ""
    except Exception as error:
        return None, in_words(error)


def _state_dict_findings(model: nn.Module, generation: Host) -> Iterator[Finding]:
    found = model.state_dict()
    for key in generation.state_dict_keys:
        yield Finding(
            key,
            "a checkpoint's key",
            "" if key in found else "the model's state dict has no such key",
            "checkpoints saved before this release do not load, and newer ones only here",
        )


def _resuming(job: Job, trainer_config: TrainerConfig, asked: Asked) -> Iterator[Finding]:
    """Say where the job resumes, and both learning rates if its schedule has another one there."""
    used_for = "the checkpoint that the run resumes from"
    try:
        found = resumption(
            job, trainer_config, asked.host_flags, from_last_whole=asked.from_last_whole
        )
    except EzpzError as error:
        yield Finding("checkpoint", used_for, str(error), "the run cannot resume")
        return
    if found is None:
        return
    folder = str(found.checkpoint)
    if found.step is None:
        yield Finding(folder, used_for, "it holds the model alone", "the run is refused")
    else:
        yield Finding(folder, f"{used_for}, at step {found.step}", found.rates, is_note=True)


def _alignment(summary: ModelSummary, dim: int) -> Iterator[Finding]:
    """Check the experts' dimensions against every backend that this device can run at all.

    The job's own backend is checked with the job; for the others, the user learns which would work.
    """
    hidden = summary.expert_hidden_dim
    of_layers = set(hidden) if isinstance(hidden, tuple) else {hidden}
    where, dims = torch.device(default_device()), (dim, *sorted(of_layers))
    what, suits = f"D = {dim}, F = {', '.join(map(str, dims[1:]))}", []
    for name, backend in _usable(where).items():
        if reasons := backend.why_not(where, torch.bfloat16, dims=dims):
            used_for = "the experts' products in bfloat16"
            yield Finding(f"{what} with {name}", used_for, "; ".join(reasons), is_note=True)
        else:
            suits.append(name)
    if suits:
        yield Finding(what, f"the experts' products in bfloat16, with {', '.join(suits)}")


def _memory(states: device.ModelStates) -> Finding:
    if states.is_offloaded:
        return Finding(states.needed, states.room, is_note=True)
    return Finding(
        states.needed,
        states.room,
        "" if states.fit else "more than the device has",
        "it needs more ranks that share the model, a smaller flavor or training.enable_cpu_offload",
    )


def _usable(where: torch.device) -> dict[str, Backend]:
    backends = {name: get_backend(name) for name in backend_names()}
    return {n: each for n, each in backends.items() if not each.why_not(where, torch.bfloat16)}


def _usable_in_words() -> str:
    usable = _usable(torch.device(default_device()))
    others = [name for name in backend_names() if name not in usable]
    said = f"{', '.join(usable) or 'none'}"
    return f"{said}; not {', '.join(others)}: `ezpz-moe backends` says why" if others else said


def _host_version() -> str:
    found = host()
    if found is None:
        return "not installed"
    commit = f", commit {found.commit[:12]}" if found.commit else ""
    return f"{found.version or 'of no known version'}{commit} ({found.folder})"


def _binding() -> str:
    try:
        generation = detect.host()
    except EzpzError as error:
        return f"none: {error}"
    evidence = generation.evidence
    fields = f" with {', '.join(evidence.fields)}" if evidence.fields else ""
    return f"{generation.name} ({evidence.thing}{fields} is there)"


def _precision() -> str:
    """Return the precision of a job here that does not set one."""
    if trains_in_float32(default_device()):
        return f"float32 unless a job says otherwise: {REASON}"
    return "as in torchtitan: bfloat16 unless a job says otherwise"


def _usability(backend: str) -> str:
    reasons = get_backend(backend).why_not(torch.device(default_device()), torch.bfloat16)
    if reasons:
        return f"not usable here: {'; '.join(reasons)}"
    if not is_emulated(default_device(), torch.bfloat16):
        return "usable here, in bfloat16"
    if is_host_path(backend):
        return "usable here, in bfloat16, which is emulated and slow"
    return "usable here, in float32: bfloat16 is emulated"


def _optional(name: str) -> str:
    return version(name) or f"not installed: no {OPTIONAL_PACKAGES[name]}"
