"""Which cuts of a run the host accepts, by the rules that it checks itself.

Legend: E = routed experts, L = tokens in a sequence.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product

from ezpz_moe.compute.names import name_and_options
from ezpz_moe.errors import EzpzError, did_you_mean
from ezpz_moe.hosts.model_sheet import EMBEDDINGS, HEAD, NORM, ModelSheet, Part

CHECKPOINTING = ("none", "selective", "full")
PIPELINED = ("1f1b", "gpipe")
"""Schedules of which it is known how many microbatches a rank holds."""

CHOICES = ("dp_shard", "dp_replicate", "tp", "pp", "ep", "microbatch", "ac", "backend")
"""What a choice may name."""

LARGEST_MICROBATCH = 32
"""Sequences: nothing is gained by more, and a batch that is no power of two has many divisors."""


@dataclass(frozen=True)
class Cut:
    """How the ranks of a run share model and batch.

    Attributes:
        dp_shard, dp_replicate, tp, pp, ep: degrees, as ``parallelism`` has them.
        microbatch: sequences that a rank computes at once.
        microbatches: of those that a rank computes in a step, one after the other.
        checkpointing: "none", "selective" or "full".
        backend: what computes the experts, where it is a choice; empty: what the job says.
    """

    dp_shard: int
    dp_replicate: int
    tp: int
    pp: int
    ep: int
    microbatch: int
    microbatches: int
    checkpointing: str
    backend: str = ""

    @property
    def ranks(self) -> int:
        return self.dp_shard * self.dp_replicate * self.tp * self.pp

    @property
    def data_ranks(self) -> int:
        """Ranks that train on sequences of their own."""
        return self.dp_shard * self.dp_replicate

    @property
    def expert_shards(self) -> int:
        """Ranks that share an expert's weights under expert parallelism."""
        return self.dp_shard * self.tp // self.ep

    @cached_property
    def layout(self) -> Cut:
        """The same degrees alone, on which weights depend, and not on how a batch is cut."""
        return replace(self, microbatch=1, microbatches=1, checkpointing="none", backend="")

    def __str__(self) -> str:
        return (
            f"dp_shard={self.dp_shard} dp_replicate={self.dp_replicate} tp={self.tp} pp={self.pp} "
            f"ep={self.ep} microbatch={self.microbatch} ac={self.checkpointing}"
            + (self.backend and f" backend={self.backend}")
        )


def global_batch(sheet: ModelSheet, world_size: int) -> int:
    """Return the sequences of a step, which all cuts have in common.

    That of the job; if it says none, what its own degrees make of it.
    """
    job = sheet.job
    if job.global_batch > 0:
        return job.global_batch
    return job.local_batch * max(1, world_size // (job.degrees.pp * job.degrees.tp))


def job_cut(sheet: ModelSheet, world_size: int) -> Cut:
    """Return the cut that the job says; it need not be legal."""
    job, degrees = sheet.job, sheet.job.degrees
    outer = degrees.dp_replicate * degrees.tp * degrees.pp
    shard = world_size // outer if degrees.dp_shard == -1 else degrees.dp_shard
    microbatch = job.microbatch if degrees.pp > 1 else job.local_batch
    data_ranks = max(1, shard * degrees.dp_replicate)
    return Cut(
        dp_shard=shard,
        dp_replicate=degrees.dp_replicate,
        tp=degrees.tp,
        pp=degrees.pp,
        ep=degrees.ep,
        microbatch=microbatch,
        microbatches=max(1, global_batch(sheet, world_size) // (microbatch * data_ranks)),
        checkpointing=job.checkpointing,
    )


def legal_cuts(sheet: ModelSheet, world_size: int, ranks_per_node: int) -> Iterator[Cut]:
    """Yield every cut that the host accepts and that makes sense on such nodes.

    Tensor parallelism stays within a node: its collectives stand between any two products.

    Args:
        sheet: the job's.
        world_size: ranks of the run.
        ranks_per_node: how many of them share a node.
    """
    batch = global_batch(sheet, world_size)
    degrees = _divisors(world_size)
    within = [tp for tp in degrees if tp <= ranks_per_node and ranks_per_node % tp == 0]
    for tp, pp in product(within, _pipelines(sheet, degrees)):
        if world_size % (tp * pp):
            continue
        data_ranks = world_size // (tp * pp)
        for dp_replicate in _divisors(data_ranks):
            dp_shard = data_ranks // dp_replicate
            for ep in _divisors(dp_shard * tp):
                cut = Cut(dp_shard, dp_replicate, tp, pp, ep, 1, 1, "none")
                if not any(True for _ in problems(sheet, cut)):
                    cuts = _batched(cut, batch)
                    yield from (each for each in cuts if not any(unfilled(sheet, each)))


def _batched(cut: Cut, batch: int) -> Iterator[Cut]:
    of_rank, left = divmod(batch, cut.data_ranks)
    sizes = [] if left else [size for size in _divisors(of_rank) if size <= LARGEST_MICROBATCH]
    for size, checkpointing in product(sizes, CHECKPOINTING):
        yield replace(
            cut, microbatch=size, microbatches=of_rank // size, checkpointing=checkpointing
        )


def _pipelines(sheet: ModelSheet, degrees: list[int]) -> list[int]:
    """Return the numbers of stages to look at: those whose activations can be counted."""
    known = sheet.job.schedule.lower() in PIPELINED
    return [pp for pp in degrees if pp == 1 or (known and not sheet.is_tied)]


def problems(sheet: ModelSheet, cut: Cut) -> Iterator[str]:
    """Yield why the host does not run a cut, in words; nothing if it does."""
    if split := [heads for heads in sheet.heads if heads % cut.tp]:
        yield f"tp={cut.tp} does not divide the {split[0]} attention heads"
    if sheet.job.sequence_parallel and sheet.job.seq_len % cut.tp:
        yield f"tp={cut.tp} does not divide the sequence of {sheet.job.seq_len} tokens"
    if cut.dp_shard * cut.tp % cut.ep:
        yield f"ep={cut.ep} does not divide the {cut.dp_shard * cut.tp} ranks of dp_shard x tp"
    if cut.ep > 1 and not sheet.routed:
        yield f"ep={cut.ep}, but the model has no routed experts"
    experts = {routed.num_experts for routed in sheet.routed}
    if undivided := [number for number in experts if number % cut.ep]:
        yield f"ep={cut.ep} does not divide the {undivided[0]} experts"
    if cut.pp > 1 and sheet.is_tied:
        yield f"pp={cut.pp}, but embeddings and head share a matrix"
    if cut.pp > 1 and stages(sheet, cut.pp) is None:
        yield f"pp={cut.pp} does not fit {sheet.n_layers} layers"
    yield from _uneven_experts(sheet, cut)


def unfilled(sheet: ModelSheet, cut: Cut) -> Iterator[str]:
    """Yield why the host does not run a cut's microbatches, in words; nothing if it does."""
    # torch's other schedules take fewer.
    if cut.pp > cut.microbatches and sheet.job.schedule.lower() == "1f1b":
        yield f"pp={cut.pp} needs as many microbatches, and there are {cut.microbatches}"


def _uneven_experts(sheet: ModelSheet, cut: Cut) -> Iterator[str]:
    """Yield where FSDP would have to shard experts unevenly along another dimension than E."""
    for part in dict.fromkeys(sheet.parts.values()):
        if part.routed is None or not shards_width(sheet, cut, part):
            continue
        for weight in filter(lambda each: each.is_expert, part.weights):
            width = weight.shape[1]
            if cut.ep == 1 and weight.split == 1:
                width //= cut.tp
            if width % expert_group(cut):
                yield (
                    f"dp_shard={cut.dp_shard} with ep={cut.ep} cuts an expert's {width} rows into "
                    f"{expert_group(cut)}, which FSDP can do only evenly"
                )
                return


def expert_group(cut: Cut) -> int:
    """Return the ranks over which FSDP shards routed experts."""
    return cut.expert_shards if cut.ep > 1 else cut.dp_shard


def shards_width(sheet: ModelSheet, cut: Cut, part: Part) -> bool:
    """Return whether FSDP shards the experts of a layer along their width, and not along E.

    The host does so if there are more ranks than experts. Without expert parallelism it counts all
    ranks of the mesh that it shards on, replicas too.
    """
    if part.routed is None:
        return False
    if cut.ep > 1:
        ranks = cut.expert_shards * cut.ep
    else:
        # A mesh with all axes also has that of tensor parallelism.
        has_tp = sheet.job.spmd in ("spmd_types", "full_dtensor")
        ranks = cut.data_ranks * (cut.tp if has_tp else 1)
    return ranks > part.routed.num_experts


def stages(sheet: ModelSheet, pp: int) -> list[list[str]] | None:
    """Return the parts of every pipeline stage; None if the host refuses so many stages.

    The host gives every stage as many layers as it can, where embeddings, and norm and head, count
    as layers; the first stages get those that are left over.
    """
    layers = [f"layers.{number}" for number in range(sheet.n_layers)]
    if pp == 1:
        return [[EMBEDDINGS, *layers, NORM, HEAD]]
    before, after = sheet.job.less_layers
    each, more = divmod(sheet.n_layers + before + after, pp)
    if each == 0 or before > each or after > each:
        return None
    found = []
    for stage in range(pp):
        size = each + (stage < more) - before * (stage == 0) - after * (stage == pp - 1)
        own, layers = layers[:size], layers[size:]
        found.append([*[EMBEDDINGS] * (stage == 0), *own, *[NORM, HEAD] * (stage == pp - 1)])
    return found


def _divisors(number: int) -> list[int]:
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def matches(cut: Cut, choice: dict[str, str]) -> bool:
    """Return whether a cut is the one, or one of those, that a choice such as tp=2 names."""
    names = {"ac": "checkpointing"}
    return all(str(getattr(cut, names.get(key, key))) == value for key, value in choice.items())


def parsed_choice(choice: str) -> dict[str, str]:
    """Return what ``tp=2 ep=8`` names.

    Raises:
        EzpzError: it is not written so, or names what is no choice, or no value of it.
    """
    found: dict[str, str] = {}
    for word in choice.replace(",", " ").split():
        name, equals, value = word.partition("=")
        if not equals or not value:
            raise EzpzError(f"--why {choice!r}: write a choice as tp=2, several as 'tp=2 ep=8'.")
        if name == "backend":
            name_and_options(value)  # refuses a name that is not known
        elif name in CHOICES and name != "ac" and not (value.isdecimal() and int(value) > 0):
            raise EzpzError(f"--why {choice!r}: {name} is a number of at least 1, not {value!r}.")
        if name == "ac" and value not in CHECKPOINTING:
            raise EzpzError(
                f"--why {choice!r}: there is no ac={value}.{did_you_mean(value, CHECKPOINTING)} "
                f"There are {', '.join(CHECKPOINTING)}."
            )
        if found.get(name, value) != value:
            raise EzpzError(f"--why {choice!r}: names {name} twice.")
        if name not in CHOICES:
            raise EzpzError(
                f"--why {choice!r}: {name!r} is no choice.{did_you_mean(name, CHOICES)} There are "
                f"{', '.join(CHOICES)}."
            )
        found[name] = value
    if not found:
        raise EzpzError("--why: name a choice, such as tp=2.")
    return found
