"""``ezpz-moe verify``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from ezpz_moe.cli import display
from ezpz_moe.cli.arguments import (
    Device,
    DType,
    many_imports,
    print_emulated,
    refuse_unknown_device,
)
from ezpz_moe.cli.command import Reporting
from ezpz_moe.config.flavor_schema import Activation

if TYPE_CHECKING:
    from ezpz_moe.tools.verify import Row


@dataclass(frozen=True)
class Verify(Reporting):
    """Compare the output and all gradients of every usable backend with float64."""

    group = "backends"

    device: Device = None
    """Run on this device, such as cpu, cuda or xpu. Default: torch's accelerator, else the CPU."""
    dtype: tuple[DType, ...] = ("bfloat16", "float32")
    """Compute in these dtypes."""
    activation: tuple[Activation, ...] = ()
    """Check FFNs with these activations on every routing, without biases and with them. Default:
    SwiGLU on every routing, and all others on the one that is hardest."""

    def run(self) -> int:
        refuse_unknown_device(self.device)
        with display.status("Asking torch"), many_imports():
            from ezpz_moe.tools.verify import (
                compare,
                default_device,
                plan,
                reasons_against,
                verdict,
                worst_of_each,
            )

            device = self.device or default_device()
            checks = plan(device, self.dtype, self.activation)
        print_emulated(device, self.dtype)
        rows = [row for each in display.tracked(checks, "Verifying") for row in compare(each)]
        passed = all(row.ok for row in rows)
        reasons = {dtype: reasons_against(device, dtype) for dtype in self.dtype}
        display.print_json(
            {
                "passed": passed,
                "verdict": verdict(rows),
                "not_usable": reasons,
                "rows": list(map(asdict, rows)),
            }
        )
        display.print_table(
            # A table of all tensors would have thousands of rows.
            map(_figures, worst_of_each(rows)),
            title=f"Errors against float64 on {device}: the worst tensor of all FFNs",
            important=["backend", "entry point", "routing", "verdict", "relative", "bound", "ffn"],
        )
        display.print_reasons(_of_all_dtypes(reasons))
        display.print_failures([row for row in rows if not row.ok])
        display.print_line(verdict(rows))
        return 0 if passed else 1


COMMAND = Verify


def _of_all_dtypes(reasons: Mapping[DType, Mapping[str, Sequence[str]]]) -> dict[str, list[str]]:
    """Return each reason against a backend once, with the dtypes that it is about if not all."""
    found: dict[str, dict[str, list[str]]] = {}
    for dtype, against in reasons.items():
        for name, each in against.items():
            for reason in each:
                found.setdefault(name, {}).setdefault(reason, []).append(dtype)
    return {
        name: [
            reason if len(dtypes) == len(reasons) else f"{reason} ({', '.join(dtypes)})"
            for reason, dtypes in each.items()
        ]
        for name, each in found.items()
    }


def _figures(row: Row) -> dict[str, str]:
    """Return one row of the table that ``verify`` prints."""
    figures = {"max abs": row.max_abs_error, "relative": row.relative_error, "bound": row.bound}
    return {
        "dtype": row.dtype,
        "backend": row.backend,
        "entry point": row.entry,
        "routing": row.routing,
        "ffn": row.ffn,
        "tensor": row.tensor,
        **{name: display.number(value, ".3g") for name, value in figures.items()},
        "cosine": display.number(row.cosine, ".6f"),
        "verdict": row.verdict,
    }
