"""Write a job to begin with: ``ezpz-moe new``. Torch and the host are not imported.

In the file, a line that begins with ``#`` and no space is a setting to switch on; a comment has a
space after the ``#``.
"""

from __future__ import annotations

import io
import json
import math
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ezpz_moe.config.devices import Device
from ezpz_moe.config.flavors import Flavor, flavor_names, load_flavor, split_name
from ezpz_moe.config.keys import Keys
from ezpz_moe.config.toml import read_toml
from ezpz_moe.config.toml_edit import assignment
from ezpz_moe.errors import EzpzError, did_you_mean, printable
from ezpz_moe.hosts.detect import presumed_host
from ezpz_moe.hosts.our_texts import CHAT_FILE, DEFAULT_DATASET, KNOWN_KINDS, kind_of
from ezpz_moe.hosts.titan_0_2.job_keys import DATASETS

_ATTENTIONS = {
    "sdpa": "sdpa runs on every device. A token also sees the documents before its own.",
    "flex": "flex keeps documents apart, needs torch.compile, and does not train on a CPU.",
    "varlen": "varlen keeps documents apart, and needs a GPU.",
    "flex_flash": "flex_flash keeps documents apart, and needs a Hopper or Blackwell GPU.",
}
_EVERYWHERE = "for_loop runs on every device."
_BACKENDS: dict[Device, tuple[str, str]] = {
    "any": ("for_loop", _EVERYWHERE),
    "cpu": ("for_loop", _EVERYWHERE),
    "cuda": ("grouped_mm", "grouped_mm is for SM90 (H100) and newer: before, for_loop."),
    "rocm": ("for_loop", _EVERYWHERE),
    "xpu": ("for_loop", _EVERYWHERE),
    "npu": ("for_loop", _EVERYWHERE),
}
"""The backend of the experts for a device, and why."""

_DENSE = "It has no experts, so no backend for them either."

_EXPERT_DEGREES = (8, 4, 2)
_SMALL = 512
"""A model dimension up to which a CPU trains a model in minutes."""


@dataclass(frozen=True)
class NewJob:
    """A job that has been written.

    Attributes:
        path: the file.
        flavor: its model, with attention and backend.
        several: how `train` and `doctor` are told of several ranks; empty for one.
    """

    path: Path
    flavor: str
    several: str


def new_job(path: Path, flavor: str, device: Device, data: str | None) -> NewJob:
    """Write a commented job that `ezpz-moe doctor` passes on such a device.

    Args:
        path: the file; its folder is made. Nothing is overwritten.
        flavor: a flavor's name. What it does not say of attention and backend, ``device`` decides.
        device: what the job is for.
        data: a file with text or chats, or the name of one of the trainer's datasets; None for the
            embedded text.

    Raises:
        EzpzError: the file exists or cannot be written, there is no such flavor or text, or the
            device cannot train it.
    """
    if path.suffix != ".toml":
        raise EzpzError(f"{path}: a job's name ends in .toml; any other name is a flavor's.")
    _refuse_control_characters(str(path))
    name = _with_variant(flavor, path.parent, device)
    loaded = load_flavor(name, near=path.parent)
    if device == "cpu" and loaded.attention != "sdpa":
        raise EzpzError(
            f"--flavor {flavor}: attention {loaded.attention!r} has no backward on a CPU. Use "
            "attention sdpa, or another --device."
        )
    several = "" if device in ("any", "cpu") else " --nproc 8"
    text = _TEXT.format(
        path=shlex.quote(str(path)),
        name=name,
        dump_folder=assignment(
            "dump_folder",
            f"./outputs/{path.stem}",
            "logs and checkpoints, relative to the working directory",
        ),
        flavor=assignment("flavor", name, "size _ attention _ backend of the experts"),
        on="" if device == "any" else f" on {device}",
        several=several,
        why_attention=_ATTENTIONS[str(loaded.attention)],
        why_backend=_DENSE if loaded.is_dense else _BACKENDS[device][1],
        data="".join(_data_lines(data)),
        **_sizes(loaded, device),
    )
    _write(path, "".join(_known_lines(text, presumed_host().job_keys())))
    return NewJob(path, name, several)


def _with_variant(name: str, near: Path, device: Device) -> str:
    """Return the flavor's name with an attention and a backend, unless its own file has them.

    Raises:
        EzpzError: there is no such flavor, or its file is wrong.
    """
    loaded = load_flavor(name, near=near)
    said = read_toml(loaded.source)
    found = split_name(name, flavor_names(near=near))
    assert found is not None  # it has been loaded
    stem, given = found
    # FlexAttention is torchtitan's own, and what a GPU of any generation compiles.
    attention = "flex" if device == "cuda" else "sdpa"
    wanted = {"attention": attention, "compute_backend": _BACKENDS[device][0]}
    if loaded.is_dense:
        del wanted["compute_backend"]
    # In this order, which is the order of a name's parts.
    parts = (given.get(key) or ("" if key in said else value) for key, value in wanted.items())
    return "_".join([stem, *filter(None, parts)])


def _data_lines(data: str | None) -> Iterator[str]:
    """Yield the lines that choose the text.

    Raises:
        EzpzError: there is no such file or dataset, or the file is none of text or of chats.
    """
    if data is None:
        yield "# The text that this package has in it, unless you set dataset or dataset_path.\n"
        yield '#dataset = "c4" # streamed from the Hugging Face hub\n'
        return
    file = Path(data).expanduser()
    known = (*DATASETS, DEFAULT_DATASET)
    # A folder may have the name of a dataset.
    if data.lower() in known:
        yield assignment("dataset", data)
    elif file.is_dir():
        raise EzpzError(f"--data {data}: is a folder. Name one file.")
    elif file.exists():
        if kind_of(file) is None:
            raise EzpzError(f"--data {data}: unknown kind of file. Known: {KNOWN_KINDS}.")
        # Absolute: the run may start in another folder.
        path = str(file.absolute())
        _refuse_control_characters(path)
        has_chats = _has_chats(file)
        if has_chats:
            yield from _chat_lines(data)
        _refuse_unreadable(data, path, has_chats=has_chats)
        yield assignment("dataset_path", path)
    elif file.suffix or len(file.parts) > 1:
        raise EzpzError(f"--data {data}: there is no such file.")
    else:
        raise EzpzError(
            f"--data {data}: there is no such file, and torchtitan has no such dataset."
            f"{did_you_mean(data, known)} Known are {', '.join(known)}."
        )


def _refuse_unreadable(data: str, path: str, *, has_chats: bool) -> None:
    """Refuse a file that a run would not read either.

    Raises:
        EzpzError: it has no text or chats, or is broken.
    """
    # Only now, for they import pyarrow and datasets.
    from ezpz_moe.hosts.chats import read_chats
    from ezpz_moe.hosts.documents import read_documents

    try:
        (read_chats if has_chats else read_documents)(path)
    except EzpzError as error:
        raise EzpzError(f"--data {data}: {error}") from None


def _has_chats(file: Path) -> bool:
    """Return whether a file begins with a chat, and not with a text.

    Raises:
        EzpzError: it cannot be read.
    """
    if kind_of(file) != ".jsonl":
        return False
    # Only now, for it imports pyarrow.
    from ezpz_moe.hosts.text_files import first_line_in, reading

    with reading(file):
        line = first_line_in(file)
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):  # doctor says which line is wrong
        return False
    return isinstance(row, dict) and "messages" in row and "text" not in row


def _chat_lines(data: str) -> Iterator[str]:
    """Yield the lines that make chats of the file.

    Raises:
        EzpzError: the installed host does not train on chats.
    """
    host = presumed_host()
    if not host.trains_on_chats:
        raise EzpzError(
            f"--data {data}: holds chats, which a job cannot train on with {host.name}. Write each "
            'chat as one text, and name that file: .jsonl with "text".'
        )
    yield "# Chats: their answers alone are learned. The tokenizer needs a chat template: set\n"
    yield "# hf_assets_path in [model], the folder of the model's own.\n"
    yield assignment("dataset", CHAT_FILE)


def _refuse_control_characters(path: str) -> None:
    """Refuse a file's name with bytes that are no text, or with what ends a comment."""
    if re.search("[\x00-\x1f\x7f\ud800-\udfff]", path):
        raise EzpzError(f"{printable(path)}: no TOML can hold this name. Rename the file.")


def _sizes(flavor: Flavor, device: Device) -> dict[str, object]:
    """Return what depends on how large the model is, and on the device."""
    size = flavor.dimensions
    small = size.dim <= _SMALL if size else "debugmodel" in flavor.name
    degree = next((each for each in _EXPERT_DEGREES if _experts(flavor) % each == 0), 1)
    return {
        "batch": 4 if small else 1,
        "length": 128 if small or device == "cpu" else 2048,
        "steps": 80 if small else 1000,
        "rate": "8e-4" if small else "2.2e-4",
        "warmup": 10 if small else 200,
        "log": 1 if small else 10,
        "recomputing": "none" if small else "selective",
        # Lines to switch on, which a dense model would refuse.
        "sharing": "" if flavor.is_dense else _SHARING.format(degree=degree),
        "watching": "" if flavor.is_dense else _WATCHING,
        "interval": 40 if small else 500,
    }


def _experts(flavor: Flavor) -> int:
    """Return what divides every layer's experts, as far as it is known here; 1 if nothing does."""
    if flavor.is_dense:
        return 1
    if flavor.dimensions is not None:
        return math.gcd(*(of.num_experts for of in flavor.dimensions.layer_sizes.values()))
    # All of the host's own models have an even number.
    return (flavor.change and flavor.change.num_experts) or _EXPERT_DEGREES[-1]


def _known_lines(text: str, keys: Keys) -> Iterator[str]:
    """Yield the lines whose keys the installed host has, and all comments."""
    section = ""
    for line in io.StringIO(text, newline="\n"):  # TOML ends lines only here
        if header := re.match(r"#?\[([\w.]+)\]", line):
            section = header[1]
        key = re.match(r"#?(\w+) =", line)
        row = keys.get(section, {}).get(key[1]) if key else None
        if section and section not in keys:
            continue
        # A key that is gone may still be accepted, with the value that the file has.
        if key and (row is None or (row.message and not row.unless)):
            continue
        yield line


def _write(path: Path, text: str) -> None:
    """Write a new file, whole or not at all.

    Raises:
        EzpzError: it is there already, or cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Not overwritten, whoever creates it in the meantime.
        file = path.open("xb")
    except OSError as error:
        if path.exists():
            raise EzpzError(f"{path}: is there already, and nothing is overwritten.") from None
        raise _unwritten(path, error) from None
    try:
        with file:
            file.write(text.encode())
    except OSError as error:
        path.unlink()
        raise _unwritten(path, error) from None


def _unwritten(path: Path, error: OSError) -> EzpzError:
    return EzpzError(f"{path}: cannot be written: {error.strerror}.")


_SHARING = "#expert_parallel_degree = {degree} # ranks that share a layer's experts\n"

_WATCHING = """\
# What the routers do: records in telemetry.jsonl, `ezpz-moe plot` draws them, alerts in the log.
#[telemetry]
#detail = "per_layer" # what wandb and TensorBoard get: "brief", "per_layer" or "per_expert"

"""

_TEXT = """\
# {name}{on}. Written by `ezpz-moe new`.
#
#     ezpz-moe doctor {path}{several}
#     ezpz-moe train {path}{several}
#
# A line that begins with # and no space is off: to switch it on, remove the #. What is not said
# here is torchtitan's own default; `ezpz-moe show {path} --all` lists everything.

[job]
{dump_folder}\
custom_config_module = "ezpz_moe" # how torchtitan 0.2 finds this package; 0.3 is told by --module

[model]
name = "ezpz_moe"
{flavor}\
# Sizes: `ezpz-moe flavors`. Backends: `ezpz-moe backends`.
# {why_attention}
# {why_backend}
# The tokenizer is a small one that this package has in it, unless you set hf_assets_path, the
# folder of the model's own.

[training]
{data}local_batch_size = {batch} # sequences of a rank in a step
seq_len = {length}
steps = {steps}
max_norm = 1.0 # gradients are clipped to this norm
#mixed_precision_param = "float32" # default: bfloat16, except on a CPU that only emulates it

[optimizer] # AdamW
lr = {rate}

[lr_scheduler]
warmup_steps = {warmup}
decay_ratio = 0.5 # the last half of the steps
decay_type = "cosine"
min_lr_factor = 0.1 # of lr, at the end

[parallelism]
data_parallel_shard_degree = -1 # shards the model over all ranks that the other degrees leave
{sharing}
[activation_checkpoint]
mode = "{recomputing}" # "none" keeps all activations, "selective" some, "full" as few as possible

[checkpoint]
#enable = true # also resumes: after a stop, start the same command again
#interval = {interval} # steps from one to the next
#keep_latest_k = 3 # remove older ones
#async_mode = "async" # go on training while one is written
#exclude_from_loading = ["dataloader"] # resume, but begin the text anew

[metrics]
log_freq = {log}
#enable_wandb = true # pip install wandb, then wandb login
#enable_tensorboard = true # pip install tensorboard; files are in the dump folder

[validation]
#enable = true # on the same text, unless dataset or dataset_path is set here
#freq = {interval} # steps from one to the next

{watching}[debug]
seed = 42
"""
