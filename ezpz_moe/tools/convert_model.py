"""Turn a model of torchtitan 0.2 into a flavor: the same shipped one, or else a new file."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ezpz_moe.config.flavor_schema import Flavor
from ezpz_moe.config.flavors import flavor_names, load_flavor
from ezpz_moe.config.job import shown
from ezpz_moe.config.toml_edit import assignment
from ezpz_moe.hosts.titan_0_2.moe_models import DIFFERENCES, MOE_MODELS, YARN_BEYOND


@dataclass(frozen=True)
class NewModel:
    """The flavor that the job names instead, or why there is none.

    Attributes:
        flavor: its name.
        remarks: what the user should know about it.
        file: text of the flavor file; empty for an existing flavor.
        refusal: why there is no such flavor; empty if there is one.
    """

    flavor: str = ""
    remarks: tuple[str, ...] = ()
    file: str = ""
    refusal: str = ""


def new_model(model: Any, flavor: Any, *, seq_len: Any, name: str) -> NewModel:
    """Find or make the flavor for ``[model] name = model, flavor = flavor`` of torchtitan 0.2.

    Args:
        model: 0.2's name of a model.
        flavor: 0.2's name of one of its sizes.
        seq_len: tokens of a sequence: 0.2's deepseek_v3 depends on it.
        name: the flavor's, if it needs a file.
    """
    # Nothing has checked the old file: its values may have any type.
    flavors = MOE_MODELS.get(model) if isinstance(model, str) else None
    if flavors is None:
        return NewModel(refusal=_dense(shown(model), MOE_MODELS, model))
    if not flavors:
        return NewModel(refusal=f"torchtitan 0.3 has no {model}. Train it with torchtitan 0.2.")
    if not isinstance(flavor, str) or flavor not in flavors:
        return NewModel(refusal=_dense(f"{model}'s {shown(flavor)}", flavors, model))
    keys, remarks = dict(flavors[flavor]), []
    # Only deepseek_v3's model depends on a setting outside of [model]:
    # docs/guides/convert.md, YaRN.
    if model == "deepseek_v3" and isinstance(seq_len, int):
        if seq_len <= YARN_BEYOND:
            keys["rope"] = {"scaling": "none"}
            remarks.append(f"no YaRN: torchtitan 0.2 applies it beyond {YARN_BEYOND} tokens")
        # 0.2 makes its rotary tables as long as the sequence; here the flavor says how long.
        elif seq_len > _longest(keys["inherits"]):
            keys["rope"] = {"max_seq_len": seq_len}
    if difference := DIFFERENCES.get(f"{model}/{flavor}"):
        remarks.append(difference)
    wanted, text = _flavor(keys, name, f"# {model} {flavor} as in torchtitan 0.2.\n")
    if shipped := _shipped(wanted):
        return NewModel(flavor=shipped, remarks=tuple(remarks))
    return NewModel(flavor=name, remarks=tuple(remarks), file=text)


def _dense(what: str, known: Mapping[str, Any], model: Any) -> str:
    return (
        f"{what} is not one of torchtitan 0.2's mixtures of experts ({', '.join(known)}), and "
        "ezpz_moe computes nothing else. Dense models train with torchtitan's own configs, if "
        f"0.3 has them: `--module {model} --config ...`."
    )


def _longest(flavor: str) -> int:
    dimensions = load_flavor(flavor).dimensions
    assert dimensions is not None  # the table names shipped sizes only
    return dimensions.rope.max_seq_len


def _flavor(keys: Mapping[str, Any], name: str, comment: str) -> tuple[Flavor, str]:
    """Make a flavor with these keys, and its file."""
    text = comment + _toml(keys)
    # Load it as a user's file would be loaded: a mistake in the table shows now, and inherited
    # values are filled in for comparison.
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, f"{name}.toml").write_text(text, encoding="utf-8")
        return load_flavor(name, near=Path(folder)), text


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
