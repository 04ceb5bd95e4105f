"""N:M patterns against their definition, group by group."""

import pytest
import torch

from sltrain_dist.ops.pattern import (
    Pattern,
    are_largest,
    pack,
    packed_bytes,
    positions_of_largest,
    prune_rows,
    unpack,
)

PATTERNS = ["2:4", "2:8", "1:2", "1:4", "3:6", "8:256"]


@pytest.mark.parametrize("text", PATTERNS)
def test_parse(text):
    pattern = Pattern.parse(text)
    assert str(pattern) == text
    assert pattern.group <= 1 << pattern.bits
    assert pattern.in_features(pattern.width(7 * pattern.group)) == 7 * pattern.group


@pytest.mark.parametrize(
    "text", ["", "2", "2:", ":4", "a:b", "0:4", "4:4", "5:4", "2:512", "2:4:8"]
)
def test_no_pattern(text):
    with pytest.raises(ValueError):  # noqa: PT011
        Pattern.parse(text)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_packing(bits):
    numbers = torch.randint(1 << bits, (5, 24), dtype=torch.uint8)
    packed = pack(numbers, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (5, 24 * bits // 8)
    assert torch.equal(unpack(packed, bits, 24), numbers)
    odd = pack(numbers[:, :23], bits)
    assert odd.shape == (5, packed_bytes(23, bits))
    assert torch.equal(unpack(odd, bits, 23), numbers[:, :23])
    assert packed[0, 0] == sum(int(numbers[0, i]) << i * bits for i in range(8 // bits))


def largest(group, kept):
    """Places of the ``kept`` largest of a list; of equals the first."""
    return sorted(sorted(range(len(group)), key=lambda i: (-group[i], i))[:kept])


@pytest.mark.parametrize("text", PATTERNS)
def test_largest_with_ties(text):
    pattern = Pattern.parse(text)
    groups = torch.randint(
        4, (6, pattern.group)
    ).float()  # few different numbers, so many equal ones
    expected = [largest(group.tolist(), pattern.kept) for group in groups]
    assert positions_of_largest(groups, pattern).tolist() == expected
    keeps = are_largest(groups.flatten(), pattern).view(6, -1)
    assert [row.nonzero().flatten().tolist() for row in keeps] == expected


@pytest.mark.parametrize("text", ["2:4", "2:8", "1:2", "1:4"])
def test_second_pruning_is_the_rule_written_out(text, monkeypatch):
    """Of each column and M rows at most N of the values that are there; zeros among them before what is not there."""
    monkeypatch.setattr("sltrain_dist.ops.pattern._PANEL", 1)  # a group of rows at a time
    pattern = Pattern.parse(text)
    out, in_ = 3 * pattern.group, 16 * pattern.group
    w = torch.randn(out, in_).round(decimals=1)  # ties
    places = positions_of_largest(w.abs().view(-1, pattern.group), pattern).view(out, -1)
    column = places + torch.arange(places.shape[1]) // pattern.kept * pattern.group
    values = w.gather(1, column)
    values[:, 5] = 0.0
    mask = unpack(prune_rows(values, pack(places, pattern.bits), pattern), 1, values.shape[1])
    for top in range(0, out, pattern.group):
        for c in range(in_):
            there = [
                (-abs(values[row, k].item()), row, k.item())
                for row in range(top, top + pattern.group)
                for k in (column[row] == c).nonzero()
            ]
            kept = {(row, k) for _, row, k in sorted(there)[: pattern.kept]}
            assert {(row, k) for _, row, k in there if mask[row, k]} == kept
    share = mask.double().mean() * pattern.density
    assert share == pytest.approx(pattern.density_twice, rel=0.1)


def test_expected_density_of_the_second_pruning():
    assert Pattern(2, 4).density_twice == pytest.approx(0.40625)  # (1 * 4 + 2 * 11) / 16 of 4
