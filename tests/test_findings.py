"""The scripts of ``findings/`` tell apart: as described, changed, and not known.

None is run with its packages here: a stand-in for ``python3`` makes an environment whose
interpreter does nothing but exit.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

ROOT = Path(__file__).parent.parent
FINDINGS = sorted((ROOT / "findings").glob("*.sh"))
PYTHON3 = """#!/bin/sh
mkdir -p "$3/bin"
cat > "$3/bin/python" << 'EOF'
#!/bin/sh
case "$*" in "-m pip "*) exit {of_pip};; "-m zipfile "*) exit 0;; esac
echo seen
exit {of_script}
EOF
chmod +x "$3/bin/python"
"""


class Ended(NamedTuple):
    code: int
    said: str
    left: list[Path]


def ended(finding: Path, folder: Path, *, of_pip: int, of_script: int) -> Ended:
    """Run a finding whose pip and whose script exit so."""
    temporary = folder / "temporary"
    temporary.mkdir(parents=True)
    python3 = folder / "python3"
    python3.write_text(PYTHON3.format(of_pip=of_pip, of_script=of_script))
    python3.chmod(0o755)
    environment = {"PATH": f"{folder}:{os.environ['PATH']}", "TMPDIR": str(temporary)}
    command = ["bash", str(finding)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    return Ended(result.returncode, result.stderr, list(temporary.iterdir()))


@pytest.mark.parametrize("finding", FINDINGS, ids=lambda path: path.stem)
def test_what_could_not_be_installed_is_no_change(finding: Path, tmp_path: Path) -> None:
    failed = ended(finding, tmp_path / "failed", of_pip=1, of_script=0)
    assert (failed.code, failed.left) == (2, [])
    assert "could not install " in failed.said
    changed = ended(finding, tmp_path / "changed", of_pip=0, of_script=1)
    assert (changed.code, changed.left) == (1, [])
    assert "could not install" not in changed.said
    assert ended(finding, tmp_path / "same", of_pip=0, of_script=0) == (0, "", [])


@pytest.mark.parametrize("finding", FINDINGS, ids=lambda path: path.stem)
def test_a_finding_installs_the_release_that_it_speaks_of(finding: Path) -> None:
    text = finding.read_text()
    release = re.match(r"#!.*\n# ([a-z0-9-]+) (\d+(?:\.\d+)+)[ :]", text)
    assert release
    assert "{}=={}".format(*release.groups()) in text
    assert os.access(finding, os.X_OK)


def test_the_findings_that_documents_name_are_there() -> None:
    pages = [*(ROOT / "docs").rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    names = (re.findall(r"findings/(\w+\.\w+)", page.read_text()) for page in pages)
    named = {name for of_page in names for name in of_page}
    assert named
    assert named <= {path.name for path in (ROOT / "findings").iterdir()}


def test_a_ratio_is_near_where_value_and_gradient_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise no loss of another framework would be seen to change."""
    monkeypatch.syspath_prepend(ROOT / "findings")
    import router_losses as written

    x = written.logits()
    p = x.softmax(-1)
    formula = written.switch_loss(p, written.chosen(p, 2))
    assert written.ratio_of(formula.float() / 4, formula, x).is_near(0.25, 0.25)
    (along,) = torch.autograd.grad(formula, x, retain_graph=True)
    aside = torch.ones_like(along) - along * along.sum() / along.square().sum()
    moved = 0.001 * (aside * (x - x.detach())).sum()  # 0, whose gradient is orthogonal to ``along``
    of_another_value = formula + 0.001
    of_another_gradient = 1.001 * formula - 0.001 * formula.detach()
    for other in (of_another_value, of_another_gradient, formula + moved):
        assert not written.ratio_of(other, formula, x).is_near(1, 1)
