"""The launch scripts of docs/launch: what each node would type, with schedulers made of shell."""

import os
import re
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from ezpz_moe.tools.launch import SECONDS_TO_SAVE

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
    "qstat": "#!/bin/bash\necho Job Id: $2; echo '    Resource_List.walltime = 02:01:05'",
    "timeout": '#!/bin/bash\necho $1 $2 >&2; exec "${@:3}"',
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
        "PBS_JOBID": "7",
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
    assert _seconds_before_limit(script, result.stderr) >= SECONDS_TO_SAVE + 60


def _seconds_before_limit(script: str, said: str) -> int:
    """When a run of 2:01:05 is sent SIGTERM; the latest of both nodes."""
    if script == "slurm.sh":
        return int(re.search(r"^#SBATCH --signal=TERM@(\d+)$", _text(script), re.M)[1])
    after = [int(each) for each in re.findall(r"^--signal=TERM (\d+)$", said, re.M)]
    assert len(after) == 2
    return 2 * 3600 + 65 - max(after)


def _text(script: str) -> str:
    return (SCRIPTS / script).read_text()


def test_every_script_is_tested():
    assert {file.name for file in SCRIPTS.iterdir()} == {"slurm.sh", "aurora.sh", "polaris.sh"}
