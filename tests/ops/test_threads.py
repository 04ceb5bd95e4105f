"""The CPU kernels with one to many threads: who sums what changes, the result must not, nor differ from run to run.

Up to eight threads take whole chunks of tokens each; more, or large factors, share the products of one
chunk, in groups that each cover some tokens and in ranges of rows where tokens are few.
"""

import pytest
import torch

from sltrain_dist.ops import kernels
from tests.ops.problem import formula, ours, problem

pytestmark = pytest.mark.skipif("cpu" not in kernels.loaded(), reason="no compiled kernels")
THREADS = [1, 2, 3, 8, 9, 17]


@pytest.fixture(autouse=True)
def restore():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def gradients(inputs, keep_hidden, dy):
    support, offsets, leaves = inputs
    y = ours(support, offsets, leaves, 0.4, "factorized", keep_hidden)
    return [y.detach(), *torch.autograd.grad(y, list(leaves.values()), dy)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("tokens", [5, 130, 700])
@pytest.mark.parametrize("kind", ["fan_in", "block_transposed", "uniform"])
def test_any_number_of_threads(kind, tokens, dtype):
    inputs = problem(kind, tokens=(tokens,), dtype=dtype, scaling=True)
    support, offsets, leaves = inputs
    exact = {name: leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}
    expected = formula(support, offsets, exact, 0.4)
    dy = torch.randn_like(expected).to(dtype)
    wanted = [expected, *torch.autograd.grad(expected, list(exact.values()), dy.double())]
    tolerance = 1e-12 if dtype == torch.float64 else 0.03
    for threads in THREADS:
        torch.set_num_threads(threads)
        for keep_hidden in (False, True):
            found = gradients(inputs, keep_hidden, dy)
            again = gradients(inputs, keep_hidden, dy)
            for name, one, other, right in zip(["y", *leaves], found, again, wanted, strict=True):
                error = (one.double() - right).norm()
                # of the scale: one number, a sum in which most cancels
                limit = tolerance * (10 if name == "scaling" else 1) * right.norm()
                assert error <= limit, (threads, keep_hidden, name, error)
                assert torch.equal(one, other), (threads, name, "differs from run to run")


def test_more_tokens_than_a_shared_chunk():
    """With many threads the chunks are taken one after the other: the last, short one must count."""
    torch.set_num_threads(9)
    support, offsets, leaves = problem("fan_in", out=16, in_=32, tokens=(4096 + 77,))
    expected = formula(support, offsets, leaves, 0.4)
    dy = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, list(leaves.values()), dy)
    found = gradients((support, offsets, leaves), True, dy)
    for one, right in zip(found, [expected, *wanted], strict=True):
        torch.testing.assert_close(one, right)
