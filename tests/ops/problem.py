"""Random problems for the operators, and the definition they are held against: W written out, entry by entry."""

import torch

from sltrain_dist.ops.linear import sltrain_linear
from sltrain_dist.params.support import Support

KINDS = ["fan_in", "uniform", "block", "block_transposed"]


def problem(kind, out=96, in_=64, rank=5, tokens=(3, 7), dtype=torch.float64, scaling=False):
    """Fresh random inputs and the matrix S they stand for."""
    block = (4 if out > 8 else 2) if kind.startswith("block") else 1
    density = 0.125 if out > 8 else 0.25
    support = Support.plan(
        kind.removesuffix("_transposed"),
        (out, in_),
        density,
        block=block,
        transposed="trans" in kind,
    )
    count = torch.Size(support.offsets_shape).numel()
    offsets = support.offsets(torch.randint(1000, ()).item(), "layer", 0, count)
    leaves = {
        "x": torch.randn(*tokens, in_, dtype=dtype),
        "b": torch.randn(out, rank, dtype=dtype),
        "a": torch.randn(rank, in_, dtype=dtype),
        "values": torch.randn(support.values_shape, dtype=dtype),
        "bias": torch.randn(out, dtype=dtype),
    }
    if scaling:
        leaves["scaling"] = torch.randn(1, dtype=dtype)
    for leaf in leaves.values():
        leaf.requires_grad_()
    return support, offsets.view(support.offsets_shape), leaves


def sparse_matrix(support, offsets, values):
    """S by a loop over every block: the definition, independent of the views under test."""
    tiles = support.tiles
    if values.dim() == 1:
        flat = torch.zeros(support.shape, dtype=values.dtype).view(-1)
        return flat.index_put((offsets.long(),), values).view(support.shape)
    rows, columns, positions = [], [], []
    for n in range(offsets.shape[0]):
        for c in range(offsets.shape[1]):
            for k in range(offsets.shape[2]):
                offset = int(offsets[n, c, k])
                along_in = tiles.tile_out == tiles.block
                top = n * tiles.tile_out + (0 if along_in else offset * tiles.block)
                left = c * tiles.tile_in + (offset * tiles.block if along_in else 0)
                for e in range(tiles.block**2):
                    rows.append(top + e // tiles.block)
                    columns.append(left + e % tiles.block)
                    positions.append((n, c, k, e))
    index = (torch.tensor(rows), torch.tensor(columns))
    return torch.zeros(support.shape, dtype=values.dtype).index_put(
        index, torch.stack([values[p] for p in positions])
    )


def formula(support, offsets, leaves, scale):
    s = torch.tanh(leaves["scaling"]) if "scaling" in leaves else scale
    w = sparse_matrix(support, offsets, leaves["values"])
    if "b" in leaves:
        w = w + s * (leaves["b"] @ leaves["a"])
    y = leaves["x"] @ w.t()
    return y + leaves["bias"] if "bias" in leaves else y


def ours(support, offsets, leaves, scale, path="composed", keep_hidden=None):
    return sltrain_linear(
        leaves["x"],
        (leaves["b"], leaves["a"]) if "b" in leaves else None,
        leaves["values"],
        offsets,
        leaves.get("bias"),
        leaves.get("scaling"),
        scale,
        support.tiles,
        path,
        keep_hidden,
    )
