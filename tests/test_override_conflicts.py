"""Door 2: overrides that exclude each other are one line, where the host has a traceback."""

import subprocess
from collections.abc import Sequence

import fork_server
import pytest

EXPERTS = 'ezpz_moe.overrides.experts={"compute_backend": "for_loop"}'
SDPA = "ezpz_moe.overrides.sdpa"
FUSED = "torchtitan.overrides.fused_swiglu.fused_grouped_experts"
FFN = "torchtitan.overrides.fused_swiglu.fused_swiglu"

# As the trainer does it, in a process that has not imported the overrides.
APPLY = """
import sys
from ezpz_moe.hosts.detect import check_host
check_host()
from torchtitan.config.override import apply_overrides, parse_cli_imports
from torchtitan.models.deepseek_v3.config_registry import deepseek_v3_debugmodel
config = deepseek_v3_debugmodel()
config.override.imports = parse_cli_imports(sys.argv[1:])
print(len(apply_overrides(config.override, config)), "nodes")
"""


def applied(overrides: Sequence[str]) -> subprocess.CompletedProcess:
    command = [fork_server.python(), "-c", APPLY, *overrides]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([EXPERTS, EXPERTS], "ezpz_moe.overrides.experts: named 2 times. Name it once."),
        pytest.param(
            *([SDPA, f"{SDPA},{FFN}"], "ezpz_moe.overrides.sdpa: named 2 times."),
            marks=pytest.mark.full,
        ),
        ([FUSED, EXPERTS], f"ezpz_moe.overrides.experts and {FUSED}: both replace"),
        pytest.param(
            [FFN, EXPERTS, FFN, FUSED],
            f"{FFN}: named 2 times. Name it once.\n  override.imports",
            marks=pytest.mark.full,
        ),
    ],
    ids=["experts twice", "sdpa twice", "fused experts", "several mistakes"],
)
def test_overrides_that_the_host_refuses_with_a_traceback(overrides, message):
    result = applied(overrides)
    assert result.returncode == 2, result.stderr
    said = [line for line in result.stderr.splitlines() if "ezpz-moe: error: " in line]
    assert len(said) == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_other_overrides_go_together():
    result = applied([FFN, SDPA, EXPERTS])
    assert result.returncode == 0, result.stderr
    assert "17 nodes" in result.stdout  # 6 attentions, 5 layers of experts, 1 + 5 dense FFNs
