"""Write the flags of the installed host's command line, which are shipped with the package.

    python scripts/make_host_flags.py            write ezpz_moe/hosts/flags/HOST.json
    python scripts/make_host_flags.py --check    exit with 1 if it is out of date

Run it with every release that we support: with the flags at hand, a misspelt one is refused at
once, before torch and the host are imported.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, fields

import tyro

from ezpz_moe.hosts.host_flags import FOLDER, HostFlag, asked_flags, fingerprint
from ezpz_moe.hosts.installed import host

_DEFAULTS = {field.name: field.default for field in fields(HostFlag)}


def main(check: bool = False) -> int:
    """Write the flags of the installed host, or with ``check`` compare them.

    Args:
        check: exit with 1 if the file is out of date, and write nothing.
    """
    found = host()
    if found is None:
        raise SystemExit("torchtitan is not installed")
    flags = [
        {name: value for name, value in asdict(flag).items() if value != _DEFAULTS[name]}
        for flag in asked_flags()
    ]
    lines = ",\n".join(json.dumps(flag, ensure_ascii=False) for flag in flags)
    text = f'{{"fingerprint": "{fingerprint(found.folder)}", "flags": [\n{lines}\n]}}\n'
    file = FOLDER / f"{found.name}.json"
    if check:
        is_current = file.is_file() and file.read_text(encoding="utf-8") == text
        print(f"{file} is {'up to date' if is_current else 'out of date: run this without --check'}")
        return int(not is_current)
    FOLDER.mkdir(exist_ok=True)
    file.write_text(text, encoding="utf-8")
    print(f"{file} written, {len(flags)} flags")
    return 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
