"""Write the tables of hosts in the documents, and the record of the host tests' runs.

    python scripts/make_host_tables.py                          rewrite the tables
    python scripts/make_host_tables.py --check                  exit with 1 if they are out of date
    python scripts/make_host_tables.py --record-of REPORT.xml   record a run of pytest first

``make test-hosts`` does the last; a run in which a test failed is recorded as such, and is exit
code 1.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from xml.etree import ElementTree

import tables
import tyro

from ezpz_moe.hosts.detect import HOSTS, host
from ezpz_moe.hosts.host import Host
from ezpz_moe.hosts.installed import HOST_RUNS, RECORD, HostRun, host_name, version
from ezpz_moe.tools.verify import default_device


def run_of(report: Path) -> HostRun:
    """What a JUnit report says of the host tests with the installed pair."""
    (suite,) = ElementTree.parse(report).getroot().iter("testsuite")
    total, failed, errors, skipped = (
        int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped")
    )
    failed += errors
    return HostRun(
        torch=str(version("torch")),
        torchtitan=str(host_name()),
        generation=host().name,
        device=default_device(),
        date=datetime.now(UTC).date().isoformat(),
        passed=total - failed - skipped,
        failed=failed,
        skipped=skipped,
    )


def record(run: HostRun) -> list[HostRun]:
    """Write the run in place of an earlier one with the same pair, oldest generation first."""
    pair = (run.torch, run.torchtitan, run.device)
    others = [each for each in HOST_RUNS if (each.torch, each.torchtitan, each.device) != pair]
    order = [each.name for each in reversed(HOSTS)]
    runs = sorted(
        [*others, run], key=lambda each: (order.index(each.generation), each.torchtitan, each.torch)
    )
    RECORD.write_text(json.dumps([asdict(each) for each in runs], indent=2) + "\n")
    return runs


def tested(runs: list[HostRun]) -> str:
    """The pairs that the host tests ran with."""
    return tables.markdown(
        {
            "torch": run.torch,
            "torchtitan": run.torchtitan,
            "binding": run.generation,
            "device": run.device,
            "passed": run.passed,
            "failed": run.failed,
            "skipped": run.skipped,
            "date": run.date,
        }
        for run in runs
    )


def relied_on(each: Host) -> str:
    """What the binding to a host needs of it, and that to the generation before does not."""
    before = type(each).__base__
    older = {line for other in HOSTS if type(other) is before for line in other.relied_on}
    return tables.markdown(
        {
            "thing": f"`{line.thing}`",
            "with": ", ".join(
                f"`{name}`" for name in line.has + line.takes + line.fields + line.sets
            ),
            "used for": line.used_for,
            "if it is gone": line.if_broken,
        }
        for line in each.relied_on
        if line not in older
    )


def main(check: bool = False, record_of: Path | None = None) -> int:
    """Write the tables of hosts, and the record that they are made of.

    Args:
        check: write nothing; exit with 1 if a table is out of date.
        record_of: a JUnit report of tests/hosts with the installed pair.
    """
    runs = list(HOST_RUNS)
    run = run_of(record_of) if record_of else None
    if run:
        runs = record(run)
    reliances = {f"relied on, {each.generation}": relied_on(each) for each in HOSTS}
    stale = tables.update("docs/internals/hosts.md", reliances, check=check)
    stale |= tables.update("docs/internals/rebasing.md", {"tested": tested(runs)}, check=check)
    if run and run.failed:
        print(f"{run.torchtitan}: {run.failed} host test(s) failed", file=sys.stderr)
        return 1
    return stale


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
