"""A new generation of the host is a class, and its line in ``HOSTS``: a made-up one, added here."""

from collections.abc import Iterator
from typing import Any

import pytest
from dialect import ON_0_2

from ezpz_moe.config.flavors import load_flavor
from ezpz_moe.config.keys import Keys, Positive, to
from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts import detect
from ezpz_moe.hosts.jobs import find_job
from ezpz_moe.hosts.reliance import Reliance

if ON_0_2:
    pytest.skip("nothing comes after torchtitan 0.2 but 0.3", allow_module_level=True)

JOB = '[model]\nname = "ezpz_moe"\nflavor = "debugmodel_sdpa"\n[training]\ncollect_every = {}\n'


class Titan2027_01(type(detect.host())):  # type: ignore[misc]
    """The installed host with a setting's name changed, and a value that it no longer takes."""

    generation = "2027_01"
    name = "torchtitan of January 2027"
    evidence = Reliance("torchtitan.tools.utils:GarbageCollection", "a test", "it is older")

    def job_keys(self) -> Keys:
        keys = super().job_keys()
        new = {"collect_every": to("training.gc_freq", Positive)}
        return keys | {"training": keys["training"] | new}

    def own_conflicts(self, config: Any) -> Iterator[str]:
        if config.training.gc_freq == 13:
            yield "training.gc_freq = 13 brings bad luck"


@pytest.fixture
def new() -> Iterator[Titan2027_01]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(detect, "HOSTS", (Titan2027_01(), *detect.HOSTS))  # its line
        detect.host.cache_clear(), detect.presumed_host.cache_clear()
        yield detect.HOSTS[0]
    detect.host.cache_clear(), detect.presumed_host.cache_clear()
    detect.host()


def test_a_new_generation_is_told_by_its_evidence_and_asked_for_what_differs(new, job_file):
    assert detect.presumed_host() is detect.host() is new
    detect.check_host()
    assert new.trainer_config(find_job(str(job_file(JOB.format(7))))).training.gc_freq == 7
    with pytest.raises(EzpzError, match="gc_freq = 13 brings bad luck"):
        new.trainer_config(find_job(str(job_file(JOB.format(13)))))
    assert new.summarize(load_flavor("debugmodel_sdpa")).num_experts == 8  # inherited
