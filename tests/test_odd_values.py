"""Values of a TOML that nobody expects: one short line each, which names file and key."""

import re

import pytest

from ezpz_moe.config.job import load_job
from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.limits import compile_problems, memory_problems
from ezpz_moe.hosts.titan.job_keys import KEYS

JOB = """
[model]
name = "ezpz_moe"
flavor = "FLAVOR"
[training]
steps = 2
"""


@pytest.fixture
def refused(tmp_path):
    """What is said of a job with this flavor, this text at its end, and flavors beside it."""

    def said(text: str = "", *, flavor: str = "debugmodel", **flavors: str) -> str:
        for name, keys in flavors.items():
            (tmp_path / f"{name}.toml").write_text(f'inherits = "debugmodel"\n{keys}')
        (tmp_path / "job.toml").write_text(JOB.replace("FLAVOR", flavor) + text)
        with pytest.raises(EzpzError) as error:
            load_job(tmp_path / "job.toml", KEYS)
        message = str(error.value)
        assert "job.toml: " in message
        assert len(message.splitlines()) == 1
        assert all(each.isprintable() for each in message)
        assert len(message) < 1500
        return message

    return said


def test_a_flavor_whose_name_is_longer_than_a_files(refused):
    assert re.search(r"unknown flavor 'x{40}\.\.\.x{17}'", refused(flavor="x" * 300))


@pytest.mark.parametrize("written", ["./tiny", "tiny.toml", "some/where/tiny.toml"])
def test_a_flavors_file_for_its_name(refused, written):
    message = refused(flavor=written, tiny="n_layers = 3\n")
    assert f"'{written}' is a path. Write the flavor's name alone: 'tiny'." in message


@pytest.mark.parametrize("backend", ["(" * 3000, "for_loop(" + "[" * 3000 + ")"])
def test_a_backend_of_thousands_of_signs(refused, backend):
    message = refused(flavor="mine", mine=f'compute_backend = "{backend}"\n')
    assert "mine.toml: compute_backend = '" in message


def test_an_integer_of_more_than_64_bits(refused):
    """TOML has none, though Python's parser reads it."""
    message = refused(f"[checkpoint]\ninterval = {2**63}\n")
    assert "checkpoint.interval: the integer there is too large" in message
    message = refused(f"[a]\nb = [1, [{{c = -{2**63 + 1}}}]]\n")
    assert "a.b.c: the integer there is too large" in message
    assert "an integer in it has thousands of digits" in refused(f"[a]\nb = {'9' * 9000}\n")


def test_keys_are_shown_short_and_printable(refused):
    message = refused('"a\\u001b[31mred\\u0007\\nline" = 1\n')
    assert r"[training] a\x1b[31mred\x07\nline: unknown key" in message
    assert re.search(r"\[training\] k{380}\.\.\.k{16}: ", refused("k" * 100_000 + " = 1\n"))


def test_a_message_is_readable_whoever_made_it():
    message = str(EzpzError("a \x1b[2J " + "k" * 1000 + "\nsecond line"))
    first, second = message.splitlines()
    assert first.startswith(r"a \x1b[2J kkk")
    assert len(first) < 420
    assert second == "second line"
    assert len(str(EzpzError("many words " * 1000))) == 4000
    path = "/".join(["folder"] * 50)
    assert path in str(EzpzError(f"{path}: is missing")), "a long path stays whole"


def test_a_batch_that_no_machine_can_hold():
    (message,) = memory_problems("training.local_batch_size", 2**40, 2**40 * 128, dim=256)
    assert "local_batch_size = 1099511627776: 140,737,488,355,328 tokens at once would" in message
    # By hand: (2 x 8 bytes of ids + 2 x 256 of activations) x 2**47 tokens = 528 x 128 TiB.
    assert "take 67,584 TiB on each rank" in message
    assert not [*memory_problems("training.local_batch_size", 2**20, 2**30, dim=7168)]


def test_a_backend_that_torch_compile_does_not_have():
    (message,) = compile_problems("inductr")
    assert "compile.backend = 'inductr': torch.compile has no such backend. Did you mean" in message
    assert "'inductor'? It has " in message
    for known in ("inductor", "eager", "aot_eager"):
        assert not [*compile_problems(known)]
