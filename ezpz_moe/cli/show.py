"""``ezpz-moe show``."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from ezpz_moe.cli import display
from ezpz_moe.cli.arguments import Config, import_host
from ezpz_moe.cli.command import Reporting


@dataclass(frozen=True)
class Show(Reporting):
    """Show the resolved config of a flavor or job: the model, and the trainer's settings.

    The names of the trainer's settings are also its flags: --training.steps 100.
    """

    group = "models"

    config: Config
    """The name of a flavor, or the path to a job's TOML."""
    all: bool = False
    """Also show the settings that keep torchtitan's defaults."""

    def run(self) -> int:
        from ezpz_moe.config.flavors import load_flavor
        from ezpz_moe.hosts.jobs import find_job
        from ezpz_moe.hosts.setting import flat

        job = find_job(self.config)
        flavor = load_flavor(job.flavor, near=job.folder)
        with display.status("Building the config"):
            host = import_host()
            # None means that the host decides, which its own config below shows.
            fields = flavor.model_dump(exclude_none=True)
            fields["counted"] = asdict(host.summarize(flavor))
            config = host.trainer_config(job)
            fields["precision"] = host.precision_in_words(config, flavor)
            # Most settings keep torchtitan's defaults; the others are what the job asks for.
            told = [s for s in host.settings(config) if self.all or s.changed]
        settings = [asdict(each) for each in told]
        display.print_json({"config": job.source, "flavor": fields, "settings": settings})
        rows = [{"flavor": path, "value": value} for path, value in flat(fields)]
        display.print_table(rows, title=job.source)
        display.print_table(map(asdict, told), title="torchtitan's config")
        return 0


COMMAND = Show
