"""Write a cut as a job: the job that was planned, with other degrees."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ezpz_moe.config.flavors import load_flavor, with_variant
from ezpz_moe.config.job import MODEL_NAME, Job
from ezpz_moe.config.toml_edit import assignment, statements
from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.detect import presumed_host
from ezpz_moe.hosts.job_settings import FILES_OF_TEXT
from ezpz_moe.tools.planning.cuts import Cut

Settings = Mapping[str, Mapping[str, Any]]
"""Section -> key -> value."""


def settings(cut: Cut) -> Settings:
    """Return what a job says of a cut."""
    parallelism = {
        "data_parallel_shard_degree": cut.dp_shard,
        "data_parallel_replicate_degree": cut.dp_replicate,
        "tensor_parallel_degree": cut.tp,
        "pipeline_parallel_degree": cut.pp,
        "expert_parallel_degree": cut.ep,
    }
    local_batch = cut.microbatch
    if cut.pp > 1:
        parallelism["pipeline_parallel_microbatch_size"] = cut.microbatch
        local_batch *= cut.microbatches
    whole = cut.microbatch * cut.microbatches * cut.data_ranks
    return {
        "training": {"local_batch_size": local_batch, "global_batch_size": whole},
        "parallelism": parallelism,
        "activation_checkpoint": {"mode": cut.checkpointing},
    }


def write_job(path: Path, job: Job, host_flags: Sequence[str], cut: Cut) -> None:
    """Write the job with the cut in place of its own. Nothing is overwritten.

    Args:
        path: the new file; its folder is made.
        job: what was planned.
        host_flags: the trainer's flags that it was planned with; a file cannot hold them.
        cut: the winner.

    Raises:
        EzpzError: as :func:`check_target`, or it cannot be written.
    """
    check_target(path, job, host_flags)
    flavor, wanted = job.flavor, dict(settings(cut))
    if cut.backend and load_flavor(flavor, near=job.folder).compute_backend != cut.backend:
        flavor = with_variant(flavor, "compute_backend", cut.backend, near=job.folder)
        wanted["model"] = {"flavor": flavor}
    text = job.path.read_text(encoding="utf-8") if job.path else _of_flavor(flavor)
    changed = "".join(_changed(text, wanted))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8") as file:
            file.write(changed)
    except FileExistsError:
        raise EzpzError(_IS_THERE.format(path)) from None
    except OSError as error:
        raise EzpzError(f"--out {path}: cannot be written: {error.strerror}.") from None


def check_target(path: Path, job: Job, host_flags: Sequence[str]) -> None:
    """Refuse what cannot be written as the job that was planned, before anybody plans.

    Args:
        path: the new file.
        job: what is planned.
        host_flags: the trainer's flags that it is planned with; a file cannot hold them.

    Raises:
        EzpzError: there are flags, the name is no job's, the file is there already, or the job
            names what lies beside it and would not be found from the new place.
    """
    if path.suffix != ".toml":
        raise EzpzError(f"--out {path}: a job's name ends in .toml.")
    if host_flags:
        raise EzpzError(
            f"--out {path}: the trainer's own flags ({' '.join(host_flags)}) would not be in it. "
            "Put them into the job, and plan that."
        )
    if path.exists():
        raise EzpzError(_IS_THERE.format(path))
    if lost := next(_lost(path, job), None):
        raise EzpzError(
            f"--out {path}: {lost} is found beside {job.path}, and from there it would not be. "
            f"Write {job.path.with_name(path.name) if job.path else path.name}."
        )


_IS_THERE = "--out {}: is there already, and nothing is overwritten."


def _lost(path: Path, job: Job) -> Iterator[str]:
    """Yield what a job names, in words, that it would not find, or find elsewhere, from a path."""
    if job.path is None or path.parent.resolve() == job.path.parent.resolve():
        return
    try:
        there = load_flavor(job.flavor, near=path.parent).source.resolve()
    except EzpzError:
        there = None
    if load_flavor(job.flavor, near=job.folder).source.resolve() != there:
        yield f"flavor {job.flavor!r}"
    keys, moved = presumed_host().job_keys(), replace(job, path=path)
    for name, value in job.values.items():
        section, _, key = name.rpartition(".")
        row = keys.get(section, {}).get(key)
        is_file = name in FILES_OF_TEXT or (row and row.is_file)
        if is_file and job.resolve(value) != moved.resolve(value):
            yield f"{name} = {value!r}"


def _of_flavor(flavor: str) -> str:
    return f"[model]\n{assignment('name', MODEL_NAME)}{assignment('flavor', flavor)}"


def _changed(text: str, wanted: Settings) -> Iterator[str]:
    """Yield the document's statements; those about the cut are replaced where they stand."""
    left = {section: dict(values) for section, values in wanted.items()}
    section = ""
    for statement in statements(text):
        if statement.is_header:
            # What the section that ends here lacked: it is written once.
            yield from _rest(left, section)
            section = statement.section
        key = next(iter(statement.parsed), None) if statement.is_assignment else None
        if key in wanted.get(section, {}):
            if key in left.get(section, {}):
                yield assignment(str(key), left[section].pop(key))
            continue
        yield statement.text
    yield from _rest(left, section)
    for name, values in left.items():
        if values:
            yield f"\n[{name}]\n"
            yield from (assignment(key, value) for key, value in values.items())


def _rest(left: dict[str, dict[str, Any]], section: str) -> Iterator[str]:
    for key, value in left.pop(section, {}).items():
        yield assignment(key, value)
