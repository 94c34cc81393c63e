"""Entries of a checkpoint on the disk: whether all of their bytes are there, and the same."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
import torch

from ezpz_moe.errors import EzpzError
from ezpz_moe.tools.checkpoints import storage
from ezpz_moe.tools.checkpoints.data_files import check_data, data_files
from ezpz_moe.tools.checkpoints.tensors import read_whole, write_checkpoint


def test_a_data_file_that_lacks_its_last_byte_is_cut_off(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(12.0).reshape(3, 4), "b": torch.ones(5)}
    metadata = write_checkpoint(tmp_path, tensors.items())
    check_data(tmp_path, metadata)
    assert all(torch.equal(read_whole(tmp_path, metadata, n), t) for n, t in tensors.items())
    (file,) = data_files(tmp_path, metadata)
    size = file.stat().st_size
    os.truncate(file, size - 1)
    with pytest.raises(EzpzError, match=f"is truncated, at {size - 1} of {size} bytes"):
        check_data(tmp_path, metadata)


def test_the_same_bits_are_the_same_dtype_shape_and_bytes() -> None:
    """NaN is the same as itself, and -0.0 is not 0.0."""
    values = torch.tensor([math.nan, 0.0, 1.0])
    assert storage.same_bits(values, values.clone())
    assert not storage.same_bits(values, torch.tensor([math.nan, -0.0, 1.0]))
    assert not storage.same_bits(values, values.double())
    assert not storage.same_bits(values, values[:, None])
    assert storage.same_bits(values[:2], torch.stack([values, values], 1)[:2, 0])
    assert storage.same_bits(3, 3)
    assert not storage.same_bits(1, True)
