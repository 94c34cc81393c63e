"""Turn a model of torchtitan 0.2 into a flavor: the same shipped one, or else a new file."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ezpz_moe.config.flavor_schema import Flavor
from ezpz_moe.config.flavors import flavor_names, load_flavor
from ezpz_moe.config.job import shown
from ezpz_moe.config.toml_edit import assignment
from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.counts import counts_at_hand
from ezpz_moe.hosts.titan_0_2.moe_models import (
    DENSE_MODELS,
    DIFFERENCES,
    GONE_MODELS,
    LONGEST,
    MODULES,
    MOE_MODELS,
    SIZED,
    TRANSFORMERS_MODELS,
    YARN_BEYOND,
)
from ezpz_moe.tools.convert_sizes import Draft, draft

_KEEP = "To train a mixture of experts with this job's other settings, add --flavor NAME."


@dataclass(frozen=True)
class Wish:
    """What the user says of the new model.

    Attributes:
        flavor: its name; None leaves it to the old job.
        sizes: those of a fork's model (:mod:`.convert_sizes`); None for none.
    """

    flavor: str | None = None
    sizes: str | None = None


@dataclass(frozen=True)
class NewModel:
    """The flavor that the job names instead, or why there is none.

    Attributes:
        flavor: its name.
        remarks: what the user should know about it.
        file: text of the flavor file; empty for an existing flavor.
        refusal: why there is no such flavor; empty if there is one.
        open: why the user has to name it; empty if it is known.
        differences: what the old model computed and this one does not.
        attention: its attention, if the flavor says.
        experts: its routed experts, if they may be others than the old model's.
    """

    flavor: str = ""
    remarks: tuple[str, ...] = ()
    file: str = ""
    refusal: str = ""
    open: str = ""
    differences: tuple[str, ...] = ()
    attention: str | None = None
    experts: int | None = None


def new_model(
    model: Any,
    flavor: Any,
    *,
    seq_len: int,
    name: str,
    wish: Wish = Wish(),
    near: Path | None = None,
) -> NewModel:
    """Find or make the flavor for ``[model] name = model, flavor = flavor`` of torchtitan 0.2.

    Args:
        model: 0.2's name of a model.
        flavor: 0.2's name of one of its sizes.
        seq_len: tokens of a sequence: 0.2 makes its RoPE as long.
        name: the flavor's, if it needs a file.
        wish: what the user says of it.
        near: the new job's folder, where flavors are looked for first.

    Raises:
        EzpzError: there is no flavor of the wish's name, or its sizes are wrong.
    """
    # Nothing has checked the old file: its values may have any type.
    theirs = model if isinstance(model, str) else ""
    known = _own_name(theirs)
    if wish.flavor is not None:
        return _chosen(wish.flavor, seq_len=seq_len, name=name, near=near)
    if wish.sizes is not None:
        return _drafted(known, f"{theirs} {flavor}", wish.sizes, seq_len=seq_len, name=name)
    if refusal := _refusal(known, flavor):
        return NewModel(refusal=f"{refusal} {_KEEP}")
    flavors = MOE_MODELS.get(known)
    if flavors is None or not isinstance(flavor, str) or flavor not in flavors:
        return NewModel(open=_of_a_fork(model, known, flavor, flavors))
    return _known(known, flavor, seq_len=seq_len, name=name, theirs=theirs)


def _own_name(model: str) -> str:
    """Return which of torchtitan's models it is; "simple_fsdp.deepseek_v3" is deepseek_v3."""
    last = model.rpartition(".")[2]
    return last if last in MOE_MODELS or last in DENSE_MODELS else model


def _refusal(known: str, flavor: Any) -> str:
    """Return why 0.3 with this package trains no such model; nothing if it may."""
    dense = "is dense: it has no routed experts, and no flavor of ezpz_moe is its model"
    if known in GONE_MODELS:
        return f"{known} {dense}. torchtitan 0.3 does not have it either."
    if MOE_MODELS.get(known) == {}:
        return f"torchtitan 0.3 has no {known}. Train it with torchtitan 0.2."
    sizes = DENSE_MODELS.get(known)
    if sizes is None or (sizes and flavor not in sizes):
        return ""
    what = f"{known}'s {shown(flavor)}" if sizes else known
    module = MODULES.get(known, known)
    return f"{what} {dense}. Train it with torchtitan alone: `--module {module} --config ...`."


def _of_a_fork(model: Any, known: str, flavor: Any, flavors: Mapping[str, Any] | None) -> str:
    if known in TRANSFORMERS_MODELS:
        return (
            f"{known} trains the model of transformers that [hf_transformers] model names. Make a "
            "flavor of its config.json with `ezpz-moe convert --from hf`, and convert again with "
            "--flavor NAME"
        )
    if flavors is None:
        what = f"torchtitan 0.2 has no model {shown(model)}"
    else:
        what = f"torchtitan 0.2's {model} has no flavor {shown(flavor)} ({', '.join(flavors)})"
    sizes = ', or --sizes "dim=..., n_layers=..., ..." from the fork' if _may_size(known) else ""
    return (
        f"{what}, so it is a fork's. Name a flavor here (`ezpz-moe flavors` lists them), or "
        f"convert again with --flavor NAME{sizes}"
    )


def _may_size(model: str) -> bool:
    """Return whether a flavor's sizes can describe it: deepseek_v3, or a model nobody knows."""
    return model == SIZED or model not in {*MOE_MODELS, *DENSE_MODELS, *GONE_MODELS}


def _known(model: str, flavor: str, *, seq_len: int, name: str, theirs: str) -> NewModel:
    """Return the flavor of one of torchtitan 0.2's own mixtures of experts."""
    keys, remarks = dict(MOE_MODELS[model][flavor]), []
    # What else 0.2's deepseek_v3 makes of the length: docs/guides/convert.md, YaRN.
    if model == SIZED and seq_len <= YARN_BEYOND:
        keys["rope"] = {"scaling": "none"}
        remarks.append(f"no YaRN: torchtitan 0.2 applies it beyond {YARN_BEYOND} tokens")
    # 0.2 makes its rotary tables as long as the sequence; here the flavor says how long.
    elif seq_len > _longest(keys):
        keys["rope"] = {"max_seq_len": seq_len}
        remarks.append(f"with a RoPE for {seq_len} tokens")
    if theirs != model:
        remarks.append(f"{theirs} is torchtitan's {model}, run by an experiment's trainer")
    if difference := DIFFERENCES.get(f"{model}/{flavor}"):
        remarks.append(difference)
    return _made(keys, name, f"# {model} {flavor} as in torchtitan 0.2.\n", tuple(remarks))


def _made(keys: Mapping[str, Any], name: str, comment: str, remarks: tuple[str, ...]) -> NewModel:
    wanted, text = _flavor(keys, name, comment)
    if shipped := _shipped(wanted):
        return NewModel(flavor=shipped, remarks=remarks, attention=wanted.attention)
    return NewModel(flavor=name, remarks=remarks, file=text, attention=wanted.attention)


def _chosen(chosen: str, *, seq_len: int, name: str, near: Path | None) -> NewModel:
    """Return the flavor that the user names, with a longer RoPE if the job needs one."""
    found = load_flavor(chosen, near=near)
    longest, remarks, file = _reach(found), ["as --flavor says"], ""
    if longest is not None and seq_len > longest:
        remarks.append(f"with a RoPE for {seq_len} tokens")
        file = f"# {chosen} for longer sequences.\n{_toml(_longer(found, seq_len))}"
    return NewModel(
        flavor=name if file else chosen,
        remarks=tuple(remarks),
        file=file,
        attention=found.attention,
        experts=_experts(found),
    )


def _longer(found: Flavor, seq_len: int) -> dict[str, Any]:
    """Return the keys of the same flavor with a RoPE of that many positions."""
    keys: dict[str, Any] = {"inherits": found.source.stem}
    if found.attention:
        keys["attention"] = found.attention
    return keys | {"compute_backend": found.compute_backend, "rope": {"max_seq_len": seq_len}}


def _experts(flavor: Flavor) -> int | None:
    """Return a number of experts that the ranks of a group have to share alike.

    Where layers have different numbers, what divides all. None for a dense model, and where only
    the host knows.
    """
    if flavor.dimensions is not None:
        return math.gcd(*(of.num_experts for of in flavor.dimensions.layer_sizes.values())) or None
    counted = counts_at_hand(flavor)
    # Layers of one of the host's models are alike.
    return counted.num_experts if counted and isinstance(counted.num_experts, int) else None


def _drafted(model: str, what: str, sizes: str, *, seq_len: int, name: str) -> NewModel:
    """Return a flavor of the sizes that the user gives."""
    if not _may_size(model):
        raise EzpzError(
            f"--sizes: a flavor's own sizes describe models with latent attention, as "
            f"{SIZED}; of {model} there are torchtitan's own alone. Choose one with --flavor NAME."
        )
    drafted: Draft = draft(sizes, seq_len=seq_len)
    head = f"# {what} of a fork of torchtitan 0.2, from sizes given to ezpz-moe convert.\n"
    differs = "".join(f"# differs: {each}\n" for each in drafted.differences)
    text = head + differs + drafted.text
    try:
        wanted = _loaded(text, name)
    except EzpzError as error:
        raise EzpzError(f"--sizes: {error}") from error
    count = len(drafted.left_out)
    remarks = (f"{count} sizes are torchtitan 0.2's defaults",) if count else ()
    return NewModel(
        flavor=name,
        remarks=("from --sizes", *remarks),
        file=text,
        differences=drafted.differences,
        attention=wanted.attention,
        experts=_experts(wanted),
    )


def _longest(keys: Mapping[str, Any]) -> int:
    """Return the positions of a flavor with these keys of the table."""
    if "base" in keys:
        return LONGEST[keys["base"]]
    reach = _reach(load_flavor(keys["inherits"]))
    assert reach is not None  # the table names shipped sizes only
    return reach


def _reach(flavor: Flavor) -> int | None:
    """Return how many positions a flavor has; None if only the host knows."""
    if flavor.dimensions is not None:
        return flavor.dimensions.rope.max_seq_len
    return flavor.rope.max_seq_len if flavor.rope else LONGEST.get(flavor.base or "")


def _flavor(keys: Mapping[str, Any], name: str, comment: str) -> tuple[Flavor, str]:
    """Make a flavor with these keys, and its file."""
    text = comment + _toml(keys)
    return _loaded(text, name), text


def _loaded(text: str, name: str) -> Flavor:
    """Load it as a user's file would be loaded: a mistake shows now, and all values are there."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, f"{name}.toml")
        file.write_text(text, encoding="utf-8")
        try:
            return load_flavor(name, near=Path(folder))
        except EzpzError as error:  # the file is gone when this is read
            raise EzpzError(str(error).replace(f"{file.resolve()}: ", "")) from error


def _shipped(wanted: Flavor) -> str:
    """Return the name of an existing flavor that is the same model; empty for none."""
    # Attention is a suffix of the flavor's name, not another model.
    apart = {"name", "source", "attention"}
    model = wanted.model_dump(exclude=apart)
    for name in flavor_names():
        known = load_flavor(name)
        if known.model_dump(exclude=apart) == model:
            same_attention = known.attention == wanted.attention
            return name if same_attention else f"{name}_{wanted.attention}"
    return ""


def _toml(keys: Mapping[str, Any]) -> str:
    """Write keys as TOML, with tables last."""
    # Tables last: a key below a table's header would belong to that table.
    plain = [assignment(key, value) for key, value in keys.items() if not isinstance(value, dict)]
    tables = [
        f"\n[{key}]\n{_toml(value)}" for key, value in keys.items() if isinstance(value, dict)
    ]
    return "".join([*plain, *tables])
