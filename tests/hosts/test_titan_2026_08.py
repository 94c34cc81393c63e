"""What only torchtitan of August 2026 has: tokens in place of sequences, folded attention, data.

On another host these do not run, except for those that need no host: what the table of keys and
the list of reliances say.
"""

import dataclasses

import pytest
import torch
from dialect import ON_0_2, SINCE_2026_08, SINCE_2026_09

from ezpz_moe.config.job import Job
from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.detect import check_host, host
from ezpz_moe.hosts.titan.job_keys import KEYS as KEYS_0_3
from ezpz_moe.hosts.titan.job_keys_2026_08 import KEYS, REPLACED
from ezpz_moe.hosts.titan.v0_3 import Titan03
from ezpz_moe.hosts.titan.v2026_08 import Titan2026_08
from ezpz_moe.hosts.titan.v2026_09 import Titan2026_09

check_host()  # before torchtitan is imported: it chooses the device

since_2026_08 = pytest.mark.skipif(
    not SINCE_2026_08,
    reason=f"the installed host is {host().name}; make test-hosts HOST=... runs these",
)
FLAVOR = "debugmodel_sdpa_for_loop"
T, L, N, H, KV_HEADS = 34, 17, 4, 8, 2


def config(flavor: str = FLAVOR, **values):
    """The config of a job; ``training__steps=3`` is ``[training] steps = 3``."""
    from ezpz_moe.hosts.titan.job import trainer_config

    keys = {name.replace("__", "."): value for name, value in values.items()}
    return dataclasses.replace(trainer_config(Job(flavor=flavor, values=keys)))


def sizes(**values) -> tuple[int, int, int, int]:
    job = config(**values)
    training = job.training
    return (
        training.num_tokens_per_microbatch_per_dp_rank,
        training.max_context_length,
        training.num_tokens_per_train_step,
        job.parallelism.num_pp_microbatches,
    )


# Without the host -----------------------------------------------------------------------------


def test_no_key_of_0_3_is_unknown_since_2026_08():
    assert KEYS.keys() == KEYS_0_3.keys()
    for section, keys in KEYS_0_3.items():
        assert keys.keys() <= KEYS[section].keys()


def test_each_replaced_key_and_its_successor_are_keys():
    rows = {f"{section}.{name}" for section, keys in KEYS.items() for name in keys}
    assert REPLACED.keys() | set(REPLACED.values()) <= rows


def test_each_generation_is_told_by_what_the_older_ones_lack():
    assert (Titan2026_09.evidence.why_broken() == "") == SINCE_2026_09
    assert (Titan2026_08.evidence.why_broken() == "") == SINCE_2026_08
    assert (Titan03.evidence.why_broken() == "") == (not ON_0_2)


# Tokens in place of sequences -----------------------------------------------------------------


@since_2026_08
@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, (16384, 2048, -1, 1)),
        ({"training__seq_len": 128}, (8 * 128, 128, -1, 1)),
        ({"training__local_batch_size": 2}, (2 * 2048, 2048, -1, 1)),
        (
            {
                "training__local_batch_size": 2,
                "training__seq_len": 64,
                "training__global_batch_size": 6,
            },
            (128, 64, 384, 1),
        ),
        (
            {
                "training__local_batch_size": 4,
                "training__seq_len": 64,
                "training__global_batch_size": -1,
                "parallelism__pipeline_parallel_degree": 2,
                "parallelism__pipeline_parallel_microbatch_size": 2,
            },
            (128, 64, -1, 2),
        ),
        (
            {
                "training__num_tokens_per_microbatch_per_dp_rank": 256,
                "training__max_context_length": 64,
                "training__num_tokens_per_train_step": 512,
            },
            (256, 64, 512, 1),
        ),
        ({"training__local_batch_size": 2, "training__max_context_length": 64}, (128, 64, -1, 1)),
    ],
)
def test_a_job_means_the_same_work_in_tokens(values, expected):
    assert sizes(**values) == expected


@since_2026_08
@pytest.mark.parametrize(("old", "new"), REPLACED.items())
def test_a_key_beside_the_one_that_replaced_it(old, new):
    values = {old.replace(".", "__"): 2, new.replace(".", "__"): 2}
    with pytest.raises(EzpzError, match=f"{old} and {new} say the same thing"):
        config(**values)


@since_2026_08
def test_a_batch_that_the_pipeline_cannot_cut():
    values = {"parallelism__pipeline_parallel_degree": 2, "training__local_batch_size": 3}
    with pytest.raises(EzpzError, match=r"local_batch_size = 3 is not a multiple of .* = 2"):
        config(parallelism__pipeline_parallel_microbatch_size=2, **values)


@since_2026_08
def test_sdpa_needs_whole_sequences():
    tokens = {
        "training__num_tokens_per_microbatch_per_dp_rank": 96,
        "training__max_context_length": 64,
    }
    with pytest.raises(EzpzError, match=r"= 96 is not a multiple of .*max_context_length = 64"):
        config(**tokens)
    assert config("debugmodel", **tokens)
    assert config(**tokens | {"training__max_context_length": 128})


# Attention ------------------------------------------------------------------------------------


def qkv(kv_heads: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(T, heads, H, generator=generator, requires_grad=True)
        for heads in (N, kv_heads, kv_heads)
    ]


@since_2026_08
@pytest.mark.parametrize("left_window", [-1, 3])
@pytest.mark.parametrize("kv_heads", [N, KV_HEADS])
@pytest.mark.parametrize("with_transform", [False, True])
def test_folded_attention_stays_within_a_sequence(left_window, kv_heads, with_transform):
    """Output and gradients are those of SDPA with a mask over all T tokens, in float64."""
    from ezpz_moe.hosts.titan.attention_2026_08 import CausalAttention

    module = CausalAttention.Config(left_window=left_window, context_length=L).build()

    def twice(out_TNH, lse_TN):
        assert (out_TNH.shape, lse_TN.shape) == ((T, N, H), (T, N))
        return 2 * out_TNH

    ours, truth = qkv(kv_heads), [each.detach().double() for each in qkv(kv_heads)]
    out = module(
        *ours, enable_gqa=kv_heads != N, **({"out_transform": twice} if with_transform else {})
    )
    at, distance = torch.arange(T), torch.arange(T).unsqueeze(1) - torch.arange(T)
    mask = (distance >= 0) & (at.unsqueeze(1) // L == at // L)
    if left_window >= 0:
        mask &= distance <= left_window
    for each in truth:
        each.requires_grad_()
    q, k, v = (each.transpose(0, 1) for each in truth)
    expected = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, enable_gqa=True
    ).transpose(0, 1) * (2 if with_transform else 1)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    out.sum().backward()
    expected.sum().backward()
    for mine, other in zip(ours, truth, strict=True):
        torch.testing.assert_close(mine.grad.double(), other.grad, rtol=1e-5, atol=1e-5)


@since_2026_08
def test_attention_learns_the_length_that_is_trained_with():
    """The flag after the job decides, and what is shorter than a sequence is one."""
    job = config(training__seq_len=64)
    job.training.max_context_length = 32
    job = dataclasses.replace(job)
    layers = job.model_spec.model.layers
    assert {layer.attention.inner_attention.context_length for layer in layers} == {32}
    job.training.num_tokens_per_microbatch_per_dp_rank = 16
    assert layers[0] is dataclasses.replace(job).model_spec.model.layers[0]
    assert {layer.attention.inner_attention.context_length for layer in layers} == {16}


# Data -----------------------------------------------------------------------------------------


@since_2026_08
def test_the_users_text_is_what_is_trained_on(tmp_path):
    from torchtitan.components.tokenizer import HuggingFaceTokenizer

    from ezpz_moe.hosts.titan.data_2026_08 import EMBEDDED_TOKENIZER, dataloader_config

    texts = [f"document number {n} " + "word " * 30 for n in range(8)]
    file = tmp_path / "a.txt"
    file.write_text("\n\n".join(texts))
    tokenizer = HuggingFaceTokenizer(tokenizer_path=str(EMBEDDED_TOKENIZER))
    loader = dataloader_config(None, str(file), job_folder=None)

    def numbers(rank: int, ranks: int) -> set[int]:
        built = loader.build(
            dp_world_size=ranks,
            dp_rank=rank,
            tokenizer=tokenizer,
            max_context_length=16,
            num_tokens_per_batch=64,
        )
        batches = [next(iter(built))[0]["input"].tolist() for _ in range(2)]  # of the first epoch
        text = tokenizer.decode([token for batch in batches for token in batch])
        return {n for n in range(8) if f"number {n} " in text}

    first, second = numbers(0, 2), numbers(1, 2)
    assert first
    assert second
    assert not first & second
    with pytest.raises(EzpzError, match="has 8 documents for 9 data-parallel ranks"):
        numbers(0, 9)


@since_2026_08
def test_a_path_takes_the_place_of_the_hosts_own():
    from ezpz_moe.hosts.titan.data_2026_08 import dataloader_config

    loader = dataloader_config("C4_test", "some/where", job_folder=None, infinite=False)
    source = loader.dataset.dataset.source
    assert (source.path, source.load_dataset_kwargs) == ("some/where", {})
    assert loader.repeat is False
