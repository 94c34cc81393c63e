"""Write the tables of docs/guides/moving.md from foreign_keys.toml; ``--check`` compares them."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import tables

sys.path.insert(0, str(tables.ROOT))

from ezpz_moe.config.foreign_keys import Project, projects


def rows(project: Project) -> Iterator[dict[str, str]]:
    for row in project.keys:
        yield {
            project.name: f"`{row.key}`",
            "here": f"`{row.place}`" if row.ours else "-",
            "factor": row.factor or ("1" if row.is_coefficient else ""),
            "what differs": row.note,
        }


def main() -> int:
    made = {f"keys {each.id}": tables.markdown(rows(each)) for each in projects().values()}
    return tables.update("docs/guides/moving.md", made, check="--check" in sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
