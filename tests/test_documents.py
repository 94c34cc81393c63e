"""The tables in the documents are those that their data makes."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent.parent / "scripts"


@pytest.mark.parametrize(
    "script",
    [
        pytest.param("make_flavor_table.py", marks=pytest.mark.full),  # it builds every flavor
        "make_host_tables.py",
        "make_moving_tables.py",
        "make_routing_tables.py",
    ],
)
def test_the_tables_are_up_to_date(script: str) -> None:
    command = [sys.executable, str(SCRIPTS / script), "--check"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
