"""Dense weights as the start of a factored model: W [out, in] ~ s * B A + S by alternating least squares.

S has the fixed random support that training would have, so only its values are free. In turn,

    B, A      the best rank-r approximation of W - S: first the exact one (Eckart, Young 1936), by the
              float64 eigenproblem of the smaller Gram matrix; then B for this A, A for that B
    values    the entries of W - s * B A at the support

Each step is the exact minimum of |W - s * B A - S|_F with the rest fixed, so the error never rises, and
nothing is random. At the end the product is split evenly along its singular vectors: |B_i| = |A_i|.
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
from sltrain_dist.train.parameter_names import blank_specs, generated_hash, whole_offsets

ROUNDS = 8  # alternations; the first takes most of the error
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


def factorize(
    pretrained: Pretrained, method: MethodConfig, device: torch.device | str = "cpu"
) -> tuple[Pretrained, Errors]:
    """The same model with the linears of ``method`` ("low_rank" or "sltrain"), found as they are read.

    Args:
        device: where the factors are computed.

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
            w = dense.read(f"{owner}.weight").to(device, torch.float32)
            offsets = read(f"{owner}.offsets").to(device) if isinstance(linear, SLTrain) else None
            latest.clear()
            latest[owner], missed = decompose(w, linear, offsets)
            errors.add(owner, missed, float(w.double().square().sum()))
        return latest[owner][leaf].cpu()

    return dataclasses.replace(result, read=read), errors


@torch.no_grad()
def decompose(
    w: Tensor, linear: LowRank, offsets: Tensor | None
) -> tuple[dict[str, Tensor], float]:
    """{"b", "a"} or {"b", "a", "values"} of one W, float32 and physical, and the squared error."""
    rank, scale = linear.method.rank, linear.method.scale
    left, right = best_low_rank(w, rank)
    parts = {}
    missed = torch.addmm(w, left, right.T, alpha=-1)
    if isinstance(linear, SLTrain) and offsets is not None:
        tiles = linear.support.tiles
        where = (offsets, tiles.tile_out, tiles.tile_in, tiles.block)
        values = w.new_zeros(linear.support.values_shape)
        for number in range(ROUNDS):
            if number:
                rest = w.clone()
                add_support(rest, -values, *where)
                left, right = nearer_low_rank(rest, right)
            missed = torch.addmm(w, left, right.T, alpha=-1)
            gather_support(missed, 0, values, *where)
            add_support(missed, -values, *where)
        parts["values"] = values
    parts["b"], parts["a"] = split(left, right, scale)
    return parts, float(missed.double().square().sum())


def best_low_rank(m: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """L [out, r] and orthonormal R [in, r], float32, such that L R^T is the rank-r matrix nearest to ``m``."""
    tall = m.shape[0] >= m.shape[1]
    wide = m.double() if tall else m.double().T
    vectors = torch.linalg.eigh(wide.T @ wide).eigenvectors[:, -rank:]  # of the largest values
    right = vectors if tall else torch.linalg.qr(wide @ vectors).Q
    left = m.double() @ right
    return left.float(), right.float()


def nearer_low_rank(m: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Another L, R as `best_low_rank` gives them: no farther from ``m`` than any with the given R."""
    left = torch.linalg.qr(m @ right).Q
    right = torch.linalg.qr(m.T @ left).Q
    return m @ right, right


def split(left: Tensor, right: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """B [out, r] and A [r, in] with scale * B A = L R^T, |B_i| = |A_i|, largest singular value first."""
    squares, turn = torch.linalg.eigh(left.double().T @ left.double())
    sigma, turn = squares.clamp(min=0).sqrt().flip(0), turn.flip(1)
    floor = _FLOOR * float(sigma[0]) or 1.0
    root = (sigma.clamp(min=floor) / scale).sqrt()
    b = left.double() @ turn / (scale * root)
    a = (right.double() @ turn * root).T
    return b.float().contiguous(), a.float().contiguous()
