"""The launch scripts of docs/launch: what each node would type, with schedulers made of shell."""

import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "docs" / "launch"

# Each runs what comes after its own options on two nodes, as the real one would in parallel.
SCHEDULER = """#!/bin/bash
while [ "$1" != bash ]; do shift; done
for node in 0 1; do {rank}=$node SLURM_NNODES=2 "$@"; done
"""
COMMANDS = {
    "srun": SCHEDULER.format(rank="SLURM_NODEID"),
    "mpiexec": SCHEDULER.format(rank="PALS_RANKID"),
    # More names than a pipe holds: a reader that stops after the first would end this one.
    "scontrol": "#!/bin/bash\necho first; seq -f node%g 20000",
    "module": "#!/bin/bash",
    "conda": "#!/bin/bash",
    "ezpz-moe": "#!/bin/bash\nprintf '%s|' \"$@\"; echo",
}


@pytest.fixture
def environment(tmp_path) -> dict[str, str]:
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in COMMANDS.items():
        file = commands / name
        file.write_text(text)
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
    nodes = tmp_path / "nodes"
    nodes.write_text("first.example\nsecond.example\n")
    return {
        "PATH": os.pathsep.join([str(commands), os.environ["PATH"]]),
        "SLURM_JOB_NODELIST": "[first-second]",
        "PBS_NODEFILE": str(nodes),
        "PBS_O_WORKDIR": str(tmp_path),
    }


@pytest.mark.parametrize(
    ("script", "nproc", "master"),
    [
        ("slurm.sh", 8, "first"),
        ("aurora.sh", 12, "first.hsn.cm.aurora.alcf.anl.gov"),
        ("polaris.sh", 4, "first.example"),
    ],
)
def test_each_node_starts_the_same_job_with_its_own_rank(script, nproc, master, environment):
    job = "my folder/job.toml"
    result = subprocess.run(
        # Not a login shell: a machine's profile would put other commands first.
        [shutil.which("bash"), str(SCRIPTS / script), *([job] if script == "slurm.sh" else [])],
        env={**environment, "JOB": job},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.splitlines() == [
        f"train|{job}|--nproc|{nproc}|--nnodes|2|--node-rank|{node}|--master-addr|{master}|"
        for node in (0, 1)
    ]


def test_every_script_is_tested():
    assert {file.name for file in SCRIPTS.iterdir()} == {"slurm.sh", "aurora.sh", "polaris.sh"}
