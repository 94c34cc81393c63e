"""Draw the pictures of ``docs/internals/benchmarks`` again, from the figures beside them.

    python scripts/draw_benchmarks.py          # every file that was measured with --plot
    python scripts/draw_benchmarks.py FILE.json

For when ``ezpz-moe bench --plot`` draws in another way: nothing is measured.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from pydantic import TypeAdapter

from ezpz_moe.tools.bench.plots import draw
from ezpz_moe.tools.bench.results import Measured

FOLDER = Path(__file__).parent.parent / "docs" / "internals" / "benchmarks"


def main(files: list[Path]) -> None:
    for file in files or sorted(FOLDER.glob("*.json")):
        document = json.loads(file.read_text())
        if not (files or " --plot " in document.get("command", "")):
            continue
        for result in document["measured"]:
            for figures in result["figures"].values():
                del figures["summary"]  # made of the others
        results = TypeAdapter(list[Measured]).validate_python(document["measured"])
        for picture in draw(results, file.with_suffix(".png")):
            print(f"{picture} drawn")


if __name__ == "__main__":
    main([Path(argument) for argument in sys.argv[1:]])
