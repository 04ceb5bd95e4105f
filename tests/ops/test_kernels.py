"""Finding and loading compiled kernels: each case in a process of its own, since a library stays once it is loaded."""

import os
import shutil
import subprocess
import sys

import pytest
import torch

from sltrain_dist.ops import kernels

MINOR = ".".join(torch.__version__.split(".")[:2])
PRINT = "from sltrain_dist.ops import kernels\nprint(*kernels.loaded(), kernels.cpu_capability())"
CATCH = """
from sltrain_dist.utils.errors import UserError
from sltrain_dist.ops import kernels
try:
    kernels.load()
except UserError as error:
    print(error)
"""
compiled = pytest.mark.skipif(kernels.library("cpu") is None, reason="no CPU kernels are built")


def run(block, **settings):
    environment = {**os.environ, "SLT_KERNELS": "auto", **settings}
    done = subprocess.run(
        [sys.executable, "-c", block],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_nothing_built_is_the_reference(tmp_path):
    assert run(PRINT, SLT_KERNELS_DIR=str(tmp_path)) == "reference"


def test_reference_loads_nothing_even_a_broken_library(tmp_path):
    (tmp_path / f"_kernels_cpu.torch{MINOR}.so").write_bytes(b"no library")
    assert run(PRINT, SLT_KERNELS="reference", SLT_KERNELS_DIR=str(tmp_path)) == "reference"


@compiled
def test_loads_what_was_built():
    *names, capability = run(PRINT, SLT_KERNELS="auto").split()
    assert "cpu" in names
    assert capability != "reference"


@pytest.mark.parametrize("name", ["_kernels_cpu.torch1.0.so", "_kernels_cuda.torch1.0.so"])
def test_library_for_another_torch(tmp_path, name):
    (tmp_path / name).touch()
    line = run(CATCH, SLT_KERNELS_DIR=str(tmp_path))
    assert "\n" not in line
    assert name in line
    assert f"built for another torch than {torch.__version__}" in line
    assert "pip install -e ." in line


@pytest.mark.parametrize("content", [b"", b"no library", b"\x7fELF" + bytes(50)])
def test_damaged_library(tmp_path, content):
    (tmp_path / f"_kernels_cpu.torch{MINOR}.so").write_bytes(content)
    line = run(CATCH, SLT_KERNELS_DIR=str(tmp_path))
    assert "\n" not in line
    assert "damaged" in line
    assert "SLT_BUILD=cpu pip install -e ." in line


@compiled
def test_truncated_library(tmp_path):
    """A full disk leaves one: mapping it would end the process with SIGBUS and no word."""
    whole = kernels.library("cpu").read_bytes()
    target = tmp_path / f"_kernels_cpu.torch{MINOR}.so"
    for size in (100, len(whole) // 2, len(whole) - 1):
        target.write_bytes(whole[:size])
        assert "damaged" in run(CATCH, SLT_KERNELS_DIR=str(tmp_path))


@pytest.mark.skipif(sys.platform != "linux", reason="takes one of Python's own shared libraries")
def test_foreign_library(tmp_path):
    """It loads, but holds nothing of ours: training on the reference would be a silent fallback."""
    import _json

    if not getattr(_json, "__file__", None):
        pytest.skip("Python was linked statically")
    shutil.copy(_json.__file__, tmp_path / f"_kernels_cpu.torch{MINOR}.so")
    line = run(CATCH, SLT_KERNELS_DIR=str(tmp_path))
    assert "\n" not in line
    assert "other sources" in line or "does not load" in line


@compiled
def test_instruction_set_is_checked_at_once():
    line = run(CATCH, SLT_CPU_ISA="AVX2")
    assert line == "SLT_CPU_ISA=AVX2: must be one of portable, avx2, avx512"
    done = subprocess.run(
        [sys.executable, "-m", "sltrain_dist.ops.kernels"],
        env={**os.environ, "SLT_CPU_ISA": "mmx"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.strip() == "error: SLT_CPU_ISA=mmx: must be one of portable, avx2, avx512"


def test_compiled_was_asked_for_and_is_missing(tmp_path):
    line = run(CATCH, SLT_KERNELS="compiled", SLT_KERNELS_DIR=str(tmp_path))
    assert line == (
        f"SLT_KERNELS=compiled: there are no cpu kernels in {tmp_path}; "
        "build them with SLT_BUILD=cpu pip install -e ."
    )


def test_unknown_mode():
    line = run(CATCH, SLT_KERNELS="fast")
    assert line == "SLT_KERNELS=fast: must be one of auto, reference, compiled"


@compiled
def test_threads_are_those_of_torch():
    """A second OpenMP runtime would start threads of its own and not know of set_num_threads."""
    block = """
import os, torch
from sltrain_dist.ops import kernels
from sltrain_dist.ops.sparse import sparse_forward
out, w, k, tokens = 512, 64, 4, 1024
values = torch.randn(out, 4, k, 1)
offsets = torch.stack([torch.randperm(w)[:k].sort().values for _ in range(out * 4)])
offsets = offsets.view(out, 4, k).to(torch.uint8)
x, y = torch.randn(tokens, 4 * w), torch.zeros(tokens, out)
for threads in (1, 3):
    torch.set_num_threads(threads)
    before = len(os.listdir("/proc/self/task"))
    sparse_forward(x, y, values, offsets, 1, w, 1)
    print(len(os.listdir("/proc/self/task")) - before)
lines = [line.split()[-1] for line in open("/proc/self/maps") if "/" in line]
print(len({name for name in lines if "omp" in name.rsplit("/", 1)[-1] and ".so" in name}))
"""
    assert run(block).split() == ["0", "2", "1"]
