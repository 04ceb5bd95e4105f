"""The compiled CPU kernels against the plain torch references, operator by operator, and per instruction set."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sltrain_dist.ops import kernels
from sltrain_dist.ops.factorized import factorized_linear, factorized_linear_backward
from sltrain_dist.ops.generate import distinct_offsets, sample_positions
from sltrain_dist.ops.sparse import sparse_backward, sparse_forward
from sltrain_dist.ops.support import add_support, gather_support
from sltrain_dist.params.support import Support
from tests.ops.problem import KINDS, problem, sparse_matrix

ROOT = Path(__file__).parents[2]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}
DTYPES = list(TOLERANCE)


def close(found, expected, dtype):
    scale = expected.double().norm().clamp(min=1e-3)
    assert found.dtype == dtype
    assert (found.double() - expected.double()).norm() <= TOLERANCE[dtype] * scale


def case(kind, dtype, tokens=37, out=96, in_=64):
    support, offsets, leaves = problem(kind, out, in_, tokens=(tokens,), dtype=dtype)
    tiles = (support.tiles.tile_out, support.tiles.tile_in, support.tiles.block)
    plain = {name: leaf.detach() for name, leaf in leaves.items()}
    s = sparse_matrix(support, offsets, plain["values"].double())
    return plain, offsets, tiles, s


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_sparse_products(kind, dtype):
    for tokens in (1, 16, 37, 200):
        leaves, offsets, tiles, s = case(kind, dtype, tokens)
        x, values = leaves["x"], leaves["values"]
        y, dy = torch.randn(2, tokens, 96).to(dtype)
        dx = torch.randn(tokens, 64).to(dtype)
        expected_y, expected_dx = y.double() + x.double() @ s.t(), dx.double() + dy.double() @ s
        sparse_forward(x, y, values, offsets, *tiles)
        close(y, expected_y, dtype)
        dvalues = sparse_backward(dy, x, dx, values, offsets, *tiles, True)
        close(dx, expected_dx, dtype)
        wanted = torch.zeros_like(values)
        gather_support((dy.double().t() @ x.double()).to(dtype), 0, wanted, offsets, *tiles)
        close(dvalues, wanted, dtype)
        assert sparse_backward(dy, x, dx, values, offsets, *tiles, False).numel() == 0
        alone = sparse_backward(dy, x, None, values, offsets, *tiles, True)
        torch.testing.assert_close(alone, dvalues)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_densify_and_gather(kind, dtype):
    leaves, offsets, tiles, s = case(kind, dtype, out=704)
    w = torch.randn(704, 64).to(dtype)
    expected = (w.double() + s).to(dtype)
    add_support(w, leaves["values"], offsets, *tiles)
    assert torch.equal(w, expected), "one rounding of the exact sum"
    found = torch.full_like(leaves["values"], 7.0)
    step = 88 if kind != "block_transposed" else tiles[0]
    for start in range(0, 704, step):
        gather_support(w[start : start + step], start, found, offsets, *tiles)
    right = sparse_matrix(*_positions(kind, offsets, leaves["values"], tiles))
    inside = right != 0
    by_position = torch.empty(int(inside.sum()), dtype=dtype)
    by_position[right[inside].long() - 1] = w[inside]
    assert torch.equal(found.flatten(), by_position)


def _positions(kind, offsets, values, tiles):
    """A matrix that holds, at every entry of S, one plus the entry's place in ``values``."""
    from types import SimpleNamespace

    from sltrain_dist.ops.tiles import Tiles

    places = torch.arange(1, values.numel() + 1, dtype=torch.float64).view(values.shape)
    return SimpleNamespace(tiles=Tiles(*tiles), shape=(704, 64)), offsets, places


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("op", ["forward", "backward"])
def test_opcheck(kind, op):
    leaves, offsets, tiles, _ = case(kind, torch.float32, 5)
    x, values, dy = leaves["x"], leaves["values"], torch.randn(5, 96)
    if op == "forward":
        torch.library.opcheck(sparse_forward, (x, torch.randn(5, 96), values, offsets, *tiles))
        torch.library.opcheck(add_support, (torch.randn(96, 64), values, offsets, *tiles))
    else:
        for dx in (None, torch.randn(5, 64)):
            torch.library.opcheck(sparse_backward, (dy, x, dx, values, offsets, *tiles, True))
        torch.library.opcheck(
            gather_support, (torch.randn(96, 64), 0, values.clone(), offsets, *tiles)
        )


def test_kernels_are_what_runs():
    """Otherwise every comparison in this file would hold the reference against itself."""
    if kernels.reference_only():
        pytest.skip("SLT_KERNELS=reference")
    if shutil.which("g++") is None and shutil.which("c++") is None:
        pytest.skip("no C++ compiler: nothing was built")
    assert "cpu" in kernels.loaded()
    for name in ("add_support", "sparse_backward", "factorized_linear", "sample_positions"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"sltrain_dist::{name}", "CPU")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_equals_the_reference(kind, dtype):
    """The fused operator against its Python body over the same parts, over more tokens than one chunk."""
    leaves, offsets, tiles, _ = case(kind, dtype, tokens=700)
    parts = [leaves[name] for name in ("x", "b", "a", "values")]
    arguments = (*parts, offsets, leaves["bias"], None, 0.3, *tiles, True)
    y, hidden = factorized_linear(*arguments)
    plain_y, plain_hidden = factorized_linear._init_fn(*arguments)
    close(y, plain_y, dtype)
    close(hidden, plain_hidden, dtype)
    dy, needs = torch.randn(700, 96).to(dtype), [True] * 4 + [False]
    for kept in (None, hidden):
        arguments = (dy, *parts, offsets, kept, None, 0.3, *tiles, needs)
        for found, expected in zip(
            factorized_linear_backward(*arguments),
            factorized_linear_backward._init_fn(*arguments),
            strict=True,
        ):
            close(found, expected, dtype)


def test_supports_are_the_same_without_a_compiler():
    """A checkpoint made with the kernels must load on a machine that has none."""
    tiles = torch.randint(0, 2**40, (1000,))
    for bound, count in ((256, 8), (97, 97), (1, 1), (200, 13), (3000, 40)):
        key = int(torch.randint(-(2**63), 2**63 - 1, ()))
        expected = distinct_offsets._init_fn(key, tiles, bound, count)
        assert torch.equal(distinct_offsets(key, tiles, bound, count), expected)
        assert (expected.diff(dim=1) > 0).all()
    for size, count in ((1, 1), (2, 1), (1000, 1000), (100_000, 3000), (2**31 - 1, 50)):
        key = int(torch.randint(-(2**63), 2**63 - 1, ()))
        found, expected = torch.empty(2, count, dtype=torch.int32)
        sample_positions(found, key, size)
        sample_positions._init_fn(expected, key, size)
        assert torch.equal(found, expected)


def test_support_hash_is_pinned():
    """The supports themselves: a change here would orphan every checkpoint."""
    from sltrain_dist.params.support import partial_hash

    hashes = {}
    for kind, block in (("fan_in", 1), ("uniform", 1), ("block", 8)):
        support = Support.plan(kind, (512, 256), 0.0625, block=block)
        count = torch.Size(support.offsets_shape).numel()
        offsets = support.offsets(42, "layer", 0, count)
        hashes[kind] = f"{partial_hash(42, 'layer', 0, offsets):016x}"
    assert hashes == json.loads((Path(__file__).parent / "support_hashes.json").read_text())


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_every_instruction_set(isa):
    """The same operators with the other tables of kernels; an unsupported one is refused by name."""
    environment = os.environ | {"SLT_CPU_ISA": isa, "OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.ops.isa_cases"],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if "cpu" not in kernels.loaded():
        pytest.skip("no compiled kernels")
    if f"SLT_CPU_ISA={isa}: this CPU does not have it" in done.stderr:
        assert isa != "portable"
        return
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split()[0] == isa


@pytest.mark.parametrize("register", [16, 32, 64])
def test_loops_with_any_register(register, tmp_path):
    """The AVX-512 source runs here too: vectors of 64 bytes are lowered to what this CPU has."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    program = tmp_path / "kernels"
    flags = ["-O2", "-std=c++20", f"-DVECTOR_BYTES={register}", "-fsanitize=undefined"]
    flags += ["-fno-sanitize-recover=all", "-w", f"-I{ROOT}/csrc/cpu"]
    source = str(Path(__file__).parent / "kernels_on_host.cpp")
    subprocess.run([compiler, *flags, source, "-o", str(program)], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_bad_arguments_are_named():
    if "cpu" not in kernels.loaded():
        pytest.skip("no compiled kernels")
    leaves, offsets, tiles, _ = case("fan_in", torch.float32, 5)
    x, values = leaves["x"], leaves["values"]
    with pytest.raises(ValueError, match=r"x is \[5, 63\]"):
        sparse_forward(x[:, :63], torch.zeros(5, 96), values, offsets, *tiles)
    with pytest.raises(ValueError, match="contiguous"):
        sparse_forward(x, torch.zeros(96, 5).t(), values, offsets, *tiles)
    with pytest.raises(TypeError, match="must agree"):
        sparse_forward(x, torch.zeros(5, 96).double(), values, offsets, *tiles)
    with pytest.raises(TypeError, match="offsets are Short"):
        sparse_forward(x, torch.zeros(5, 96), values, offsets.short(), *tiles)
    half = torch.zeros(5, 96).half()
    with pytest.raises(TypeError, match="dtype Half"):
        sparse_forward(x.half(), half, values.half(), offsets, *tiles)
    with pytest.raises(ValueError, match="differ in tokens"):
        sparse_backward(torch.zeros(4, 96), x, None, values, offsets, *tiles, True)
    with pytest.raises(ValueError, match="cut between tiles"):
        gather_support(torch.zeros(200, 64), 0, values, offsets, *tiles)
