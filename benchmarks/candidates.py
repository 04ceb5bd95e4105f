"""One linear computed in every way there is: dense, the reference formula, and ours by either path, per support."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from measure import Call
from reference import reference_linear
from torch import Tensor, nn

from sltrain_dist.ops import precision
from sltrain_dist.ops.linear import PATHS, sltrain_linear
from sltrain_dist.params.support import Support
from sltrain_dist.utils.errors import UserError

BLOCKS = (64, 32, 16, 8)  # of support "block": the largest that the density allows
SCALE = 0.25


@dataclass(frozen=True)
class Case:
    """One linear and its batch; row_parallel (o, down) decides how a block support is cut."""

    out: int
    in_: int
    rank: int
    density: float
    tokens: int
    dtype: str
    device: str
    row_parallel: bool = False

    @property
    def weight_bytes(self) -> int:
        """Of W as it is computed with: bfloat16 is widened on a CPU."""
        probe = torch.empty(0, dtype=getattr(torch, self.dtype), device=self.device)
        return self.out * self.in_ * precision.compute_dtype(probe).itemsize

    @property
    def text(self) -> str:
        return f"{self.out}x{self.in_} r{self.rank} {self.tokens} tokens {self.dtype}"


def plan(case: Case, kind: str) -> Support:
    """The support of a kind; UserError where the density cannot be reached on this matrix."""
    shape = (case.out, case.in_)
    if kind != "block":
        return Support.plan(kind, shape, case.density)
    for block in BLOCKS:
        try:
            return Support.plan(kind, shape, case.density, block=block, transposed=case.row_parallel)  # fmt: skip
        except UserError as error:
            last = error
    raise last


class Problem:
    """Random inputs of a case, and a call per implementation."""

    def __init__(self, case: Case, supports: dict[str, Support]) -> None:
        self.dtype, self.device = getattr(torch, case.dtype), case.device
        self.x, self.dy = self.random(case.tokens, case.in_), self.random(case.tokens, case.out)
        b, a = self.random(case.out, case.rank), self.random(case.rank, case.in_)
        dense = nn.Linear(case.in_, case.out, bias=False, device=case.device, dtype=self.dtype)
        w = dense.weight
        # name -> (function of x, what it has gradients for)
        self.functions: dict[str, tuple[Callable[[Tensor], Tensor], list[Tensor]]] = {}
        self.functions["dense torch"] = (dense, [w])
        if precision.compute_dtype(self.x) != self.dtype:
            self.functions["dense widened"] = (lambda x: precision.linear(x, w), [w])
        uniform = Support.plan("uniform", (case.out, case.in_), case.density)
        index, v = self.offsets(uniform).long(), self.random(*uniform.values_shape)
        self.functions["reference"] = (lambda x: reference_linear(x, b, a, SCALE, v, index), [b, a, v])  # fmt: skip
        for (kind, support), path in product(supports.items(), PATHS):
            values, offsets = self.random(*support.values_shape), self.offsets(support)

            def ours(x: Tensor, s: Any = support, v: Tensor = values, o: Tensor = offsets, p: Any = path) -> Tensor:  # fmt: skip
                return sltrain_linear(x, (b, a), v, o, None, None, SCALE, s.tiles, p)

            self.functions[f"{kind} {path}"] = (ours, [b, a, values])

    def random(self, *shape: int) -> Tensor:
        """Normal numbers that take gradients."""
        made = torch.randn(*shape, device=self.device, dtype=self.dtype) * 0.1
        return made.requires_grad_()

    def offsets(self, support: Support) -> Tensor:
        """A support's offsets."""
        count = torch.Size(support.offsets_shape).numel()
        return support.offsets(0, "layer", 0, count, self.device).view(support.offsets_shape)

    def calls(self, mode: str, tokens: int | None = None) -> dict[str, Call]:
        """A call per implementation, on the first ``tokens`` of the batch."""
        x = self.x[:tokens].detach().requires_grad_()
        dy = self.dy[:tokens].detach()

        def make(function: Callable[[Tensor], Tensor], leaves: list[Tensor]) -> Call:
            def forward() -> list[Tensor]:
                with torch.no_grad():
                    return [function(x)]

            def both() -> list[Tensor]:
                y = function(x)
                return [y, *torch.autograd.grad(y, [x, *leaves], dy)]

            return forward if mode == "fwd" else both

        return {name: make(*parts) for name, parts in self.functions.items()}
