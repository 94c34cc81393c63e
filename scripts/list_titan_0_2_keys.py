"""Write down the sections, keys and defaults of torchtitan 0.2's job config.

    pip download --no-deps torchtitan==0.2.2
    python scripts/list_titan_0_2_keys.py torchtitan-0.2.2-py3-none-any.whl \\
        > tests/data/titan_0_2_2_keys.txt

One ``section.key = default`` a line. The wheel is read, not installed: 0.2 and 0.3 do not fit into
one environment. ``tests/test_job_keys.py`` holds the table of keys against this list.
"""

from __future__ import annotations

import argparse
import ast
import zipfile
from collections.abc import Iterator, Mapping

JOB_CONFIG = "torchtitan/config/job_config.py"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", help="torchtitan-0.2.x-py3-none-any.whl")
    with zipfile.ZipFile(parser.parse_args().wheel) as wheel:
        module = ast.parse(wheel.read(JOB_CONFIG))
    classes = {node.name: node for node in module.body if isinstance(node, ast.ClassDef)}
    print("\n".join(keys(classes, "JobConfig")))


def keys(classes: Mapping[str, ast.ClassDef], name: str, section: str = "") -> Iterator[str]:
    """``section.key = default`` of every field of a config class and of the classes in it."""
    for field in classes[name].body:
        if not isinstance(field, ast.AnnAssign):
            continue
        annotation, path = ast.unparse(field.annotation), f"{section}{ast.unparse(field.target)}"
        if annotation in classes:
            yield from keys(classes, annotation, f"{path}.")
        else:
            yield f"{path} = {ast.unparse(field.value) if field.value else ''}"


if __name__ == "__main__":
    main()
