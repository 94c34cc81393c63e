"""Door 2: mistakes in overrides are one line, where the host has a traceback or says nothing."""

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import fork_server
import pytest

EXPERTS = 'ezpz_moe.overrides.experts={"compute_backend": "for_loop"}'
SDPA = "ezpz_moe.overrides.sdpa"
FUSED = "torchtitan.overrides.fused_swiglu.fused_grouped_experts"
HERE = str(Path(__file__).parent)
FFN = "torchtitan.overrides.fused_swiglu.fused_swiglu"

# As the trainer does it, in a process that has not imported the overrides.
APPLY = """
import importlib, sys
sys.path.insert(0, sys.argv.pop(1))
from ezpz_moe.hosts.detect import check_host
check_host()
from torchtitan.config.override import apply_overrides, parse_cli_imports
model, name, *overrides = sys.argv[1:]
config = getattr(importlib.import_module(f"torchtitan.models.{model}.config_registry"), name)()
config.override.imports = parse_cli_imports(overrides)
replaced = apply_overrides(config.override, config)
print(len(replaced), "nodes", *replaced)
"""


MIXTURE = "deepseek_v3", "deepseek_v3_debugmodel"
DENSE = "qwen3", "qwen3_debugmodel"
OF_DEEP_EP = "qwen3", "qwen3_moe_deepep"


def applied(overrides: Sequence[str], config=MIXTURE, **rank: str) -> subprocess.CompletedProcess:
    command = [fork_server.python(), "-c", APPLY, HERE, *config, *overrides]
    env = {**os.environ, **rank}
    return subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=600, check=False
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([EXPERTS, EXPERTS], "ezpz_moe.overrides.experts: named 2 times. Name it once."),
        pytest.param(
            *([SDPA, f"{SDPA},{FFN}"], "ezpz_moe.overrides.sdpa: named 2 times."),
            marks=pytest.mark.full,
        ),
        (
            [FUSED, EXPERTS],
            f"{FUSED} and ezpz_moe.overrides.experts: both replace model_spec.model.layers.1.",
        ),
        (
            [SDPA, "torchtitan.overrides.fused_mla.fused_mla"],
            f"{SDPA} and torchtitan.overrides.fused_mla.fused_mla: both replace model_spec.model.l",
        ),
        pytest.param(
            [FFN, EXPERTS, FFN, FUSED],
            f"{FFN}: named 2 times. Name it once.\n  override.imports",
            marks=pytest.mark.full,
        ),
    ],
    ids=["experts twice", "sdpa twice", "fused experts", "fused MLA", "several mistakes"],
)
def test_overrides_that_the_host_refuses_with_a_traceback(overrides, message):
    assert_refused(applied(overrides), message)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["ezpz_moe.overrides.expert"], "there is no such override. Did you mean 'ezpz_moe.over"),
        ([f'{SDPA}={{"backend": "x"}}'], f"{SDPA}: unknown key 'backend'. It takes none."),
        ([EXPERTS.replace("backend", "back")], "Did you mean 'compute_backend'? It takes compute_"),
        ([EXPERTS.replace('"for_loop"', '["for_loop"]')], "= ['for_loop']: should be a name."),
    ],
    ids=["no such override", "a key of sdpa", "a key of experts", "a list"],
)
def test_what_an_override_does_not_take(overrides, message):
    assert_refused(applied(overrides), message)


def test_an_override_that_would_replace_nothing_beside_one_that_does():
    assert_refused(applied([SDPA, EXPERTS], DENSE), "the model has no routed experts")


def test_a_token_dispatcher_that_this_machine_cannot_run():
    """Whose kernels the host would look for once the model is built."""
    result = applied([EXPERTS], OF_DEEP_EP, RANK="0", WORLD_SIZE="4")
    assert_refused(
        result,
        '--config: the token dispatcher of its model, "deepep", has kernels for CUDA alone; this '
        "is cpu. Choose a config whose dispatcher is the standard one.",
    )
    assert "8 nodes" in applied([EXPERTS], OF_DEEP_EP).stdout, "to look at it needs no CUDA"


def test_an_override_of_what_holds_the_layer():
    result = applied([EXPERTS, "others_overrides.mixture"])
    assert_refused(
        result,
        "others_overrides.mixture and ezpz_moe.overrides.experts: the first replaces a node that "
        "contains model_spec.model.layers.2.moe.routed_experts, which the second replaces. Remove",
    )


@pytest.mark.parametrize(
    "names", [["others_overrides.dispatcher", EXPERTS], [EXPERTS, "others_overrides.dispatcher"]]
)
def test_an_override_of_the_layers_dispatcher_leaves_the_layer_composed(names):
    result = applied([*names, "others_overrides.mixture_elsewhere"])
    assert result.returncode == 0, result.stderr
    assert "10 nodes" in result.stdout  # 5 dispatchers, 5 experts
    assert ".routed_experts.inner_experts GroupedExperts.Config -> " in result.stdout


def assert_refused(result: subprocess.CompletedProcess, message: str) -> None:
    assert result.returncode == 2, result.stderr
    said = [line for line in result.stderr.splitlines() if "ezpz-moe: error: " in line]
    assert len(said) == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_other_overrides_go_together():
    result = applied([FFN, SDPA, EXPERTS])
    assert result.returncode == 0, result.stderr
    assert "17 nodes" in result.stdout  # 6 attentions, 5 layers of experts, 1 + 5 dense FFNs
