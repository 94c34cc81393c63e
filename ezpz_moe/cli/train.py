"""``ezpz-moe train``."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from tyro.conf import Suppress

from ezpz_moe.cli import display
from ezpz_moe.cli.arguments import OptionalConfig, only, placement
from ezpz_moe.cli.command import Reporting
from ezpz_moe.errors import EzpzError


# Named only, so that a command's own fields may have no default.
@dataclass(frozen=True, kw_only=True)
class Launched(Reporting):
    """A command that starts the trainer with torchrun."""

    group = "runs"

    nproc: int = 1
    """Start this many processes on this machine, one per accelerator."""
    nnodes: int = 1
    """Train on this many machines. Run the same command on each, with its own --node-rank."""
    node_rank: int | None = None
    """Number this machine, from 0."""
    master_addr: str | None = None
    """Name node 0, by host name or address."""
    master_port: int = 29500
    """Use this free port of node 0."""
    host_flags: Suppress[tuple[str, ...]] = ()

    def _launch(self) -> dict[str, Any]:
        """Return what the launcher must know in addition to the job."""
        return {
            "nproc": self.nproc,
            "placement": placement(self),
            "tell": display.print_to_stderr,
        }


@dataclass(frozen=True)
class Train(Launched):
    """Train a flavor or job with torchtitan. All other flags go to the trainer unchanged."""

    config: OptionalConfig = ()
    """The name of a flavor, or the path to a job's TOML. It comes first."""
    resume_from_last_whole: bool = False
    """Resume from the newest step that is whole, if a later one is damaged."""
    dry_run: bool = False
    """Check the run, say what it would be, and start nothing."""
    help_trainer: bool = False
    """List the trainer's flags, and start nothing."""

    def run(self) -> int:
        if self.help_trainer:
            return _list_flags()
        config, flags = only(self.config), list(self.host_flags)
        if config is None and any(each.partition("=")[0] == "--config" for each in flags):
            raise EzpzError(
                "train: a flavor or job is named without --config: ezpz-moe train "
                "FLAVOR|JOB.toml ..."
            )
        if config is None:
            raise EzpzError("train: name a flavor or a job: ezpz-moe train FLAVOR|JOB.toml ...")
        if self.dry_run:
            return self._plan(config, flags)
        if self.json:
            raise EzpzError("--json: goes with --dry-run or --help-trainer; a run prints its log.")
        from ezpz_moe.tools.launch import train

        return train(config, flags, from_last_whole=self.resume_from_last_whole, **self._launch())

    def _plan(self, config: str, flags: list[str]) -> int:
        """Print what would be trained; return 1 if the device is too small for it."""
        with display.status("Looking at the run"):
            from ezpz_moe.tools.launch import prepared

            where, whole = placement(self), self.resume_from_last_whole
            start = prepared(config, flags, self.nproc, where, from_last_whole=whole)
            # Only now: it imports torch, and a mistake in the job is said before.
            from ezpz_moe.tools.planned import planned

            display.set_log_level()  # the host's remarks are about training
            plan = planned(start, flags, nproc=self.nproc, placement=where, from_last_whole=whole)
        display.print_json(asdict(plan))
        display.print_table({"run": name, "": said} for name, said in plan.what.items())
        display.print_line("\nSettings that are not torchtitan's own defaults:")
        # Lines, because values such as paths are long.
        for each in plan.settings:
            instead = "" if each.default is None else f" (default: {display.text(each.default)})"
            display.print_line(f"  {each.path} = {display.text(each.value)}{instead}")
        display.print_line("")
        display.print_whole(plan.command)
        for remark in plan.remarks:
            display.print_line(f"note: {remark}")
        if not plan.fits:
            display.print_line("The model states are larger than the device. Nothing was started.")
            return 1
        display.print_line("Nothing was started. Leave out --dry-run to train.")
        return 0


COMMAND = Train


def _list_flags() -> int:
    """Print a line for each flag of the trainer, and a blank one between its sections."""
    from ezpz_moe.hosts.host_flags import known_flags

    display.print_json({"flags": list(map(asdict, known_flags()))})
    display.print_line("Switches take no value: --checkpoint.enable, --checkpoint.no-enable.")
    section = None
    for flag in known_flags():
        own = (flag.after, flag.name.partition(".")[0])
        if own != section:
            display.print_line("")
        section = own
        default = f"(default: {flag.default})" if flag.default else ""
        words = (flag.after, flag.option, flag.type, flag.help, default)
        display.print_line(" ".join(filter(None, words)))
    return 0
