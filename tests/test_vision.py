"""Patches are merged into tokens; test_engine compares the rest of the vision tower with the original."""

from __future__ import annotations

import torch

from ovis_model.network.vision import merge_patches


def test_neighbouring_patches_become_channels() -> None:
    """The input is 4 x 4 patches numbered row by row, with one channel."""
    merged = merge_patches(torch.arange(16.0).view(1, 16, 1), stride=2)
    assert merged.tolist() == [[[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]]


def test_an_odd_side_is_padded_with_zeros_at_the_right_and_bottom() -> None:
    merged = merge_patches(torch.arange(1.0, 10.0).view(1, 9, 1), stride=2)
    assert merged.tolist() == [[[1, 2, 4, 5], [3, 0, 6, 0], [7, 8, 0, 0], [9, 0, 0, 0]]]


def test_channels_stay_together() -> None:
    patches = torch.arange(8.0).view(1, 4, 2)
    assert merge_patches(patches, stride=2).tolist() == [[[0, 1, 2, 3, 4, 5, 6, 7]]]
    assert torch.equal(merge_patches(patches, stride=1), patches)
