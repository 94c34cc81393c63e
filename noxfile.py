"""The host tests with several torchtitans side by side: ``make test-hosts``, ``make test-smoke``.

    nox                                        the releases below
    nox -s smoke                               a few tests with those that are not installed
    nox -s "smoke_of(host='0.2.2')"            with one of them
    nox -s "release(host='0.2.2')"             one of them
    nox -s checkout -- /path/to/torchtitan     a checkout
    nox -s torchao                             what needs torchao's quantization

Every host gets an environment of a megabyte in front of the one that nox runs in, whose torch,
plugin and test tools they share.
"""

import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nox
import tomli

RELEASES = ("0.2.1", "0.2.2", "0.3.0")
OTHERS = RELEASES[:-1]  # the last is what `make test` runs with
TORCHAO = "0.18.0"
PYTEST = ("python", "-m", "pytest")
PARALLEL = ("-n", "auto", "--dist", "loadfile")
PARENT = sysconfig.get_path("purelib")

nox.options.sessions = ["release"]
nox.options.reuse_existing_virtualenvs = True
nox.options.default_venv_backend = "venv"


@nox.session
@nox.parametrize("host", RELEASES)
def release(session: nox.Session, host: str) -> None:
    """Run the host tests with a release of torchtitan."""
    _install(session, host)
    # Some tests carry a run from one host to the other.
    older = Path(session.virtualenv.location).with_name("release-host-0-2-2") / "bin" / "python"
    _test(session, env={"EZPZ_MOE_PYTHON_0_2": str(older)} if older.exists() else {})


@nox.session(python=False)
def smoke(session: nox.Session) -> None:
    """Run what tells quickest that a release of torchtitan no longer works."""

    def run(host: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "nox", "--session", f"smoke_of(host={host!r})"]
        return subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )

    with ThreadPoolExecutor() as pool:
        ran = list(pool.map(run, OTHERS))
    for each in ran:
        session.log("%s", each.stdout)
    if failed := [host for host, each in zip(OTHERS, ran, strict=True) if each.returncode]:
        session.error(f"failed with torchtitan {', '.join(failed)}")


@nox.session
@nox.parametrize("host", OTHERS)
def smoke_of(session: nox.Session, host: str) -> None:
    """Run it with one release, in one process: most of the time is its imports."""
    _install(session, host)
    session.run(*PYTEST, "-m", "smoke and not full", "tests/hosts")


@nox.session
def checkout(session: nox.Session) -> None:
    """Run the host tests with a checkout of torchtitan, which stays as it is."""
    if len(session.posargs) != 1:
        session.error("which checkout? nox -s checkout -- /path/to/torchtitan")
    folder = Path(session.posargs[0]).expanduser().absolute()
    project = folder / "pyproject.toml"
    if not (folder / "torchtitan").is_dir() or not project.is_file():
        session.error(f"{folder}: not a checkout of torchtitan (no torchtitan/, pyproject.toml)")
    _see(session, folder)
    session.install(*tomli.loads(project.read_text())["project"]["dependencies"])
    _test(session)


@nox.session
def torchao(session: nox.Session) -> None:
    """Run what needs torchao, with the installed torchtitan."""
    session.install("--no-deps", f"torchao=={TORCHAO}")
    _see(session)
    session.run(*PYTEST, *PARALLEL, "-m", "full or not full", "tests/test_torchao.py")
    session.run("python", "scripts/make_neighbour_table.py", "--check")


def _test(session: nox.Session, env: dict[str, str] | None = None) -> None:
    """Run the tests, and record how they went; the recording fails where a test did."""
    report = Path(session.create_tmp(), "hosts.xml")
    session.run(
        *(*PYTEST, *PARALLEL, "-m", "full or not full", "tests/hosts"),
        *("--junitxml", str(report)),
        env=env,
        success_codes=[0, 1],
    )
    session.run("python", "scripts/make_host_tables.py", "--record-of", str(report))


def _install(session: nox.Session, host: str) -> None:
    """Install a release of torchtitan."""
    # Before the parent is in sight, or pip would find its torchtitan there.
    session.install("--no-deps", f"torchtitan=={host}")
    _see(session)


def _see(session: nox.Session, *folders: Path) -> None:
    """Let the environment import from ``folders``, and after them from the one that nox runs in."""
    command = ("python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))")
    site = session.run_install(*command, silent=True)
    lines = [*map(str, folders), f"import site; site.addsitedir({PARENT!r})"]
    Path(str(site).strip(), "_hosts.pth").write_text("\n".join(lines) + "\n")
