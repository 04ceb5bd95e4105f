"""Dense weights as the start of a factored model: W [out, in] ~ s * B A + S by alternating least squares.

S has the fixed random support that training would have, so only its values are free. In turn,

    B, A      the best rank-r approximation of W - S (Eckart, Young 1936), split evenly: |B_i| = |A_i|
    values    the entries of W - s * B A at the support

Each step is the exact minimum of |W - s * B A - S|_F with the other part fixed, so the error never rises.
The singular vectors come from the float64 Gram matrix of the smaller side: no randomness, and one
eigenproblem of at most 5120 x 5120 a layer and round for a 13B model.
"""

import dataclasses
from collections import defaultdict
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sltrain_dist.config import MethodConfig
from sltrain_dist.ops.support import add_support, gather_support
from sltrain_dist.params.linears import LowRank, SLTrain
from sltrain_dist.tools.weights import Pretrained, merge, parameterized
from sltrain_dist.train.pretrained import blank_specs, generated_hash, whole_offsets

ROUNDS = 4  # alternations; the first takes most of the error
_FLOOR = 1e-4  # of the largest singular value: a pair of zeros would never get a gradient


@dataclass
class Errors:
    """Squared Frobenius norms of W and of what the factors miss, by kind of layer."""

    missed: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    whole: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def add(self, layer: str, missed: float, whole: float) -> None:
        kind = layer.rpartition(".")[2]
        self.missed[kind] += missed
        self.whole[kind] += whole

    def relative(self) -> dict[str, float]:
        """|W - s * B A - S| / |W| over all layers of a kind, and over all ("total")."""
        found = {
            kind: (self.missed[kind] / max(self.whole[kind], 1e-300)) ** 0.5 for kind in self.whole
        }
        total = sum(self.missed.values()) / max(sum(self.whole.values()), 1e-300)
        return {**found, "total": total**0.5}

    def lines(self) -> list[str]:
        """The errors, for people."""
        return [f"error       {value:.4f} {kind}" for kind, value in self.relative().items()]


def factorize(pretrained: Pretrained, method: MethodConfig) -> tuple[Pretrained, Errors]:
    """The same model with the linears of ``method`` ("low_rank" or "sltrain"), found as they are read.

    Returns:
        Weights that hold one layer at a time in memory, and their errors, complete once all are read.

    Raises:
        UserError: rank, density or block size do not fit a layer.
    """
    dense, errors = merge(pretrained), Errors()
    specs = blank_specs(pretrained.model, method)
    result = dataclasses.replace(
        dense,
        method=method,
        shapes={name: spec.shape for name, spec in specs.items()},
        support_hash=generated_hash(specs, method.seed),
    )
    modules = parameterized(result)
    latest: dict[str, dict[str, Tensor]] = {}  # the layer that was read last

    def read(name: str) -> Tensor:
        owner, _, leaf = name.rpartition(".")
        if leaf == "offsets":
            return whole_offsets(specs[name], method.seed, name)
        if owner not in modules or leaf == "bias":
            return dense.read(name)
        if owner not in latest:
            linear = modules[owner]
            assert isinstance(linear, LowRank)
            w = dense.read(f"{owner}.weight").float()
            offsets = read(f"{owner}.offsets") if isinstance(linear, SLTrain) else None
            latest.clear()
            latest[owner], missed = decompose(w, linear, offsets)
            errors.add(owner, missed, float(w.double().square().sum()))
        return latest[owner][leaf]

    return dataclasses.replace(result, read=read), errors


@torch.no_grad()
def decompose(
    w: Tensor, linear: LowRank, offsets: Tensor | None
) -> tuple[dict[str, Tensor], float]:
    """{"b", "a"} or {"b", "a", "values"} of one W, float32 and physical, and the squared error."""
    rank, scale = linear.method.rank, linear.method.scale
    if not isinstance(linear, SLTrain) or offsets is None:
        b, a = best_low_rank(w, rank, scale)
        return {"b": b, "a": a}, float((w - scale * (b @ a)).double().square().sum())
    tiles = linear.support.tiles
    where = (offsets, tiles.tile_out, tiles.tile_in, tiles.block)
    values = torch.zeros(linear.support.values_shape)
    rest = w.clone()
    for _ in range(ROUNDS):
        b, a = best_low_rank(rest, rank, scale)
        rest = torch.addmm(w, b, a, alpha=-scale)
        gather_support(rest, 0, values, *where)
        missed = rest.clone()
        add_support(missed, -values, *where)
        rest = w.clone()
        add_support(rest, -values, *where)
    return {"b": b, "a": a, "values": values}, float(missed.double().square().sum())


def best_low_rank(m: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """B [out, r] and A [r, in], float32, such that scale * B A is the rank-r matrix nearest to ``m``."""
    tall = m.shape[0] >= m.shape[1]
    wide = m.double() if tall else m.double().T
    _, vectors = torch.linalg.eigh(wide.T @ wide)
    right = vectors[:, -rank:].flip(1)  # [smaller side, r], largest singular value first
    left = wide @ right  # columns of length sigma
    sigma = left.norm(dim=0)
    floor = _FLOOR * sigma.max() if sigma.max() > 0 else torch.ones((), dtype=sigma.dtype)
    root = (sigma.clamp(min=float(floor)) / scale).sqrt()
    left, right = left / (scale * root), right * root
    b, a = (left, right.T) if tall else (right, left.T)
    return b.float().contiguous(), a.float().contiguous()
