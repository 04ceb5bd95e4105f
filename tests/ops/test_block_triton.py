"""Block supports on Triton: its kernels' cases under the interpreter, and their registration."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sltrain_dist.ops import block_triton, factorized
from sltrain_dist.params.support import Support

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_cases_under_the_interpreter():
    """Triton decides at its import whether it interprets, so the cases run in their own process."""
    environment = (
        os.environ if torch.cuda.is_available() else os.environ | {"TRITON_INTERPRET": "1"}
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist",
         "-W", "ignore", "tests/ops/block_triton_cases.py"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


STRIDES = ["u_row", "y_row", "hidden_row", "factor_k", "factor_m", "dy_row", "x_row"]
COUNTS = ["n", "rank", "groups", "blocks", "n_rounded", "span"]
LISTS = ["pointer", "partner", "slot", "block_row", "block_column"]


def compiled_bytes(kernel, capability, constants, **options):
    """Size of the machine code of a kernel on bfloat16 for sm_<capability>."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = dict.fromkeys(kernel.arg_names, "*bf16") | {"scaling": "*fp32", "scale": "fp32"}
    signature |= dict.fromkeys(STRIDES + COUNTS, "i32") | dict.fromkeys(LISTS, "*i32")
    signature |= dict.fromkeys(constants, "constexpr")
    signature = {name: signature[name] for name in kernel.arg_names}
    at = {name: (i,) for i, name in enumerate(kernel.arg_names)}
    aligned = [n for n, kind in signature.items() if kind.startswith("*") or n.endswith("_row")]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={at[name]: value for name, value in constants.items()},
        attrs={at[name]: [["tt.divisibility", 16]] for name in aligned},
    )
    target = GPUTarget("cuda", capability, 32)
    return len(triton.compile(source, target=target, options=options).asm["cubin"])


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_without_a_gpu(capability, tmp_path, monkeypatch):
    """The interpreter checks what a kernel computes, not whether its compiler takes it."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from sltrain_dist.ops import block_kernels

    common = {"BLOCK": 32, "PRECISION": "ieee"}
    for fused in (True, False):
        flags = {
            "HAS_RANK": fused,
            "HAS_BASE": not fused,
            "HAS_BIAS": fused,
            "HAS_SCALING": not fused,
        }
        strides = {"VALUE_K": 1 if fused else 32, "VALUE_M": 32 if fused else 1}
        sizes = {"RANK_CHUNK": 32, "ROWS": 128, "factor_k" if fused else "factor_m": 1}
        constants = common | flags | strides | sizes
        assert compiled_bytes(block_kernels.extended_product, capability, constants, num_stages=3)
    constants = common | {"STEP": block_kernels.STEP}
    assert compiled_bytes(block_kernels.sampled_blocks, capability, constants)


class Operator:
    """Stands in for a custom operator: keeps what is registered for a device."""

    def register_kernel(self, device):
        assert device == "cuda"

        def keep(function):
            self.function = function
            return function

        return keep


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("kind", ["fan_in", "uniform", "block"])
def test_other_supports_take_the_reference(kind):
    """Blocks of 4 and single entries: the registered functions give what the reference gives."""
    forward, backward = Operator(), Operator()
    assert block_triton.register(
        forward,
        backward,
        factorized.factorized_reference,
        factorized.factorized_backward_reference,
    )
    plan = Support.plan(kind, (40, 80), 0.2, block=4 if kind == "block" else 1)
    count = torch.Size(plan.offsets_shape).numel()
    offsets = plan.offsets(3, "layer", 0, count).view(plan.offsets_shape)
    x, b, a = torch.randn(5, 80), torch.randn(40, 3), torch.randn(3, 80)
    values, dy = torch.randn(plan.values_shape), torch.randn(5, 40)
    sizes = (0.5, plan.tiles.tile_out, plan.tiles.tile_in, plan.tiles.block)
    arguments = (x, b, a, values, offsets, None, None, *sizes, True)
    torch.testing.assert_close(
        forward.function(*arguments), factorized.factorized_reference(*arguments)
    )
    arguments = (dy, x, b, a, values, offsets, None, None, *sizes, [True] * 4 + [False])
    torch.testing.assert_close(
        backward.function(*arguments), factorized.factorized_backward_reference(*arguments)
    )
