"""The kinds of devices that a job can be written for."""

from typing import Literal

Device = Literal["any", "cpu", "cuda", "rocm", "xpu", "npu"]
