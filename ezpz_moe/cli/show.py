"""``ezpz-moe show``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ezpz_moe.cli import display
from ezpz_moe.cli.arguments import Config, import_host, many_imports
from ezpz_moe.cli.inspected import Inspected

if TYPE_CHECKING:
    from ezpz_moe.config.flavors import Flavor
    from ezpz_moe.config.job import Job
    from ezpz_moe.hosts.setting import Setting


@dataclass(frozen=True, kw_only=True)
class Show(Inspected):
    """Show the resolved config of a flavor or job: the model, and the trainer's settings.

    The names of the trainer's settings are also its flags: --training.steps 100.
    """

    group = "models"

    config: Config
    """The name of a flavor, or the path to a job's TOML."""
    all: bool = False
    """Ask torchtitan: also show settings that keep its defaults or depend on this machine."""
    world_size: int | None = None
    """Accepted as in `doctor`; changes nothing here."""
    nproc: int | None = None
    """Accepted as in `train`; changes nothing here."""
    nnodes: int = 1
    """Accepted as in `train`; changes nothing here."""

    def run(self) -> int:
        self.ranks()  # refuses what is no number of ranks
        from ezpz_moe.config.job import flavor_of
        from ezpz_moe.hosts.counts import counts_at_hand
        from ezpz_moe.hosts.job_settings import settings_at_hand
        from ezpz_moe.hosts.jobs import find_job
        from ezpz_moe.tools.early_refusals import refuse_sizes

        job = find_job(self.config)
        refuse_sizes(job, self.host_flags)
        flavor = flavor_of(job)
        counted, settings = counts_at_hand(flavor), settings_at_hand(job, flavor)
        if self.all or self.host_flags or counted is None or settings is None:
            return self._ask_host(job, flavor)
        _print(job, flavor, {"counted": asdict(counted)}, settings)
        display.print_line(
            f"As the files say it. `ezpz-moe show {self.config} --all` asks torchtitan, also for "
            f"what depends on this machine; `ezpz-moe doctor {self.config}` checks that it all "
            "fits together."
        )
        return 0

    def _ask_host(self, job: Job, flavor: Flavor) -> int:
        with display.status("Building the config"), many_imports():
            host = import_host()
            counted = asdict(host.summarize(flavor))
            config = host.trainer_config(job, self.host_flags)
            found = {"counted": counted, "precision": host.precision_in_words(config, flavor)}
            # Most settings keep torchtitan's defaults; the others are what the job asks for.
            told = [s for s in host.settings(config) if self.all or s.changed]
        _print(job, flavor, found, told)
        return 0


COMMAND = Show


def _print(job: Job, flavor: Flavor, found: dict[str, Any], settings: Iterable[Setting]) -> None:
    from ezpz_moe.config.dense_flavors import shown
    from ezpz_moe.config.layer_sizes import in_words
    from ezpz_moe.hosts.setting import flat

    # None means that the host decides, which --all shows.
    fields = shown(flavor) | found
    told = [asdict(each) for each in settings]
    display.print_json({"config": job.source, "flavor": fields, "settings": told})
    # A cell has no room for a number of each layer; the JSON has them.
    in_short = fields | {"counted": {key: in_words(each) for key, each in found["counted"].items()}}
    rows = [{"flavor": path, "value": value} for path, value in flat(in_short)]
    display.print_table(rows, title=job.source)
    display.print_table(told, title="torchtitan's config")
