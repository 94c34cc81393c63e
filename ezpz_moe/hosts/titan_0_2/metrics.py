"""Add what a backend drops to the host's metrics: no run loses tokens unreported.

Everything else that routers can report, a flavor's ``[telemetry]``, needs torchtitan 0.3.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torchtitan.components.metrics import MetricsProcessor, build_metrics_processor
from torchtitan.tools.logging import logger
from torchtitan.tools.utils import device_type

from ezpz_moe.compute import get_backend
from ezpz_moe.hosts.titan_0_2.experts import EzpzGroupedExperts
from ezpz_moe.routing.counters import ROWS
from ezpz_moe.telemetry.figures import over_layers, use_of_rows


def build(job_config: Any, parallel_dims: Any, model_args: Any, **more: Any) -> MetricsProcessor:
    """Return the host's own processor, or :class:`DropMetrics` if the backend drops tokens."""
    if get_backend(model_args.compute_backend).drops_tokens:
        made = DropMetrics(job_config, parallel_dims, **more, num_layers=model_args.n_layers)
    else:
        made = build_metrics_processor(job_config, parallel_dims, model_args, **more)
    if device_type == "cpu":
        # MFU is a share of the device's peak, and the host would take an A100's.
        made.gpu_peak_flops = math.nan
    return made


class DropMetrics(MetricsProcessor):
    """``MetricsProcessor`` with ``moe/drop_rate`` and ``moe/padding_waste``, and a line in the log.

    Both are shares over all ranks since the last log: the mean over layers and, as ``..._worst``,
    that of the worst layer. Under tensor parallelism every rank has all tokens, which changes no
    share.
    """

    def __init__(self, *args: Any, num_layers: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Of the whole model: the stages of a pipeline add up one tensor.
        self._num_layers = num_layers

    def log(
        self,
        step: int,
        global_avg_loss: float,
        global_max_loss: float,
        grad_norm: float,
        extra_metrics: dict[str, Any] | None = None,
    ) -> None:
        """Log as the host does. All ranks call it; it adds a sum over them and a device sync."""
        figures = self._figures()
        more = {f"moe/{name}": value for name, value in figures.items()}
        super().log(step, global_avg_loss, global_max_loss, grad_norm, (extra_metrics or {}) | more)
        if figures:
            logger.info(
                f"ezpz_moe: {figures['drop_rate']:.1%} of the experts' tokens dropped since the "
                f"last log, {figures['drop_rate_worst']:.1%} in the worst layer"
            )

    def _figures(self) -> dict[str, float]:
        """Return figures of layers that got tokens since the last log, and reset the counters."""
        rows_L3 = torch.zeros(
            self._num_layers, len(ROWS), dtype=torch.int64, device=torch.device(device_type)
        )
        for part in self.model_parts or ():
            for number, block in part.layers.items():
                for module in block.modules():
                    # Without counts, the layer has not computed yet.
                    if isinstance(module, EzpzGroupedExperts) and module.rows_3 is not None:
                        rows_L3[int(number)] += module.rows_3
                        module.rows_3.zero_()
        torch.distributed.all_reduce(rows_L3)  # a pipeline stage has zeros for the others' layers
        return over_layers(
            [
                use_of_rows(given, computed, dropped, given)
                for given, computed, dropped in rows_L3.tolist()
                if given
            ]
        )
