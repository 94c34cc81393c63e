"""A run that one host saved goes on under the other, after ``ckpt remap``, as if never stopped.

The two hosts pack documents into sequences differently: 0.2 fills [seq_len + 1] tokens across
documents, 0.3 fills [seq_len] pairs of a token and its label, which no document's end separates.
Documents of seq_len + 1 tokens each give the same batches under both, so that everything else can
be compared bit for bit.
"""

import json
import os
import sys
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from dialect import ON_0_2
from trainer_runs import Record, job_folder, train

from ezpz_moe import cli
from ezpz_moe.config.assets import EMBEDDED_TOKENIZER
from ezpz_moe.tools.checkpoints.names import TITAN_0_2, TITAN_0_3

SEQ_LEN = 128
# 0.2 sums a token's experts by a batched product and 0.3 by scatter_add, in another order. A few
# roundings of 2^-24 are left in float32; a norm of gradients has gone through more of them.
ROUNDING = {"losses": 2.0**-20, "gradient_norms": 2.0**-18}
VARIABLE = "EZPZ_MOE_PYTHON_0_2"

pytestmark = [
    pytest.mark.train,
    pytest.mark.skipif(
        ON_0_2 or VARIABLE not in os.environ,
        reason=f"needs torchtitan 0.3 here, and in {VARIABLE} the interpreter of an environment "
        "with 0.2; make test-hosts has both",
    ),
]


@pytest.fixture(scope="module", params=[1, 2], ids="{} ranks".format)
def ranks(request) -> int:
    return request.param


def write_documents(path: Path, count: int) -> None:
    """Documents of SEQ_LEN + 1 tokens, the marks of beginning and end among them."""
    from torchtitan.components.tokenizer import HuggingFaceTokenizer

    tokenizer = HuggingFaceTokenizer.Config().build(tokenizer_path=str(EMBEDDED_TOKENIZER))
    documents, text = [], ""
    for word in " ".join(topics[name] for name in sorted(topics)).split():
        text = f"{text} {word}".lstrip()
        tokens = len(tokenizer.encode(text, add_bos=True, add_eos=True))
        if tokens == SEQ_LEN + 1:
            documents.append(json.dumps({"text": text}))
        if tokens > SEQ_LEN:
            text = ""
        if len(documents) == count:
            break
    path.write_text("\n".join(documents))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, ranks) -> Path:
    folder = job_folder(tmp_path_factory.mktemp("hosts"))
    write_documents(folder / "documents.jsonl", count=6 * 2 * ranks)
    job = (folder / "job.toml").read_text()
    # Wider and learning slower than the tests' model, in which roundings grow beyond ROUNDING.
    (folder / "wide.toml").write_text('inherits = "debugmodel"\nn_layers = 3\n')
    job = job.replace('flavor = "tiny_sdpa"', 'flavor = "wide_sdpa_for_loop"')
    job = job.replace("lr = 1e-2", "lr = 1e-3")
    more = 'dataset_path = "documents.jsonl"\n'
    (folder / "job.toml").write_text(job.replace("[training]\n", f"[training]\n{more}"))
    return folder


def run(generation: str, name: str, folder: Path, ranks: int, *flags: str) -> Record:
    """Six steps of the job under a host, its checkpoints below ``folder / name``."""
    old = generation == TITAN_0_2
    door = ["--job.custom-config-module", "ezpz_moe"] if old else ["--module", "ezpz_moe"]
    file, dump = (
        ("--job.config-file", "--job.dump-folder") if old else ("--config", "--dump-folder")
    )
    python = os.environ[VARIABLE] if old else sys.executable
    arguments = [
        *(*door, file, str(folder / "job.toml"), dump, str(folder / name)),
        *("--training.steps", "6", "--checkpoint.enable", "--checkpoint.interval", "4", *flags),
    ]
    return train({name: arguments}, folder, ranks=ranks, python=python)[name][0]


@pytest.mark.parametrize(
    ("source", "target"), [(TITAN_0_2, TITAN_0_3), (TITAN_0_3, TITAN_0_2)], ids="from {}".format
)
def test_a_run_goes_on_under_the_other_host(folder, ranks, source, target) -> None:
    whole = run(source, f"saved_{source}", folder, ranks)
    saved, carried = (
        folder / name / "checkpoint" / "step-4" for name in (f"saved_{source}", f"on_{target}")
    )
    assert cli.main(["ckpt", "remap", str(saved), str(carried), "--to", target]) == 0
    resumed = run(target, f"on_{target}", folder, ranks, "--checkpoint.load-only")
    for what, bound in ROUNDING.items():
        torch.testing.assert_close(resumed[what], whole[what][4:], rtol=bound, atol=0)
