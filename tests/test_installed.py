"""Which torchtitan an import would find: a release by its version, a checkout by its commit."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ezpz_moe.hosts import installed, untested


@pytest.fixture(autouse=True)
def _asked_anew():
    installed.host.cache_clear()
    yield
    installed.host.cache_clear()


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    """A git repository with a torchtitan in it that imports find first."""
    package = tmp_path / "checkout" / "torchtitan"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    _git(package.parent, "init", "-q")
    _git(package.parent, "commit", "-q", "--allow-empty", "-m", "x")
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.delitem(sys.modules, "torchtitan", raising=False)
    return package.parent


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), "-c", "user.name=x", "-c", "user.email=x@y", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def distribution(site: Path, origin: dict | None = None) -> None:
    """What pip leaves in ``site``, with the ``direct_url.json`` of an origin that is no index."""
    folder = site / "torchtitan-9.9.9.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: torchtitan\nVersion: 9.9.9+x\n")
    if origin:
        (folder / "direct_url.json").write_text(json.dumps(origin))


def test_a_checkout_is_its_commit_and_has_not_the_version_of_what_it_hides(checkout):
    head = _git(checkout, "rev-parse", "HEAD")
    assert installed.host() == installed.Host(checkout / "torchtitan", commit=head)
    assert installed.host_name() == f"commit {head[:12]}"
    assert not untested.is_tested()


def test_a_checkout_where_git_is_not_installed_is_of_no_known_commit(checkout, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert installed.host() == installed.Host(checkout / "torchtitan")


def test_files_without_a_repository_have_neither(checkout):
    (checkout / ".git").rename(checkout / "elsewhere")
    assert installed.host() == installed.Host(checkout / "torchtitan")
    assert installed.host_name() == "of no known version"


def test_a_release_is_its_version(checkout):
    (checkout / ".git").rename(checkout / "elsewhere")
    distribution(checkout)
    assert installed.host_name() == "9.9.9"


def test_an_editable_installation_is_the_checkout(checkout, tmp_path, monkeypatch):
    origin = {"url": checkout.as_uri(), "dir_info": {"editable": True}}
    distribution(tmp_path / "site", origin)
    monkeypatch.syspath_prepend(tmp_path / "site")
    found = installed.host()
    assert (found.version, found.folder) == ("9.9.9", checkout / "torchtitan")
    assert found.commit == _git(checkout, "rev-parse", "HEAD")


def test_an_installation_from_git_is_its_commit(checkout):
    (checkout / ".git").rename(checkout / "elsewhere")
    distribution(checkout, {"url": "https://x", "vcs_info": {"vcs": "git", "commit_id": "a" * 40}})
    assert installed.host_name() == f"commit {'a' * 12}"


def test_no_host_at_all(monkeypatch):
    monkeypatch.setattr(installed.util, "find_spec", lambda name: None)
    assert installed.host() is None
    assert installed.host_name() is None


def test_a_pair_is_tested_when_nothing_failed():
    runs = [
        installed.HostRun("2.15.0", "0.3.0", "torchtitan 0.3", "cpu", "2026-11-21", 9, failed, 1)
        for failed in (0, 1)
    ]
    assert installed.passed(runs) == (("2.15.0", "0.3.0"),)
    assert installed.passed(runs[1:]) == ()
