"""Random supports as operators: the reference draws in vectorised torch, the kernels entry by entry.

Both give the same numbers: a support is a pure function of its key (see utils.counter_random), so a
run may change machine, or lose its compiler, and still resume.
"""

import torch
from torch import Tensor

from sltrain_dist.ops import kernels
from sltrain_dist.utils import counter_random

kernels.load()
_CHUNK = 1 << 15  # entries computed at a time: the working set stays in the cache


@torch.library.custom_op("sltrain_dist::distinct_offsets", mutates_args=())
def distinct_offsets(key: int, tiles: Tensor, bound: int, count: int) -> Tensor:
    """``count`` distinct sorted integers of [0, bound) for every tile number (Floyd, CACM 30(9), 1987).

    Args:
        key: of the stream, a signed 64-bit word.
        tiles: [tiles] int64.
        bound: at most 32768.

    Returns:
        [tiles, count], uint8 where bound <= 256, else int16.
    """
    dtype = torch.uint8 if bound <= 256 else torch.int16
    chosen = torch.empty((count, tiles.numel()), dtype=dtype, device=tiles.device)
    counter = tiles * count
    for j in range(count):
        top = bound - count + j
        draw = counter_random.below(counter_random.hash64(key, counter + j), top + 1).to(dtype)
        taken = (chosen[:j] == draw).any(dim=0)
        chosen[j] = draw.masked_fill_(taken, top)
    # Odd-even transposition: rounds of min and max on whole rows beat a sort of many short columns.
    for turn in range(count):
        pairs = (count - turn % 2) // 2
        low = chosen[turn % 2 :: 2][:pairs]
        high = chosen[turn % 2 + 1 :: 2][:pairs]
        smaller = torch.minimum(low, high)
        torch.maximum(low, high, out=high)
        low.copy_(smaller)
    return chosen.t().contiguous()


@distinct_offsets.register_fake
def _(key: int, tiles: Tensor, bound: int, count: int) -> Tensor:
    dtype = torch.uint8 if bound <= 256 else torch.int16
    return tiles.new_empty((tiles.shape[0], count), dtype=dtype)


@torch.library.custom_op("sltrain_dist::sample_positions", mutates_args=("positions",))
def sample_positions(positions: Tensor, key: int, size: int) -> None:
    """Fill ``positions`` with distinct sorted integers of [0, size): the first of a keyed permutation.

    Args:
        positions: [count] int32, count <= size.
        key: of the stream, a signed 64-bit word.
        size: at most 2**31 - 1.
    """
    for start in range(0, positions.numel(), _CHUNK):
        stop = min(start + _CHUNK, positions.numel())
        index = torch.arange(start, stop, device=positions.device)
        positions[start:stop] = counter_random.permute(key, index, size)
    positions.copy_(positions.sort().values)


@sample_positions.register_fake
def _(positions: Tensor, key: int, size: int) -> None:
    return None
