"""Run by test_sparse.py in a process of its own: the instruction set is chosen once a process."""

import torch

from sltrain_dist.ops import kernels
from tests.ops import test_sparse
from tests.ops.problem import KINDS

if __name__ == "__main__":
    print(kernels.cpu_capability())
    for kind in KINDS:
        for dtype in test_sparse.DTYPES:
            test_sparse.test_sparse_products(kind, dtype)
        test_sparse.test_equals_the_reference(kind, torch.float64)
