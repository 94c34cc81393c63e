"""Which model a user names, by a checkpoint, a run or a job. Without torch: mistakes are quick."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from ezpz_moe.config.assets import EMBEDDED_TOKENIZER
from ezpz_moe.config.flavors import Flavor, load_flavor
from ezpz_moe.config.job import Job
from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.jobs import find_job, load_job


@dataclass(frozen=True)
class NamedModel:
    """A trained model: the job that describes it, and where its weights are.

    Attributes:
        path: a folder with weights, or one that has checkpoints in it.
    """

    job: Job
    path: Path

    @cached_property
    def flavor(self) -> Flavor:
        """The model's flavor."""
        return load_flavor(self.job.flavor, near=self.job.folder)

    def tokenizer(self, weights: Path) -> str:
        """Return the folder of the job's tokenizer; without a job, of one beside the weights."""
        if assets := self.job.values.get("model.hf_assets_path"):
            return self.job.resolve(assets)
        # A job without the key has trained with the embedded one.
        is_beside = self.job.path is None and (weights / "tokenizer.json").is_file()
        return str(weights if is_beside else EMBEDDED_TOKENIZER)


def named_model(name: str, config: str | None) -> NamedModel:
    """Return the model that the user names.

    Args:
        name: the folder of a checkpoint, of a run (its newest checkpoint) or of safetensors; or the
            job of the run.
        config: a flavor or a job that describes the model. Needed unless ``name`` is a job, whose
            flavor it replaces.

    Raises:
        EzpzError: there is no such folder, job or flavor, or no model was named.
    """
    if name.endswith(".toml"):
        job = load_job(name)
        # The defaults are the host's. As in the host, the folder is relative to the working
        # directory, not to the job.
        path = Path(
            job.values.get("job.dump_folder", "./outputs"),
            job.values.get("checkpoint.folder", "checkpoint"),
        )
        if not path.is_dir():
            raise EzpzError(
                f"{name}: has no checkpoint yet: there is no folder {path}. A run makes it if "
                "[checkpoint] enable = true."
            )
        named = NamedModel(_described(job, config), path)
    elif not Path(name).exists():
        raise EzpzError(f"{name}: there is no such folder.")
    elif config is None:
        raise EzpzError(
            f"{name}: a checkpoint does not say which model it holds. Add --config "
            "FLAVOR|JOB.toml, or pass the job instead of the checkpoint."
        )
    else:
        named = NamedModel(find_job(config), Path(name))
        if not named.path.is_dir():
            raise EzpzError(f"{name}: is not a folder.")
    _ = named.flavor  # a wrong one is reported here, and not once torch has been imported
    return named


def _described(job: Job, config: str | None) -> Job:
    """Return the job, or another one, or the job with another flavor: what ``config`` names."""
    if config is None:
        return job
    # Its own tokenizer stays, and its folder is searched for the flavor too.
    return load_job(config) if config.endswith(".toml") else replace(job, flavor=config)
