"""The support is a pure function of (seed, name, global coordinate), of the right size, in each kind."""

import itertools
from dataclasses import astuple

import pytest
import torch

from sltrain_dist.config import ModelConfig
from sltrain_dist.params.support import Support, nearest_density, partial_hash, windows
from sltrain_dist.utils.errors import UserError

KINDS = ["fan_in", "uniform", "block", "block_transposed"]


def plan(kind, shape=(64, 96), density=0.125, **options):
    block = 4 if kind.startswith("block") else 1
    return Support.plan(
        kind.removesuffix("_transposed"),
        shape,
        density,
        block=block,
        transposed="trans" in kind,
        **options,
    )


def all_offsets(support, seed=0, name="layer"):
    count = torch.Size(support.offsets_shape).numel()
    return support.offsets(seed, name, 0, count)


@pytest.mark.parametrize("kind", KINDS)
def test_any_range_equals_the_whole(kind):
    """A rank that holds [start, stop) generates exactly that part of the global pattern."""
    support = plan(kind)
    whole = all_offsets(support)
    count = whole.numel()
    for start, stop in [(0, 1), (3, 17), (count // 3, count), (5, 5), (count - 1, count)]:
        assert torch.equal(support.offsets(0, "layer", start, stop), whole[start:stop])


@pytest.mark.parametrize("kind", KINDS)
def test_depends_on_seed_and_name_alone(kind):
    support = plan(kind)
    torch.manual_seed(1)
    first = all_offsets(support)
    torch.manual_seed(2)
    torch.rand(3)
    assert torch.equal(first, all_offsets(support))
    assert not torch.equal(first, all_offsets(support, seed=1))
    assert not torch.equal(first, all_offsets(support, name="other"))


@pytest.mark.parametrize("kind", KINDS)
def test_offsets_are_distinct_sorted_and_in_range(kind):
    support = plan(kind)
    offsets = all_offsets(support).view(support.offsets_shape).long()
    assert (offsets.diff(dim=-1) > 0).all()
    assert offsets.min() >= 0
    assert offsets.max() < support.positions
    assert support.offset_dtype == (torch.int32 if kind == "uniform" else torch.uint8)


def test_fan_in_is_uniform_within_a_window():
    """Chi-square over the positions of many tiles: 95 degrees of freedom, far tail at 180."""
    support = Support.plan("fan_in", (8192, 96), 0.125)
    counts = all_offsets(support).long().bincount(minlength=support.positions).double()
    expected = counts.mean()
    assert ((counts - expected) ** 2 / expected).sum() < 180


def test_uniform_counts_exactly():
    for shape, density in [((64, 96), 0.03), ((7, 11), 0.05), ((33, 64), 0.5)]:
        support = Support.plan("uniform", shape, density)
        offsets = all_offsets(support)
        assert offsets.numel() == int(density * shape[0] * shape[1]) == offsets.unique().numel()


def test_uniform_ignores_padding():
    """Padding must not change which logical entries are drawn, nor draw padded ones."""
    plain = Support.plan("uniform", (16, 30), 0.2)
    padded = Support.plan("uniform", (20, 32), 0.2, logical=(16, 30))
    flat, padded_flat = all_offsets(plain).long(), all_offsets(padded).long()
    assert torch.equal(flat // 30, padded_flat // 32)
    assert torch.equal(flat % 30, padded_flat % 32)


@pytest.mark.parametrize("transposed", [False, True])
def test_block_columns_are_balanced(transposed):
    """Within a window, the lines of any group of m take every position k times; partial groups at most k."""
    support = Support.plan("block", (192, 256), 0.1, block=4, transposed=transposed)
    offsets = all_offsets(support).view(support.offsets_shape).long()
    m, k = support.positions, support.k
    if transposed:
        offsets = offsets.transpose(0, 1)
    for window in range(offsets.shape[1]):
        for group in range(0, offsets.shape[0], m):
            lines = offsets[group : group + m, window]
            counts = lines.reshape(-1).bincount(minlength=m)
            assert counts.max() <= k
            if len(lines) == m:
                assert (counts == k).all()


@pytest.mark.parametrize("kind", KINDS)
def test_inside_marks_padding(kind):
    shape, logical = (64, 96), (60, 90)
    support = plan(kind, shape, logical=logical)
    dense = torch.zeros(shape)
    offsets = all_offsets(support).view(support.offsets_shape)
    count = torch.Size(support.values_shape).numel()
    inside = support.inside(0, "layer", 0, count)
    from sltrain_dist.ops.support import add_support

    add_support(
        dense, 1.0 + inside.float().view(support.values_shape), offsets, *astuple(support.tiles)
    )
    assert set(dense[:60, :90].unique().tolist()) == {0.0, 2.0}
    outside = torch.cat([dense[60:].flatten(), dense[:60, 90:].flatten()])
    assert set(outside.unique().tolist()) <= {0.0, 1.0}
    assert torch.equal(support.inside(0, "layer", 7, 40), inside[7:40])


@pytest.mark.parametrize("density", [0.03, 0.05])
@pytest.mark.parametrize("name", ModelConfig.presets())
def test_every_preset_is_reached_and_slices_by_eight(name, density):
    config = ModelConfig.load(name)
    for length in {config.hidden_size, config.padded_intermediate_size}:
        w, k = windows(length, density)[0]
        assert abs(k / w - density) <= 0.1 * density
        assert (length // w) % 2 == 0, "no window of this preset can be cut for tensor parallelism"


def test_window_order():
    """Divisibility first, then the error, then the larger window."""
    assert windows(4096, 0.05)[0] == (256, 13)
    assert windows(100, 0.001) == []
    assert nearest_density(100, 0.001) == 0.01


def test_errors_name_the_flag_and_the_mend():
    for density in (0.0, 1.0, -0.1, 1.5):
        with pytest.raises(UserError, match="--sp_ratio"):
            Support.plan("fan_in", (64, 64), density)
    with pytest.raises(UserError, match=r"nearest density that fits is 0\.01562"):
        Support.plan("fan_in", (64, 64), 0.001)
    with pytest.raises(UserError, match="--block_size 48"):
        Support.plan("block", (64, 64), 0.1, block=48)


@pytest.mark.parametrize("kind", KINDS)
def test_hash_is_free_of_layout(kind):
    support = plan(kind)
    offsets = all_offsets(support)
    whole = partial_hash(0, "layer", 0, offsets)
    cuts = [0, 5, 6, 100, offsets.numel()]
    parts = [partial_hash(0, "layer", a, offsets[a:b]) for a, b in itertools.pairwise(cuts)]
    assert sum(parts) % 2**64 == whole
    changed = offsets.clone()
    changed[3] += 1
    assert partial_hash(0, "layer", 0, changed) != whole
    swapped = offsets.clone()
    swapped[[3, 40]] = swapped[[40, 3]]
    if not torch.equal(swapped, offsets):
        assert partial_hash(0, "layer", 0, swapped) != whole
