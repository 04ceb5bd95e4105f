"""The CUDA kernels without a GPU: the body of a thread is plain C++, run here for every thread of a grid.

What this cannot see is the launch itself (grid, stream, device), which takes a GPU.
"""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from sltrain_dist.ops import support as support_ops
from sltrain_dist.ops.tiles import Tiles
from sltrain_dist.params.support import Support

ROOT = Path(__file__).parents[2]
WORD = {1: torch.uint8, 4: torch.int32, 8: torch.int64}
CASES = {  # kind, shape, density, block
    "fan_in": ("fan_in", (700, 96), 0.06, 1),
    "fan_in_odd": ("fan_in", (37, 45), 0.2, 1),
    "fan_in_wide": ("fan_in", (300, 2048), 0.05, 1),
    "uniform": ("uniform", (530, 77), 0.05, 1),
    "block_16": ("block", (96, 256), 0.2, 16),
    "block_4": ("block", (60, 80), 0.2, 4),
    "block_3": ("block", (33, 42), 0.2, 3),
    "transposed_16": ("transposed", (320, 64), 0.2, 16),
    "transposed_3": ("transposed", (60, 33), 0.2, 3),
    "transposed_1": ("transposed", (60, 13), 0.2, 1),
}


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    target = tmp_path_factory.mktemp("host") / "support_on_host.so"
    flags = ["-std=c++17", "-O1", "-fno-strict-aliasing", "-Wall", "-Werror", "-shared", "-fPIC"]
    sanitize = ["-fsanitize=alignment,shift,signed-integer-overflow", "-fno-sanitize-recover"]
    source = str(ROOT / "tests" / "ops" / "support_on_host.cpp")
    include = f"-I{ROOT / 'csrc' / 'cuda'}"
    subprocess.run([compiler, *flags, *sanitize, include, source, "-o", str(target)], check=True)
    loaded = ctypes.CDLL(str(target))
    loaded.place_on_host.restype = ctypes.c_int64
    loaded.bfloat16_sum.restype = ctypes.c_uint16
    return loaded


def guarded(tensor, shift=0):
    """A copy amid 64 elements of padding at either end, ``shift`` elements off a 16-byte boundary."""
    shift = int(shift)
    count = tensor.numel()
    padded = torch.full((count + 128 + shift,), 77, dtype=tensor.dtype)
    inner = padded[64 + shift : 64 + shift + count]
    assert shift or inner.data_ptr() % 16 == 0
    return padded, inner.copy_(tensor.reshape(-1)).view(tensor.shape)


def assert_guards(padded, inner):
    start = inner.storage_offset()
    assert (padded[:start] == 77).all()
    assert (padded[start + inner.numel() :] == 77).all()


def draw(case):
    kind, shape, density, block = CASES[case]
    if case == "transposed_1":  # no kind draws it, the layout holds it
        offsets = torch.stack([torch.randperm(30)[:6].sort().values for _ in range(26)])
        return Tiles(30, 1, 1), shape, offsets.view(2, 13, 6).to(torch.uint8), (2, 13, 6, 1)
    plan = Support.plan(
        "block" if kind == "transposed" else kind,
        shape,
        density,
        block=block,
        transposed=kind == "transposed",
    )
    count = torch.Size(plan.offsets_shape).numel()
    offsets = plan.offsets(torch.randint(1000, ()).item(), "layer", 0, count)
    return plan.tiles, shape, offsets.view(plan.offsets_shape), plan.values_shape


def sizes_of(tiles, values, in_features, start, rows):
    whole = values.dim() == 1
    grid = (1, values.numel()) if whole else (values.shape[1], values.shape[2])
    numbers = (whole, tiles.tile_out, tiles.tile_in, tiles.block, *grid, in_features, start, rows)
    return (ctypes.c_int64 * 10)(*numbers, values.numel())


def call(library, gather, sizes, matrix, values, offsets):
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (matrix, values, offsets)]
    return library.support_on_host(
        gather, matrix.element_size(), offsets.element_size(), sizes, *pointers
    )


def widest(dtype):
    return 16 // torch.empty(0, dtype=dtype).element_size()


@pytest.mark.parametrize("shifted", ["", "matrix", "values", "offsets"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("case", CASES)
def test_add_support(library, case, dtype, shifted):
    """Parameters are views into flat buffers: any of the three may start off a vector's boundary."""
    tiles, shape, drawn, values_shape = draw(case)
    for wider in (drawn, drawn.int(), drawn.long()):
        w_padded, w = guarded(torch.randn(shape, dtype=dtype), shifted == "matrix")
        v_padded, values = guarded(torch.randn(values_shape, dtype=dtype), shifted == "values")
        _, offsets = guarded(wider, shifted == "offsets")
        expected = w.clone()
        support_ops.add_support(
            expected, values.clone(), drawn, tiles.tile_out, tiles.tile_in, tiles.block
        )
        width = call(library, 0, sizes_of(tiles, values, shape[1], 0, shape[0]), w, values, offsets)
        torch.testing.assert_close(w, expected, rtol=0, atol=0)
        assert_guards(w_padded, w)
        assert_guards(v_padded, values)
        scattered = tiles.block == 1
        if shifted == "values" or shifted == ("offsets" if scattered else "matrix"):
            assert width == 1
        elif scattered or (tiles.block % 16 == 0 and shape[1] % 16 == 0):
            assert width == widest(dtype), "vectors were possible and not taken"


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("case", CASES)
def test_gather_support(library, case, dtype, shift):
    """Panels of random heights fill dvalues piece by piece; a panel touches only what lies in it."""
    tiles, shape, drawn, values_shape = draw(case)
    dw = torch.randn(shape, dtype=dtype)
    expected = torch.zeros(values_shape, dtype=dtype)
    support_ops.gather_support(dw, 0, expected, drawn, tiles.tile_out, tiles.tile_in, tiles.block)
    marked = torch.full(values_shape, 5.0, dtype=dtype)
    padded, dvalues = guarded(marked, shift)
    _, offsets = guarded(drawn, shift)
    # Panels cut where whole tiles end; a panel of a transposed tile or of a flat support anywhere.
    step = tiles.block if len(values_shape) == 4 else 1
    start = 0
    while start < shape[0]:
        rows = min(step * torch.randint(1, shape[0] // step + 1, ()).item(), shape[0] - start)
        _, panel = guarded(dw[start : start + rows], shift)
        before = dvalues.clone()
        call(library, 1, sizes_of(tiles, dvalues, shape[1], start, rows), panel, dvalues, offsets)
        new = dvalues != before
        assert (dvalues[new] == expected[new]).all()
        start += rows
    torch.testing.assert_close(dvalues, expected, rtol=0, atol=0)
    assert_guards(padded, dvalues)


def test_empty_panels_do_nothing(library):
    tiles, shape, offsets, values_shape = draw("fan_in")
    dvalues = torch.full(values_shape, 5.0)
    sizes = sizes_of(tiles, dvalues, shape[1], 4, 0)
    call(library, 1, sizes, torch.empty(0, shape[1]), dvalues, offsets)
    assert (dvalues == 5).all()


@pytest.mark.parametrize("along_in", [True, False])
@pytest.mark.parametrize("block", [1, 16])
def test_places_beyond_32_bits(library, block, along_in):
    """A matrix of 2^18 x 2^18 elements: places need 36 bits, with 1 x 1 blocks their numbers 33."""
    side, window, k = 1 << 18, 32, 6
    tile = (block, window * block) if along_in else (window * block, block)
    grid = (side // tile[0], side // tile[1])
    total = grid[0] * grid[1] * k * block**2
    sizes = (ctypes.c_int64 * 10)(0, *tile, block, grid[1], k, side, 0, side, total)
    for _ in range(50):
        n, c = (torch.randint(g // 2, g, ()).item() for g in grid)
        j, offset = torch.randint(k, ()).item(), torch.randint(window, ()).item()
        inner = torch.randint(block**2, ()).item()
        row = n * tile[0] + inner // block + (0 if along_in else offset * block)
        column = c * tile[1] + inner % block + (offset * block if along_in else 0)
        index = ctypes.c_int64((n * grid[1] + c) * k + j)
        found = library.place_on_host(sizes, index, ctypes.c_int64(inner), ctypes.c_int64(offset))
        assert found == row * side + column


def test_bfloat16_rounds_as_torch(library):
    bits = torch.randint(-(2**15), 2**15, (20000, 2), dtype=torch.int16)
    pairs = bits.view(torch.bfloat16)
    expected = (pairs[:, 0].float() + pairs[:, 1].float()).bfloat16()
    unsigned = bits.int() & 0xFFFF
    sums = [library.bfloat16_sum(*pair) for pair in unsigned.tolist()]
    found = torch.tensor(sums, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
