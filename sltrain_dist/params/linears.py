"""The linears a model is made of, one class per parameterization, and the one table of them.

A row takes a LinearShape and the MethodConfig and gives a module whose forward maps [..., in] to
[..., out]. Every module names its parameters' specs in ``specs`` (params.initial), creates them
uninitialised (also on the meta device), and leaves the filling to the engine.

Shapes: in and out are physical (padded) features; r is the rank.
"""

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from sltrain_dist.config import MethodConfig
from sltrain_dist.ops import products
from sltrain_dist.ops.composed import effective_scale
from sltrain_dist.ops.linear import Path, sltrain_linear
from sltrain_dist.ops.precision import linear
from sltrain_dist.ops.products import Product
from sltrain_dist.params.initial import (
    ParameterSpec,
    SupportOffsets,
    SupportValues,
    constant_spec,
    matrix_spec,
)
from sltrain_dist.params.parameterized import Dense, LinearShape, ParameterizedLinear
from sltrain_dist.params.slope import slope_linear
from sltrain_dist.params.support import Support
from sltrain_dist.utils.errors import UserError


class LowRank(ParameterizedLinear):
    """y = s * (dropout(x) A^T) B^T + bias, computed factorized.

    Without S a zero B would be a dead point of the whole network (every block outputs zero and no
    gradient returns), so B starts uniform with the spread that gives s*BA the dense weight's
    standard deviation; A is kaiming-uniform(a=sqrt 5) as in SLTrain.
    """

    b: nn.Parameter
    a: nn.Parameter
    scaling: nn.Parameter | None

    def __init__(self, shape: LinearShape, method: MethodConfig) -> None:
        super().__init__(shape)
        _check_rank(shape, method)
        self.method = method
        first_scale = math.tanh(1.0) if method.train_scaling else method.scale
        entry = shape.initializer_range / first_scale
        spread = 3 * entry * math.sqrt(shape.logical_in / method.rank)
        _add_factors(self, shape, method, b_spread=spread)

    def low_rank(self, x: Tensor) -> Tensor:
        """s * (dropout(x) A^T) B^T, [..., out]."""
        h = linear(functional.dropout(x, self.method.dropout, self.training), self.a)
        h = h * effective_scale(self.scaling, self.method.scale, h.dtype)
        return linear(h, self.b)

    def multiply(self, x: Tensor) -> Tensor:
        y = self.low_rank(x)
        return y if self.bias is None else y + self.bias

    @property
    def product(self) -> Product:
        return products.LowRank(self.method.scale)

    @property
    def dropout(self) -> float:
        return self.method.dropout if self.training else 0.0


class SLTrain(LowRank):
    """y = x (s * B A + S)^T + bias with S on a fixed random support (arXiv 2406.02214).

    Start: B zero, A kaiming-uniform(a=sqrt 5), values uniform(+-1/sqrt(in)).
    Dropout, where asked, acts on the low-rank input alone; then the two products are apart.

    path: how the operator computes (ops.linear); path_key: what it was chosen for (params.paths),
    "" where nobody chose; keep_hidden: see ops.linear. They are set before the engine exists and stay.
    """

    values: nn.Parameter
    offsets: nn.Parameter
    path: Path = "composed"
    path_key: str = ""
    keep_hidden: bool | None = None

    def __init__(self, shape: LinearShape, method: MethodConfig) -> None:
        ParameterizedLinear.__init__(self, shape)
        _check_rank(shape, method)
        self.method = method
        _add_factors(self, shape, method, b_spread=0.0)
        try:
            self.support = Support.plan(
                method.support,
                (shape.out, shape.in_),
                method.density,
                block=method.block_size,
                transposed=shape.row_parallel,
                logical=(shape.logical_out, shape.logical_in),
            )
        except UserError as error:
            raise UserError(f"{error} (layer {shape.name})") from None
        self.add_support(method.seed)

    def add_support(self, seed: int) -> None:
        """Register values and offsets of the planned support."""
        support, name = self.support, self.shape.name
        bound = 1 / math.sqrt(self.shape.logical_in)
        values = ParameterSpec(
            support.values_shape,
            "sparse",
            logical_values(support, seed, name),
            SupportValues(bound, support, name),
        )
        count = torch.Size(support.offsets_shape).numel()
        offsets = ParameterSpec(
            support.offsets_shape, "indices", count, SupportOffsets(support, name)
        )
        self.add("values", values)
        self.add("offsets", offsets, support.offset_dtype)

    @property
    def held_support(self) -> Support:
        """The support of the part that is here: fewer rows or columns under tensor parallelism."""
        spec, tiles = self.specs["values"], self.support.tiles
        if spec.cut is None:
            return self.support
        shape = (spec.local_shape[0] * tiles.tile_out, spec.local_shape[1] * tiles.tile_in)
        return dataclasses.replace(self.support, shape=shape, logical=shape)

    @property
    def product(self) -> Product:
        return products.SLTrain(self.method.scale, self.support.tiles, self.path, self.keep_hidden)

    def multiply(self, x: Tensor) -> Tensor:
        support = (self.values, self.offsets, self.bias)
        if self.dropout > 0:
            sparse = sltrain_linear(x, None, *support, None, 0.0, self.support.tiles, self.path)
            return sparse + self.low_rank(x)
        scale, tiles, factors = self.method.scale, self.support.tiles, (self.b, self.a)
        path, keep = self.path, self.keep_hidden
        return sltrain_linear(x, factors, *support, self.scaling, scale, tiles, path, keep)


def logical_values(support: Support, seed: int, name: str) -> int:
    """Elements of S that are not padding."""
    count = torch.Size(support.values_shape).numel()
    if not support.is_padded or support.kind == "uniform":
        return count
    return int(support.inside(seed, name, 0, count).sum())


def _add_factors(
    module: LowRank, shape: LinearShape, method: MethodConfig, b_spread: float
) -> None:
    """Register B [out, r], A [r, in] and, where it is trained, the scale [1]."""
    b_shape, b_logical = (shape.out, method.rank), (shape.logical_out, method.rank)
    module.add("b", matrix_spec("uniform", b_spread, b_shape, b_logical, "low_rank"))
    bound = 1 / math.sqrt(shape.logical_in)  # kaiming-uniform with a = sqrt 5
    a_shape, a_logical = (method.rank, shape.in_), (method.rank, shape.logical_in)
    module.add("a", matrix_spec("uniform", bound, a_shape, a_logical, "low_rank"))
    if method.train_scaling:
        module.add("scaling", constant_spec(1.0, (1,), kind="low_rank"))
    else:
        module.register_parameter("scaling", None)


def _check_rank(shape: LinearShape, method: MethodConfig) -> None:
    limit = min(shape.logical_out, shape.logical_in)
    if not 1 <= method.rank <= limit:
        raise UserError(
            f"--rank {method.rank}: layer {shape.name} is {shape.logical_out} x {shape.logical_in}, "
            f"so the rank must lie in 1..{limit}"
        )


PARAMETERIZATIONS: dict[str, Callable[[LinearShape, MethodConfig], ParameterizedLinear]] = {
    "full": Dense,
    "low_rank": LowRank,
    "sltrain": SLTrain,
    "slope": slope_linear,
}


def make_linear(
    name: str,
    out_features: int,
    in_features: int,
    *,
    method: MethodConfig,
    bias: bool = False,
    parallel: str = "column",
    logical_out: int | None = None,
    logical_in: int | None = None,
    initializer_range: float = 0.02,
    device: torch.device | str = "meta",
    dtype: torch.dtype = torch.float32,
) -> ParameterizedLinear:
    """A linear of the asked parameterization.

    Args:
        name: full name in the parameter tree.
        out_features, in_features: physical sizes; ``logical_*`` are the sizes without padding.
        parallel: "column" (q, k, v, gate, up) or "row" (o, down).

    Raises:
        UserError: rank or density does not fit the matrix.
    """
    shape = LinearShape(
        name,
        out_features,
        in_features,
        logical_out or out_features,
        logical_in or in_features,
        bias,
        parallel == "row",
        initializer_range,
        device,
        dtype,
    )
    return PARAMETERIZATIONS[method.method](shape, method)
