"""``ezpz-moe bench`` as it is typed. No figure is judged here."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from ezpz_moe import __version__, cli
from ezpz_moe.compute.backends.for_loop import ForLoop
from ezpz_moe.tools.bench import plan
from ezpz_moe.tools.bench.plan import RETAIN

TINY = ["bench", "--device", "cpu", "--shape", "4,32,48,16", "--repeats", "2"]
FEW = ["--backends", "for_loop", "for_loop(recompute=true)", "--against", "dense", "indexed"]


def test_everything_that_runs_here(tmp_path: Path, capsys) -> None:
    file, picture = tmp_path / "figures.json", tmp_path / "figures.png"
    out = ["--out", str(file), "--plot", str(picture)]
    assert cli.main([*TINY, "--routing", "balanced", "zipf1", *out]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "4,32,48,16 (E=4 D=32 F=48 R=16), zipf1: 2 to 8 rows per expert" in captured.out
    assert captured.out.count("left out: sonicmoe: ") == 1, "told once, not for every table"
    assert picture.read_bytes().startswith(b"\x89PNG")

    report = json.loads(file.read_text())
    assert report["command"].startswith("ezpz-moe")
    about = report["environment"]
    assert about["versions"]["torch"] == torch.__version__
    assert about["versions"]["ezpz_moe"] == __version__
    assert about["threads"] == torch.get_num_threads()
    assert about["device"].startswith("cpu: ")
    assert about["date"][:2] == "20"
    assert [row["routing"] for row in report["measured"]] == ["balanced", "zipf1"]
    for row in report["measured"]:
        assert row["allocator"] == "default"
        assert {"stock", "indexed", "dense", "for_loop"} <= row["figures"].keys()
        assert not row["figures"].keys() & row["left_out"].keys()
        assert "stock_products" not in row["figures"], "the layer itself was measured"
        assert row["failed"] == {}
        assert set(row["backends"]) <= row["figures"].keys()
        for name, each in row["figures"].items():
            assert name in captured.out
            assert len(each["both_ms"]) == len(each["forward_ms"]) == 2
            assert 0 < each["summary"]["forward_ms"] < each["summary"]["both_ms"]


def test_what_is_named_is_measured_in_every_dtype(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    dtypes = ["--dtype", "float32", "bfloat16", "--routing", "one_hot"]
    assert cli.main([*TINY, *FEW, *dtypes, "--out", str(file)]) == 0
    report = json.loads(file.read_text())
    assert [row["dtype"] for row in report["measured"]] == ["float32", "bfloat16"]
    for row in report["measured"]:
        assert set(row["figures"]) == {"dense", "indexed", "for_loop", "for_loop(recompute=true)"}
        assert row["left_out"] == {}
        assert sorted(row["counts"]) == [0, 0, 0, 16]


def test_float32_is_compared_with_the_hosts_products(capsys) -> None:
    assert cli.main([*TINY, "--routing", "balanced", "--dtype", "float32"]) == 0
    output = capsys.readouterr().out
    assert "speed / stock products" in output
    assert "left out: stock: torchtitan's layer casts to bfloat16" in output


def test_both_allocators(tmp_path: Path, monkeypatch) -> None:
    """The second one is measured by a process that says what its environment is."""
    for variable in [name for name in os.environ if name.startswith("MALLOC")]:
        monkeypatch.delenv(variable)
    file = tmp_path / "figures.json"
    arguments = [*TINY, *FEW, "--routing", "balanced", "--allocator", "both"]
    assert cli.main([*arguments, "--out", str(file)]) == 0
    first, second = json.loads(file.read_text())["measured"]
    assert (first["allocator"], first["allocator_variables"]) == ("default", {})
    assert second["allocator"] == "retain"
    assert RETAIN.items() <= second["allocator_variables"].items()
    assert first["figures"].keys() == second["figures"].keys()
    assert not os.environ.keys() & RETAIN.keys()


def test_a_process_that_breaks_is_told(monkeypatch, capfd) -> None:
    monkeypatch.setattr(plan, "RETAIN", {"PYTHONHOME": "/nowhere"})
    with pytest.raises(SystemExit) as stopped:
        cli.main([*TINY, *FEW, "--routing", "balanced", "--allocator", "retain"])
    assert stopped.value.code == 2
    assert "measuring with --allocator retain ended with exit code 1" in capfd.readouterr().err


def test_a_backend_that_breaks_is_an_exit_code(monkeypatch, capsys) -> None:
    def broken(*arguments):
        raise RuntimeError("no kernel")

    monkeypatch.setattr(ForLoop, "ffn", staticmethod(broken))
    assert cli.main([*TINY, *FEW, "--routing", "balanced"]) == 1
    output = capsys.readouterr().out
    assert "FAILED: for_loop: RuntimeError: no kernel" in output
    assert " indexed " in output


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--shape", "olmo"], ["'olmo'", "Did you mean 'olmoe'"]),
        (["--shape"], ["--shape", "at least one"]),
        (["--routing", "even"], ["'even'", "balanced"]),
        (["--backends", "fr_loop"], ["'fr_loop'", "for_loop"]),
        (["--backends", "for_loop(recomput=true)"], ["'recomput'", "recompute"]),
        (["--backends", "grouped_mm", "--dtype", "float64"], ["grouped_mm", "float64", "use for"]),
        (["--against", "sonicmoe"], ["sonicmoe", "--device cuda"]),
        (["--against", "stock", "--bias"], ["stock cannot", "SwiGLU without biases alone"]),
        (["--activation"], ["--activation", "at least one"]),
        (["--against", "dens"], ["Did you mean 'dense'"]),
        (["--device", "abacus"], ["--device 'abacus'"]),
        (["--device", "meta"], ["computes nothing"]),
        (["--device", "hpu"], ["no usable hpu"]),
        (["--repeats", "0"], ["--repeats 0"]),
        (["--scale", "3"], ["--scale 3", "D = 2048"]),
        (["--out", "no/such/file.json"], ["--out", "no folder no/such"]),
        (["--out", "."], ["--out .", "is a folder"]),
        (["--plot", "figures.pdf"], [".png"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_mistakes_come_before_anything_is_measured(arguments, parts, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["bench", "--device", "cpu", *arguments])
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("ezpz-moe: error: ")
    assert all(part in captured.err for part in parts)
    assert captured.out == ""


def test_a_layer_that_no_memory_holds(capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["bench", "--device", "cpu", "--shape", "8,4194304,4194304,8", *FEW])
    assert stopped.value.code == 2
    assert "do not fit in the memory of cpu. Choose a smaller shape." in capsys.readouterr().err
