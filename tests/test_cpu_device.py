"""The CPU as the host's device: the host sees it, torch stays as it was, the memory is real."""

import mmap
import os
import subprocess
import sys
import tempfile
import textwrap
from types import SimpleNamespace

import fork_server
import psutil
import pytest
import torch
from trainer_runs import TORCHRUN

from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts import cpu

MIB = 2**20


def run(code: str, *launcher: str) -> str:
    """What a Python script prints, run by itself or in forks by a launcher as ``-m module``."""
    python = fork_server.python() if launcher else sys.executable
    with tempfile.NamedTemporaryFile("w", suffix=".py") as script:
        script.write(textwrap.dedent(code))
        script.flush()
        command = [python, *launcher, script.name]
        env = {**os.environ, "PYTHON_EXEC": python}
        result = subprocess.run(
            command, env=env, capture_output=True, text=True, timeout=300, check=False
        )
    assert result.returncode == 0, result.stderr
    return result.stdout


def touched(mebibytes: int) -> mmap.mmap:
    """New resident pages: malloc could hand out ones that an earlier test has left resident."""
    block = mmap.mmap(-1, mebibytes * MIB)
    block[:: mmap.PAGESIZE] = bytes(mebibytes * MIB // mmap.PAGESIZE)
    return block


def test_the_host_gets_the_cpu_and_torch_is_as_before():
    run("""
        import torch
        before = torch._utils._get_available_device_type, torch._utils._get_device_module
        answers = before[0](), before[1]("cpu")

        from ezpz_moe.hosts.cpu import import_host_on_cpu
        import_host_on_cpu()

        from torchtitan.tools import utils
        assert utils.device_type == "cpu", utils.device_type
        assert (torch._utils._get_available_device_type, torch._utils._get_device_module) == before
        assert (before[0](), before[1]("cpu")) == answers
        assert torch.cpu.current_device() == "cpu"  # torch.cpu itself is untouched
        import_host_on_cpu()  # a second call changes nothing
    """)


def test_torch_is_as_before_when_the_host_cannot_be_imported():
    run("""
        import sys, torch
        before = torch._utils._get_available_device_type, torch._utils._get_device_module
        sys.modules["torchtitan.observability"] = None  # importing it raises ImportError
        from ezpz_moe.hosts.cpu import import_host_on_cpu
        try:
            import_host_on_cpu()
        except ImportError:
            pass
        else:
            raise AssertionError("imported")
        assert (torch._utils._get_available_device_type, torch._utils._get_device_module) == before
    """)


def test_the_hosts_memory_monitor_reports_this_process():
    """The host's own reader of the device module, with all that it asks for."""
    out = run("""
        import psutil
        from ezpz_moe.hosts.cpu import import_host_on_cpu
        import_host_on_cpu()
        from torchtitan.components.metrics import build_device_memory_monitor
        stats = build_device_memory_monitor().get_peak_stats()
        rss = psutil.Process().memory_info().rss / 2**30
        print(stats.max_reserved_gib / rss, stats.max_active_gib / rss)
    """)
    assert [float(ratio) for ratio in out.split()] == pytest.approx([1, 1], rel=0.05)


def test_a_host_imported_with_another_device_is_a_clear_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchtitan.tools.utils", SimpleNamespace(device_type="cuda"))
    with pytest.raises(EzpzError, match=r"device type 'cuda'.*ezpz-moe train"):
        cpu.import_host_on_cpu()


def test_no_accelerator_agrees_with_torch():
    assert cpu.no_accelerator() is not torch.accelerator.is_available()


def test_the_device_index_is_a_number():
    """The host hands it to ``barrier(device_ids=...)``, which refuses torch.cpu's "cpu"."""
    assert cpu.CpuDeviceModule().current_device() == 0


def test_the_memory_of_a_device(monkeypatch):
    """Of several the first one's, and of a CPU what a container leaves of the machine's."""
    of_index = SimpleNamespace(
        get_device_properties=lambda device: SimpleNamespace(total_memory=7 + device.index)
    )
    monkeypatch.setattr(torch, "get_device_module", lambda kind: {"cuda": of_index}[kind])
    assert cpu.device_memory("cuda") == 7
    monkeypatch.setattr(cpu, "_total_memory", lambda: 9)
    assert cpu.device_memory("cpu") == 9


def test_what_is_not_replaced_is_torch_cpus_own():
    assert cpu.CpuDeviceModule().synchronize is torch.cpu.synchronize
    with pytest.raises(AttributeError):
        cpu.CpuDeviceModule().no_such_function  # noqa: B018


def test_memory_is_resident_memory_and_its_peak_outlives_the_block():
    device = cpu.CpuDeviceModule()
    device.reset_peak_memory_stats()
    before = device.memory_stats()["reserved_bytes.all.peak"]
    assert before == pytest.approx(psutil.Process().memory_info().rss, abs=20 * MIB)
    block = touched(200)
    with_block = device.memory_stats()
    assert 190 * MIB < with_block["reserved_bytes.all.peak"] - before < 250 * MIB
    assert with_block["active_bytes.all.peak"] == with_block["reserved_bytes.all.peak"]
    assert (with_block["num_alloc_retries"], with_block["num_ooms"]) == (0, 0)
    if sys.platform == "linux":
        block.close()
        assert device.memory_stats()["reserved_bytes.all.peak"] > before + 190 * MIB
        device.reset_peak_memory_stats()
        assert device.memory_stats()["reserved_bytes.all.peak"] < before + 50 * MIB


def test_without_proc_memory_is_what_is_resident_now(monkeypatch, tmp_path):
    for name in ("_PROCESS_STATUS", "_CLEAR_REFS"):
        monkeypatch.setattr(cpu, name, tmp_path / "missing")
    device = cpu.CpuDeviceModule()
    device.reset_peak_memory_stats()
    resident = psutil.Process().memory_info().rss
    assert device.memory_stats()["reserved_bytes.all.peak"] == pytest.approx(resident, abs=MIB)


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ([], None),
        (["max\n"], None),
        (["9223372036854771712\n"], None),  # version 1's way to say "no limit"
        ([f"{64 * MIB}\n"], 64 * MIB),
        (["max\n", f"{32 * MIB}\n"], 32 * MIB),
    ],
)
def test_total_memory_is_the_containers_where_that_is_less(limits, expected, monkeypatch, tmp_path):
    files = [tmp_path / str(n) for n in range(2)]
    for file, limit in zip(files, limits, strict=False):
        file.write_text(limit)
    monkeypatch.setattr(cpu, "_CGROUP_LIMITS", files)
    total = cpu.CpuDeviceModule().get_device_properties().total_memory
    assert total == (expected or psutil.virtual_memory().total)


def test_the_name_is_the_processor_and_the_threads_in_use(monkeypatch, tmp_path):
    monkeypatch.setattr(cpu, "_CPU_INFO", tmp_path / "cpuinfo")
    cpu._CPU_INFO.write_text("processor\t: 0\nmodel name\t: Some CPU: 3 GHz\nmodel name\t: B\n")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 12)
    assert cpu.CpuDeviceModule().get_device_name() == "Some CPU: 3 GHz, 12 threads"
    cpu._CPU_INFO.write_text("Processor\t: 0\n")  # Arm has no model name
    assert cpu.CpuDeviceModule().get_device_name().removesuffix(", 12 threads")


def test_memory_snapshots_are_refused():
    with pytest.raises(EzpzError, match="enable_memory_snapshot = false"):
        cpu.CpuDeviceModule().memory._record_memory_history(max_entries=1)


@pytest.mark.ranks
def test_fsdp_over_gloo_gives_the_gradients_of_the_whole_batch():
    """``shard`` stands for the host's ``parallelize_fn``, which sets the same divide factor."""
    run(
        """
            import os
            import torch
            from torch.distributed.fsdp import fully_shard
            from ezpz_moe.hosts.cpu import import_host_on_cpu, sum_reduction_on_gloo
            import_host_on_cpu()
            torch.distributed.init_process_group("gloo")

            def shard(model, *, divide_by):
                fully_shard(model[0])
                fully_shard(model)
                for module in (model[0], model):
                    module.set_gradient_divide_factor(divide_by)
                return model

            def gradients(rows, wrap):
                torch.manual_seed(0)
                model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 3))
                if wrap:
                    model = sum_reduction_on_gloo(shard)(model, divide_by=1.0)
                model(rows).square().sum().backward()
                full = [p.grad.full_tensor() if wrap else p.grad for p in model.parameters()]
                return torch.cat([gradient.flatten() for gradient in full])

            batch = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
            rank = torch.distributed.get_rank()
            torch.testing.assert_close(
                gradients(batch.chunk(2)[rank], True), gradients(batch, False)
            )
            torch.distributed.destroy_process_group()
            os._exit(0)  # gloo's threads may abort a teardown, see ezpz_moe.train
        """,
        *TORCHRUN,
        "--nproc-per-node=2",
    )
