"""The host's metrics processor without MFU on a CPU.

MFU is a share of the device's peak, and for devices that the host does not know it takes an A100's.
"""

# No `from __future__ import annotations`: the host's command line reads the fields of Config.

from dataclasses import dataclass
from typing import Any

from torchtitan.components.metrics import MetricsProcessor
from torchtitan.tools.utils import device_type


class CpuMetrics(MetricsProcessor):
    """``MetricsProcessor`` that says "N/A" for MFU on a CPU, and gives its loggers none."""

    @dataclass(kw_only=True, slots=True)
    class Config(MetricsProcessor.Config):
        pass

    def __init__(self, config: MetricsProcessor.Config, **more: Any) -> None:
        super().__init__(config, **more)
        if device_type == "cpu":
            # The host leaves MFU out where its peak would mislead, and asks nothing else of this.
            self.has_quantization = True
