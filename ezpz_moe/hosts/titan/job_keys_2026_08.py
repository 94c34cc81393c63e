"""List the trainer's TOML as torchtitan of August 2026 takes it: 0.3's table and the differences.

0.3's keys for how much is computed at once stay, and mean the same work. The new names are keys
too. Pure data: this file imports neither torch nor torchtitan.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from ezpz_moe.config.keys import (
    Key,
    Keys,
    MinusOneOrPositive,
    NonNegative,
    Positive,
    gone,
    new,
    own,
)
from ezpz_moe.hosts.titan.job_keys import KEYS as KEYS_0_3

REPLACED: Mapping[str, str] = {
    "training.local_batch_size": "training.num_tokens_per_microbatch_per_dp_rank",
    "training.seq_len": "training.max_context_length",
    "training.global_batch_size": "training.num_tokens_per_train_step",
    "parallelism.pipeline_parallel_microbatch_size": "parallelism.num_pp_microbatches",
}
"""0.3's key -> the field since August 2026 that says the same, in tokens."""

_NO_WORKERS = (
    "this torchtitan reads data in threads, not in worker processes. Leave it out; "
    "num_prefetch_batches says how many batches are ready ahead."
)


def _dataloader(path: str) -> dict[str, Key]:
    return {
        "num_workers": gone(_NO_WORKERS, unless=(0,)),
        "persistent_workers": gone(_NO_WORKERS, unless=(False,)),
        "pin_memory": gone(_NO_WORKERS, unless=(False,)),
        "prefetch_factor": gone(_NO_WORKERS),
        "num_prefetch_batches": new(f"{path}.num_prefetch_batches", Positive),
        "seed": new(f"{path}.seed", NonNegative),
    }


# Keys of 0.3 become our own here: no field of this host has their unit, so `Titan2026_08.work`
# converts sequences to tokens.
_OTHERWISE: Keys = {
    "training": {
        "local_batch_size": own(Positive, flag=REPLACED["training.local_batch_size"]),
        "seq_len": own(Positive, flag=REPLACED["training.seq_len"]),
        "global_batch_size": own(MinusOneOrPositive, flag=REPLACED["training.global_batch_size"]),
        "num_tokens_per_microbatch_per_dp_rank": new(
            "training.num_tokens_per_microbatch_per_dp_rank", Positive
        ),
        "max_context_length": new("training.max_context_length", Positive),
        "num_tokens_per_train_step": new("training.num_tokens_per_train_step", MinusOneOrPositive),
    },
    "training.dataloader": _dataloader("dataloader"),
    "parallelism": {
        # 0.3's full_dtensor is gone.
        "spmd_backend": new("parallelism.spmd_backend", Literal["partial_dtensor", "spmd_types"]),
        "pipeline_parallel_microbatch_size": own(
            Positive, flag=REPLACED["parallelism.pipeline_parallel_microbatch_size"]
        ),
        "num_pp_microbatches": new("parallelism.num_pp_microbatches", Positive),
    },
    "validation.dataloader": _dataloader("validator.dataloader"),
}

KEYS: Keys = {
    section: {**keys, **_OTHERWISE.get(section, {})} for section, keys in KEYS_0_3.items()
}
