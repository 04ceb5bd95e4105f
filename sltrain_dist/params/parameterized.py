"""What every linear of a model is apart from what its weight is made of; and the plain dense one.

A linear names its parameters' specs in ``specs`` (params.initial), creates them uninitialised (also on the meta
device), and leaves the filling to the engine.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sltrain_dist.config import MethodConfig
from sltrain_dist.ops import products
from sltrain_dist.ops.precision import linear
from sltrain_dist.ops.products import Product
from sltrain_dist.params.initial import ParameterSpec, constant_spec, matrix_spec


@dataclass(frozen=True)
class LinearShape:
    """What a layer is apart from its parameterization.

    name: full name in the parameter tree; keys support and initial values.
    row_parallel: the layer's input is what tensor parallelism cuts (o, down), else its output.
    """

    name: str
    out: int
    in_: int
    logical_out: int
    logical_in: int
    bias: bool
    row_parallel: bool
    initializer_range: float
    device: torch.device | str
    dtype: torch.dtype


class ParameterizedLinear(nn.Module, ABC):
    """Base: creates parameters from their specs, and the bias that all kinds share."""

    bias: nn.Parameter | None
    parallel: Callable[[Tensor], Tensor] | None = None  # set under tensor parallelism

    def __init__(self, shape: LinearShape) -> None:
        super().__init__()
        self.shape = shape
        self.specs: dict[str, ParameterSpec] = {}
        if shape.bias:
            self.add("bias", constant_spec(0.0, (shape.out,), (shape.logical_out,)))
        else:
            self.register_parameter("bias", None)

    def add(self, name: str, spec: ParameterSpec, dtype: torch.dtype | None = None) -> None:
        """Register a parameter of the spec's shape; integer ones are not trained."""
        dtype = dtype or self.shape.dtype
        empty = torch.empty(spec.shape, dtype=dtype, device=self.shape.device)
        self.register_parameter(name, nn.Parameter(empty, requires_grad=dtype.is_floating_point))
        self.specs[name] = spec

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]; under tensor parallelism a rank's part of either (parallel.linear)."""
        return self.multiply(x) if self.parallel is None else self.parallel(x)

    @abstractmethod
    def multiply(self, x: Tensor) -> Tensor:
        """`forward` where the whole matrix is here."""

    @property
    @abstractmethod
    def product(self) -> Product:
        """The same without bias and dropout, as a pair of functions of the parameters."""

    @property
    def dropout(self) -> float:
        """Probability, on the input of the low-rank product while training."""
        return 0.0

    def part_problem(self, size: int) -> str | None:
        """Why ``size`` tensor-parallel ranks cannot share this linear, though every parameter divides; None: they can."""
        return None

    def extra_repr(self) -> str:
        return f"in={self.shape.in_}, out={self.shape.out}, bias={self.bias is not None}"


class Dense(ParameterizedLinear):
    """y = x W^T + bias, W normal(initializer_range) as HF initialises LLaMA."""

    weight: nn.Parameter

    def __init__(self, shape: LinearShape, method: MethodConfig) -> None:
        super().__init__(shape)
        logical = (shape.logical_out, shape.logical_in)
        self.add(
            "weight",
            matrix_spec("normal", shape.initializer_range, (shape.out, shape.in_), logical),
        )

    def multiply(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)

    @property
    def product(self) -> Product:
        return products.Dense()
