"""A flavor's [router], [balance] and [telemetry]: values of the wrong kind, and unknown keys."""

from __future__ import annotations

from pathlib import Path

import pytest
from flavor_files import said

NOT_NEGATIVE = "should be greater than or equal to 0."
RATE = "should be a number of at least 0, or a table of start, end and steps."
PADDING = "should be 'token', 'trailing' or 'labels'. Did you mean 'labels'?"
SCHEDULE = "should be a number above 0, or a table of start, end and steps."


@pytest.mark.parametrize(
    ("table", "text", "shown", "message"),
    [
        ("router", 'routing = "sinkhron"', "'sinkhron'", None),
        ("router", "jitter_noise = 1", "1", "should be less than 1."),
        ("router", "jitter_noise = -0.1", "-0.1", NOT_NEGATIVE),
        ("router", "jitter_noise = nan", "nan", "should be a finite number."),
        ("router", 'jitter_noise = "some"', "'some'", "should be a valid number."),
        (
            "router",
            'gate_precision = "fp32"',
            "'fp32'",
            "should be 'bfloat16', 'float32' or 'float64'.",
        ),
        ("router", "freeze = 1", "1", "should be a valid boolean."),
        ("router", "temperature = 0", "0", SCHEDULE),
        ("router", "temperature = -1.5", "-1.5", SCHEDULE),
        ("router", "temperature = inf", "inf", SCHEDULE),
        ("router", "temperature = nan", "nan", SCHEDULE),
        ("router", "temperature = true", "True", SCHEDULE),
        ("router", 'temperature = "hot"', "'hot'", SCHEDULE),
        ("router", "pad_token_id = -1", "-1", NOT_NEGATIVE),
        ("router", "pad_token_id = 1.0", "1.0", "should be a valid integer."),
        ("router", "dispatch_padding = 0", "0", "should be a valid boolean."),
        ("router", "null_experts = -1", "-1", NOT_NEGATIVE),
        ("router", "copy_experts = -1", "-1", NOT_NEGATIVE),
        ("router", "constant_experts = 16385", "16385", "should be less than or equal to 16384."),
        ("router", "top_k = 0", "0", "should be greater than or equal to 1."),
        ("router", "sinkhorn_tolerance = 0", "0", "should be greater than 0."),
        ("router", "sinkhorn_iterations = 0", "0", "should be greater than or equal to 1."),
        ("router", "noise = 1.5", "1.5", "should be less than or equal to 1."),
        ("router", "noise = -0.5", "-0.5", NOT_NEGATIVE),
        ("router", "skip_first_n_experts = -1", "-1", NOT_NEGATIVE),
        ("balance", "aux_loss = -0.1", "-0.1", NOT_NEGATIVE),
        ("balance", "mse_loss = -1", "-1", NOT_NEGATIVE),
        ("balance", "z_loss = inf", "inf", "should be a finite number."),
        ("balance", "z_loss = true", "True", "should be a valid number."),
        ("balance", 'scope = "rank"', "'rank'", "should be 'sequence', 'batch' or 'global'."),
        ("balance", "capacity_factor = -1", "-1", NOT_NEGATIVE),
        ("balance", "min_capacity = 0", "0", "should be greater than or equal to 1."),
        ("balance", 'drop = "first"', "'first'", "should be 'last' or 'probability'."),
        ("balance", "bias_rate = -0.1", "-0.1", RATE),
        ("balance", "bias_rate = false", "False", RATE),
        ("router", 'padding = "label"', "'label'", PADDING),
        ("telemetry", "every = 0", "0", "should be greater than or equal to 1."),
        ("telemetry", 'images = "png"', "'png'", "should be a valid boolean."),
        ("telemetry", "alert_dead_steps = 0", "0", "should be greater than or equal to 1."),
        ("telemetry", "alert_cv_rise = 1", "1", "should be greater than 1."),
        ("telemetry", "alert_collapse = 1.0", "1.0", "should be less than 1."),
        ("telemetry", "alert_collapse = 0", "0", "should be greater than 0."),
    ],
)
def test_a_value_of_the_wrong_kind(
    tmp_path: Path, table: str, text: str, shown: str, message: str | None
) -> None:
    message = (
        message or "should be 'topk', 'sinkhorn', 'balanced' or 'relu'. Did you mean 'sinkhorn'?"
    )
    key = text.partition(" ")[0]
    expected = f"mine.toml: {table}.{key} = {shown}: {message}"
    assert said(tmp_path, f"[{table}]\n{text}") == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("router = 3", "router = 3: should be a table."),
        ("balance = []", "balance = []: should be a table."),
        ('[router]\nrooting = "topk"', "unknown key 'router.rooting'. Did you mean 'routing'?"),
        (
            "[balance.global]\naux_los = 1",
            "unknown key 'balance.global.aux_los'. Did you mean 'aux_loss'?",
        ),
        ("[balance]\nglobal = 1", "balance.global = 1: should be a table."),
        (
            "[balance]\nglobl = {}",
            "unknown key 'balance.globl'. Did you mean 'global'?",
        ),
        ("[balance.batch]\nz_loss = -1", f"balance.batch.z_loss = -1: {NOT_NEGATIVE}"),
        ("[balance]\naux_los = 1", "unknown key 'balance.aux_los'. Did you mean 'aux_loss'?"),
        ("[telemetry]\nevry = 1", "unknown key 'telemetry.evry'. Did you mean 'every'?"),
        (
            "[telemetry]\ndump = { every = 5 }",
            "telemetry.dump = {'every': 5}: should be a table of every and what, such as "
            '{ every = 1000, what = ["ids"] }.',
        ),
        (
            '[telemetry]\ndump = { every = 5, what = ["id"] }',
            "telemetry.dump.what.0 = 'id': should be 'ids' or 'probabilities'. Did you mean 'ids'?",
        ),
        (
            '[telemetry]\ndump = { every = 5, what = "ids" }',
            "telemetry.dump = {'every': 5, 'what': 'ids'}: should be a table of every and what, "
            'such as { every = 1000, what = ["ids"] }.',
        ),
        (
            "[router]\ntemperature = { start = 1, end = 0, steps = 2 }",
            "router.temperature.end = 0: should be greater than 0.",
        ),
        (
            "[router]\ntemperature = { start = 1, end = 2, steps = 0 }",
            "router.temperature.steps = 0: should be greater than or equal to 1.",
        ),
        (
            '[balance]\nbias_update = "sign"\n'
            'bias_rate = { start = 1, end = 0, steps = 2, shape = "exponential" }',
            "balance.bias_rate = {'end': 0, 'shape': 'exponential', 'start': 1, 'steps': 2}: "
            'shape = "exponential" multiplies by the same factor in every step, so it neither '
            'leaves 0 nor reaches it. Choose "linear" or "cosine".',
        ),
        (
            '[balance]\nbias_rate = { start = 1, end = 2, steps = 2, shape = "cosin" }',
            "balance.bias_rate.shape = 'cosin': should be 'linear', 'exponential' or 'cosine'. "
            "Did you mean 'cosine'?",
        ),
        (
            "[balance]\nbias_rate = { start = 1, steps = 2 }",
            "balance.bias_rate: the key end is missing; a schedule must be complete.",
        ),
    ],
)
def test_a_key_that_is_not_there_or_not_a_table(tmp_path: Path, text: str, message: str) -> None:
    assert said(tmp_path, text) == f"mine.toml: {message}"


def test_a_value_within_a_list_is_of_the_file_that_sets_the_list(tmp_path: Path) -> None:
    text = '[telemetry]\ndump = { every = 5, what = ["ids", "weights"] }'
    (tmp_path / "parent.toml").write_text(f'inherits = "debugmodel"\n{text}')
    message = said(tmp_path, "[telemetry]\nevery = 2", inherits="parent")
    assert message.startswith("parent.toml: telemetry.dump.what.1 = 'weights': should be 'ids' or")
