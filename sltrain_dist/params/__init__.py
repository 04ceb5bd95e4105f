"""What a weight matrix is made of: dense, low rank, or SLTrain's sparse plus low rank."""

from sltrain_dist.params.initial import (
    Cut,
    ParameterSpec,
    collect_specs,
    constant_spec,
    count_parameters,
    matrix_spec,
)
from sltrain_dist.params.linears import PARAMETERIZATIONS, make_linear
from sltrain_dist.params.parameterized import ParameterizedLinear
from sltrain_dist.params.support import Support, partial_hash

__all__ = [
    "PARAMETERIZATIONS",
    "Cut",
    "ParameterSpec",
    "ParameterizedLinear",
    "Support",
    "collect_specs",
    "constant_spec",
    "count_parameters",
    "make_linear",
    "matrix_spec",
    "partial_hash",
]
