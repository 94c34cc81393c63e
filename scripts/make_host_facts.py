"""Write what is shipped of the installed host: its flags, and the models that our flavors name.

    python scripts/make_host_facts.py            write ezpz_moe/hosts/releases/HOST.json
    python scripts/make_host_facts.py --check    exit with 1 if it is out of date

Run it with every release that we support. With its facts at hand, a misspelt flag is refused and
the flavors are listed before torch and the host are imported.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

import tyro

from ezpz_moe.config.assets import EMBEDDED_TOKENIZER
from ezpz_moe.config.flavors import FOLDER_VARIABLE, flavor_names, load_flavor
from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts import detect
from ezpz_moe.hosts.host_flags import SAYS_NOTHING, HostFlag, asked_flags
from ezpz_moe.hosts.installed import host
from ezpz_moe.hosts.precision import as_on_an_accelerator
from ezpz_moe.hosts.releases import FOLDER, fingerprint, model_key

_DEFAULTS = {field.name: field.default for field in fields(HostFlag)}


def lines(rows: Sequence[Mapping[str, Any]]) -> str:
    """One row in a line, so that a change is seen in a comparison of two files."""
    return ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)


def flags() -> list[dict[str, Any]]:
    """The flags, without what a HostFlag has by default."""
    return [
        {name: value for name, value in asdict(flag).items() if value != _DEFAULTS[name]}
        for flag in asked_flags()
    ]


def models() -> dict[str, Any]:
    """The host's models that the shipped flavors name, by their key; not those that it lacks."""
    os.environ.pop(FOLDER_VARIABLE, None)
    asked, found = detect.host(), {}
    for flavor in map(load_flavor, flavor_names()):
        if flavor.base is not None:
            # 0.2.1 has fewer models, and 0.2 none that is changed.
            with contextlib.suppress(EzpzError):
                found[model_key(flavor)] = {
                    "summary": asdict(asked.summarize(flavor)),
                    "needs_accelerator": asked.needs_accelerator(flavor),
                }
    return found


def settings() -> list[dict[str, str]]:
    """The settings of a job that says nothing, with values as Python writes them; not of 0.2."""
    asked = detect.host()
    if asked.generation == "0.2":
        return []
    with as_on_an_accelerator():
        told = asked.settings(asked.trainer_config(SAYS_NOTHING))
    return [
        {
            "path": each.path,
            # A path of this machine's is no fact of the host's.
            "value": repr(None if each.value == str(EMBEDDED_TOKENIZER) else each.value),
            "default": repr(each.default),
        }
        for each in told
    ]


def main(check: bool = False) -> int:
    """Write the facts of the installed host, or with ``check`` compare them.

    Args:
        check: exit with 1 if the file is out of date, and write nothing.
    """
    found = host()
    if found is None:
        raise SystemExit("torchtitan is not installed")
    text = (
        f'{{"fingerprint": "{fingerprint(found.folder)}",\n'
        f'"models": {json.dumps(models(), indent=1)},\n'
        f'"settings": [\n{lines(settings())}\n],\n'
        f'"flags": [\n{lines(flags())}\n]}}\n'
    )
    file = FOLDER / f"{found.name}.json"
    if check:
        is_current = file.is_file() and file.read_text(encoding="utf-8") == text
        print(f"{file}: {'up to date' if is_current else 'out of date, run this without --check'}")
        return int(not is_current)
    FOLDER.mkdir(exist_ok=True)
    file.write_text(text, encoding="utf-8")
    print(f"{file} written")
    return 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
