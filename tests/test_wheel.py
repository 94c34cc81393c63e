"""The built wheel, in an environment of its own: it carries the flavors, the tokenizer, the doors.

The environment has what reading a flavor needs, and neither torch nor torchtitan: those would take
minutes and gigabytes, and nothing here may need them. No network is needed either, which the nodes
of a cluster often lack: what the wheel is built with and depends on is that of the running tests.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterator
from importlib.metadata import Distribution
from pathlib import Path

import pytest
import tomli
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
PROJECT = tomli.loads((ROOT / "pyproject.toml").read_text())["project"]
LIGHT_DEPENDENCIES = ("annotated-types", "pydantic", "rich", "tomli", "tyro")
PROGRAM = """
from ezpz_moe.config.assets import EMBEDDED_TOKENIZER
from ezpz_moe.compute.names import known_backend_names
from ezpz_moe.config.flavors import flavor_names, load_flavor
from ezpz_moe.config.foreign_keys import projects
import ezpz_moe

flavor = load_flavor("10B_2B_sdpa_batched_mm_padded")
print(flavor.compute_backend, flavor.dimensions.num_experts, len(flavor_names()))
print(sorted(known_backend_names()))
print(sorted(path.name for path in EMBEDDED_TOKENIZER.iterdir()))
print(len(projects()))
print(ezpz_moe.__file__)
"""


def run(*command: str | Path, **options) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, **options
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    """The interpreter of a new environment with the wheel in it."""
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT)
    venv.create(folder / "env", with_pip=True)
    interpreter = folder / "env" / "bin" / "python"
    run(interpreter, "-m", "pip", "install", "--no-deps", *folder.glob("*.whl"))
    site = Path(sysconfig.get_path("purelib", "venv", vars={"base": str(folder / "env")}))
    for name in LIGHT_DEPENDENCIES:
        for distribution in _with_dependencies(name):
            _copy(distribution, site)
    return interpreter


def _with_dependencies(name: str) -> Iterator[Distribution]:
    """What is installed under ``name`` here, and all that it needs."""
    distribution = Distribution.from_name(name)
    yield distribution
    for requirement in map(Requirement, distribution.requires or ()):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield from _with_dependencies(requirement.name)


def _copy(distribution: Distribution, site: Path) -> None:
    for file in distribution.files or ():
        if ".." not in file.parts and file.suffix != ".pyc":  # commands are not needed
            (site / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file.locate(), site / file)


def test_the_wheel_has_flavors_backends_and_tokenizer(python, tmp_path):
    output = run(python, "-c", PROGRAM, cwd=tmp_path).splitlines()
    flavor, backends, tokenizer, peers, where = output
    checkout = {path.stem for path in (ROOT / "flavors").glob("[!_]*.toml")}
    assert flavor == f"batched_mm_padded 36 {len(checkout)}"
    files = (ROOT / "ezpz_moe" / "compute" / "backends").glob("[!_]*")
    assert backends == str(sorted(path.stem for path in files))
    assert tokenizer == "['tokenizer.json', 'tokenizer_config.json']"
    assert peers == "6"
    assert str(python.parent.parent) in where


def test_the_command_line_starts(python, tmp_path):
    assert "flavors" in run(python.parent / "ezpz-moe", "--help", cwd=tmp_path)
