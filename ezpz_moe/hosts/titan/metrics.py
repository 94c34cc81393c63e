"""Extend the host's metrics processor to watch the routers, for a flavor's ``[telemetry]``.

It logs whatever the host logs, as before. At its own cadence it adds up the routers' counters over
ranks, writes a line to ``telemetry.jsonl``, passes scalars and pictures to the host's loggers, and
warns of a router that goes wrong. It also tells the routers the step, for anything scheduled.
"""

# No `from __future__ import annotations`: the host's command line reads the fields of Config.

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torchtitan.components.metrics import (
    LoggerContainer,
    TensorBoardLogger,
    WandBLogger,
    _get_metrics_rank,
)
from torchtitan.tools.logging import logger

from ezpz_moe.compute import get_backend
from ezpz_moe.config.telemetry_schema import Telemetry
from ezpz_moe.hosts.titan.cpu_metrics import CpuMetrics
from ezpz_moe.hosts.titan.layer_records import counted_layer, layer_record, routed
from ezpz_moe.hosts.titan.pairs import taken_pairs
from ezpz_moe.hosts.titan.rank_load import rank_max_over_mean, rows_sent
from ezpz_moe.hosts.titan.router import moe_layers
from ezpz_moe.hosts.titan.routing import counting_meshes
from ezpz_moe.hosts.titan.routing_dump import RoutingDump
from ezpz_moe.hosts.titan.row_figures import experts_of, taken_choices, taken_rows
from ezpz_moe.routing.choices import count_this_step
from ezpz_moe.routing.counters import apart
from ezpz_moe.telemetry import json_lines as telemetry_file
from ezpz_moe.telemetry.alerts import Alerts
from ezpz_moe.telemetry.record import LayerRecord, StepRecord
from ezpz_moe.telemetry.remedies import settings_of
from ezpz_moe.telemetry.scalars import scalars


class RouterMetrics(CpuMetrics):
    """``MetricsProcessor`` with telemetry of the routers."""

    @dataclass(kw_only=True, slots=True)
    class Config(CpuMetrics.Config):
        telemetry: Annotated[Telemetry | None, tyro.conf.Suppress] = None
        # The job's, which sets these when the command line has been read.
        warmup_steps: Annotated[int | None, tyro.conf.Suppress] = None
        model: Annotated[str, tyro.conf.Suppress] = ""
        job: Annotated[str, tyro.conf.Suppress] = ""

    def __init__(
        self,
        config: Config,
        *,
        parallel_dims: Any,
        dump_folder: str = "./outputs",
        pp_schedule: str = "1F1B",
        **more: Any,
    ) -> None:
        super().__init__(
            config,
            parallel_dims=parallel_dims,
            dump_folder=dump_folder,
            pp_schedule=pp_schedule,
            **more,
        )
        self._path = Path(dump_folder) / telemetry_file.FILE_NAME
        # The rank that the host logs on. With a pipeline that is not always rank 0: the loss is on
        # the last stage.
        metrics_rank = _get_metrics_rank(parallel_dims=parallel_dims, pp_schedule=pp_schedule)
        self._writes = torch.distributed.get_rank() == metrics_rank
        self._settings: Telemetry | None = config.telemetry
        self._warmup_steps = config.warmup_steps or 0
        self._model, self._job = config.model, config.job
        self._alerts = Alerts()
        dumped = self._settings and self._settings.dumped
        self._dump = RoutingDump(dumped, Path(dump_folder)) if dumped else None
        self._last_step: int | None = None
        self._counted_N: torch.Tensor | None = None  # of all layers, one after the other

    def should_log(self, step: int) -> bool:
        """Pass the step on to the routers: the host calls this once before each training step."""
        routers = [moe.router for moe in moe_layers(self.model_parts).values()]
        for router in routers:
            router.at_step(step)
        if self._dump:
            self._dump.begin(step, routers, says=self._writes)
        # A resumed run does not start at step 1, and its first record covers only its own steps.
        if self._last_step is None:
            self._last_step = step - 1
        logs: bool = super().should_log(step)
        count_this_step(logs and self._is_recorded(step))
        return logs

    def log(
        self,
        step: int,
        global_avg_loss: float,
        global_max_loss: float,
        grad_norm: float,
        extra_metrics: dict[str, Any] | None = None,
    ) -> None:
        """Log as the host does, and add the routers' scalars to the metrics when they are due.

        Raises:
            RuntimeError: the logits of a layer's router are not finite.
        """
        if self._dump:
            self._dump.end(step)
        record = None
        # Collective, so every rank does it, not only the one that writes.
        if self._settings and self._is_recorded(step):
            record = self._record(step, global_avg_loss, grad_norm)
            extra_metrics = (extra_metrics or {}) | scalars(record, self._settings.detail)
        super().log(step, global_avg_loss, global_max_loss, grad_norm, extra_metrics)
        if record and self._writes:
            telemetry_file.append(self._path, record)
            for alert in self._alerts.check(record):
                logger.warning(f"ezpz_moe: {alert}")
            if self._settings and self._settings.images:
                self._show(record)

    def _is_recorded(self, step: int) -> bool:
        """Return whether a record ends with a step that the host logs, as it does step 1."""
        every = self._settings.every if self._settings else None
        return self._settings is not None and (step == 1 or step % (every or 1) == 0)

    def log_validation(
        self, loss: float, step: int, extra_metrics: dict[str, Any] | None = None
    ) -> None:
        """Log as the host does, with the routers' figures in validation as ``moe_val/...``.

        Raises:
            RuntimeError: the logits of a layer's router are not finite.
        """
        if self._settings:
            record = self._validation_record(step, loss)
            figures = scalars(record, self._settings.detail, prefix="moe_val")
            extra_metrics = (extra_metrics or {}) | figures
        super().log_validation(loss, step, extra_metrics)

    # --- collecting -------------------------------------------------------------------------------

    @torch.no_grad()
    def _record(self, step: int, loss: float, grad_norm: float) -> StepRecord:
        """Return a record of all ranks' steps since the last one, and reset the counters."""
        assert self._settings
        assert self._last_step is not None  # should_log comes first
        steps, self._last_step = step - self._last_step, step
        return StepRecord(
            step=step,
            steps=steps,
            loss=loss,
            grad_norm=grad_norm,
            backend=self._backend(),
            layers=self._finite(self._layers(), f"the {steps} steps up to step {step}"),
            thresholds=self._settings.thresholds,
            settings=self._in_force(),
            warmup_steps=self._warmup_steps,
            computed_by=self._computed_by(),
            time=datetime.now(UTC).replace(microsecond=0),
            model=self._model,
            job=self._job,
        )

    @torch.no_grad()
    def _validation_record(self, step: int, loss: float) -> StepRecord:
        """Return a record of all ranks' validation after ``step``, and reset its counters.

        All of it counts as one step.
        """
        layers = self._finite(self._validated_layers(), f"the validation after step {step}")
        return StepRecord(step, 1, loss, None, backend=self._backend(), layers=layers)

    def _finite(
        self, layers: list[tuple[LayerRecord, float]], where: str
    ) -> tuple[LayerRecord, ...]:
        """Return the records of all stages' layers, unless a router's logits are not finite."""
        if self.parallel_dims.pp_enabled:
            layers = self._of_all_stages(layers)
        # Every rank has the same sums, so all stop here together. A single rank that raised would
        # leave the others waiting in the next collective.
        if bad := [(layer.layer, tokens) for layer, tokens in layers if tokens]:
            raise RuntimeError(
                f"The router's logits in layer {bad[0][0]} are not finite for {bad[0][1]:.0f} "
                f"tokens of {where}. Stopping training. Resume from an earlier checkpoint with "
                f"a lower learning rate, or with a z_loss among its balance losses."
            )
        return tuple(layer for layer, _ in layers)

    def _validated_layers(self) -> list[tuple[LayerRecord, float]]:
        """Return what :meth:`_layers` does, of validation, where nobody counts rows."""
        of_layer = moe_layers(self.model_parts)
        if not of_layer:
            return []
        routers = [moe.router for moe in of_layer.values()]
        of_each = [router.val_counts_E for router in routers]
        sums_of_each = [router.val_sums_S for router in routers]
        counts_N, sums_N = torch.cat(of_each), torch.cat(sums_of_each)
        for each in (*of_each, *sums_of_each):
            each.zero_()
        ranks_L = rank_max_over_mean(routed(apart(counts_N, of_each), routers), self.parallel_dims)
        for mesh in counting_meshes(self.parallel_dims):
            for each in (counts_N, sums_N):
                torch.distributed.all_reduce(each, group=mesh.get_group())
        not_counted = {"padding_waste": None, "drop_rate": None}
        return [
            layer_record(
                number,
                moe,
                counts_E.tolist(),
                sums_S.tolist(),
                not_counted | {"rank_max_over_mean": of_ranks},
            )
            for (number, moe), of_ranks, counts_E, sums_S in zip(
                of_layer.items(),
                ranks_L,
                apart(counts_N.cpu(), of_each),
                apart(sums_N.cpu(), sums_of_each),
                strict=True,
            )
        ]

    def _layers(self) -> list[tuple[LayerRecord, float]]:
        """Return a record per layer of this rank, with its count of tokens that were not finite."""
        # A pipeline stage may have only dense layers.
        of_layer = moe_layers(self.model_parts)
        if not of_layer:
            return []
        moes = list(of_layer.values())
        routers = [moe.router for moe in moes]
        of_each = [router.counts_E for router in routers]
        sums_of_each = [router.sums_S for router in routers]
        now_N, sums_N = torch.cat(of_each), torch.cat(sums_of_each)
        rows_L3 = torch.stack([taken_rows(moe, now_N.device) for moe in moes])
        choices_L2 = torch.stack([taken_choices(moe, now_N.device) for moe in moes])
        # A difference and no reset: the bias update reads the same counter, at another cadence.
        counts_N = now_N if self._counted_N is None else now_N - self._counted_N
        self._counted_N = now_N.clone()
        own_L = routed(apart(counts_N, of_each), routers)
        more_L = self._of_ranks(own_L, routers)
        # Nobody else reads these, so they can start again at zero; float32 sums then stay accurate.
        for each in sums_of_each:
            each.zero_()
        for mesh in counting_meshes(self.parallel_dims):
            for each in (counts_N, sums_N, rows_L3, choices_L2):
                torch.distributed.all_reduce(each, group=mesh.get_group())
        return [
            counted_layer(number, moe, counts_E.tolist(), sums_S.tolist(), rows, more)
            for (number, moe), more, counts_E, sums_S, *rows in zip(
                of_layer.items(),
                more_L,
                apart(counts_N.cpu(), of_each),
                apart(sums_N.cpu(), sums_of_each),
                rows_L3.tolist(),
                choices_L2.tolist(),
                strict=True,
            )
        ]

    def _of_ranks(
        self, counts: Sequence[torch.Tensor], routers: Sequence[Any]
    ) -> list[dict[str, Any]]:
        """Return of each layer the fields about its ranks, and about what is chosen together.

        ``counts``: of routed experts by this rank's tokens.
        """
        assert self._settings
        sent = [router.sent_P.clone() for router in routers]
        for router in routers:
            router.sent_P.zero_()
        return [
            {"rank_max_over_mean": busiest, **rows, **pairs}
            for busiest, rows, pairs in zip(
                rank_max_over_mean(counts, self.parallel_dims),
                rows_sent(counts, sent, self.parallel_dims),
                taken_pairs(routers, counting_meshes(self.parallel_dims), self._settings.pairs),
                strict=True,
            )
        ]

    def _of_all_stages(
        self, layers: list[tuple[LayerRecord, float]]
    ) -> list[tuple[LayerRecord, float]]:
        group = self.parallel_dims.get_mesh("pp").get_group()
        # Layers differ by stage, so their records are gathered as objects. Tensors of unequal sizes
        # would need padding.
        of_stages: list[Any] = [None] * torch.distributed.get_world_size(group)
        torch.distributed.all_gather_object(of_stages, layers, group=group)
        return sorted((each for stage in of_stages for each in stage), key=lambda e: e[0].layer)

    def _backend(self) -> str:
        """Return what computes this rank's experts; empty in a stage of dense layers only."""
        selectors = map(experts_of, moe_layers(self.model_parts or ()).values())
        return next((each.compute_backend for each in selectors if each), "")

    def _computed_by(self) -> tuple[str, ...]:
        """Return the backends that compute now, if the one that was asked for chooses them."""
        asked = self._backend()
        return get_backend(asked).chosen if asked else ()

    def _in_force(self) -> dict[str, Any]:
        """Return what the routers do already, for what an alert advises."""
        for moe in moe_layers(self.model_parts or ()).values():
            router = moe.router
            return settings_of(router.settings, router.balance, moe.load_balance_coeff)
        return {}  # a stage of dense layers only

    # --- pictures ---------------------------------------------------------------------------------

    def _show(self, record: StepRecord) -> None:
        """Pass the load's heat map and each layer's histogram to the host's loggers."""
        if not isinstance(self.logger, LoggerContainer):  # no logger is enabled on this rank
            return
        from ezpz_moe.telemetry import charts  # here, because few runs draw anything

        pixels_HWC = charts.load_pixels(record)
        for each in self.logger._loggers:
            tag = f"{each.tag}/" if each.tag else ""
            if isinstance(each, WandBLogger):
                picture = each.wandb.Image(pixels_HWC, caption=charts.caption(record))
                images = {f"{tag}moe/load": picture}
                histograms = {
                    f"{tag}moe/layer_{layer.layer}/tokens_per_expert": each.wandb.Histogram(
                        layer.counts_E
                    )
                    for layer in record.layers
                }
                each.wandb.log(images | histograms, step=record.step)
            elif isinstance(each, TensorBoardLogger):
                each.writer.add_image(f"{tag}moe/load", pixels_HWC, record.step, dataformats="HWC")
                for layer in record.layers:
                    each.writer.add_histogram(
                        f"{tag}moe/layer_{layer.layer}/tokens_per_expert",
                        torch.tensor(layer.counts_E),
                        record.step,
                    )
