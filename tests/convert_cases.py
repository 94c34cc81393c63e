"""A job of torchtitan 0.2, and what conversion makes of one."""

from __future__ import annotations

import json
from pathlib import Path

from ezpz_moe.tools.convert import Change, convert, write

QWEN3 = '[model]\nname = "qwen3"\nflavor = "debugmodel_moe"\nhf_assets_path = "tok"\n'
DATA = '[training]\ndataset = "c4"\n'
OLD = """\
# our run
[job]
description = "a job of torchtitan 0.2"  # keep me

[model]
name = "qwen3"
flavor = "debugmodel_moe"
hf_assets_path = "./assets/tokenizer"
# converters = ["float8"]

[training]
dataset = "c4"
seq_len = 128
local_batch_size = 1

[parallelism]
expert_parallel_degree = 1
expert_tensor_parallel_degree = 1

[activation_checkpoint]
mode = "selective"
selective_ac_option = '2'  # every second layer

[compile]
enable=false
components = [
    "model",  # both
    "loss",
]

[quantize.linear.float8]
filter_fqns = ["output", "router.gate"]

[validation]
enable = false
local_batch_size = 4
"""


def changes(path: Path) -> dict[str, Change]:
    return {change.key: change for change in convert(path, path).changes}


def fates(path: Path) -> dict[str, str]:
    return {key: change.fate for key, change in changes(path).items()}


def toml(values: dict) -> str:
    """``{"a.b": 1}`` as TOML without headers."""
    return "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())


def written(path: Path) -> Path:
    new = path.with_name("new.toml")
    write(convert(path, new), new)
    return new
