"""``ezpz-moe backends``."""

from __future__ import annotations

from dataclasses import dataclass

from ezpz_moe.cli import display
from ezpz_moe.cli.arguments import (
    Device,
    DType,
    many_imports,
    print_emulated,
    refuse_unknown_device,
)
from ezpz_moe.cli.command import Reporting


@dataclass(frozen=True)
class Backends(Reporting):
    """List the expert backends: which can run here, and why the others cannot."""

    group = "backends"

    device: Device = None
    """Ask about this device, such as cpu, cuda or xpu. Default: torch's accelerator, else cpu."""
    dtype: DType = "bfloat16"
    """Compute in this dtype."""

    def run(self) -> int:
        refuse_unknown_device(self.device)
        with display.status("Asking torch"), many_imports():
            # Within the status: the import of torch is what takes the time.
            from ezpz_moe.tools.verify import default_device, properties, reasons_against

            device = self.device or default_device()
            reasons = reasons_against(device, self.dtype)
            rows = [
                {"backend": name, "usable": not against, **properties(name)}
                for name, against in reasons.items()
            ]
        found = [
            {"name": name, "usable": not against, "reasons": against, **properties(name)}
            for name, against in reasons.items()
        ]
        display.print_json({"device": device, "dtype": self.dtype, "backends": found})
        title = f"Expert backends on {device} in {self.dtype}"
        display.print_table(rows, title=title, important=["usable", "summary", "drops_tokens"])
        print_emulated(device, [self.dtype])
        display.print_reasons(reasons)
        return 0


COMMAND = Backends
