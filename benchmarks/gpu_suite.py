#!/usr/bin/env python
"""Everything that only a GPU can show, in one call: python benchmarks/gpu_suite.py --output results/DEVICE.json

    supports   generated on the device, equal to those generated on the CPU
    op         the composed linear on the device against float64 on the CPU, every support, fp32 and bf16
    linear     time and memory of one linear: ours, dense, the reference's formula (benchmarks/linear.py)
    train      llama_60m in bf16 under FSDP2 on one GPU: loss falls, tokens/s, peak memory against the estimate

It needs torch, numpy, tokenizers and safetensors, no network, and runs on a CPU too (--device cpu --small), which is
how it is tested. Each section's failure is recorded and the others still run; the exit code is 1 if any failed.
"""

import argparse
import datetime
import json
import platform
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
import linear  # noqa: E402

from sltrain_dist.ops.composed import sltrain_linear  # noqa: E402
from sltrain_dist.params.support import Support  # noqa: E402

KINDS = (("fan_in", 1, False), ("uniform", 1, False), ("block", 16, False), ("block", 16, True))


def supports(device: str, small: bool) -> dict[str, Any]:
    """Offsets made on the device equal those made on the CPU."""
    size = 512 if small else 4096
    for kind, block, transposed in KINDS:
        support = Support.plan(kind, (size, size), 0.0625, block=block, transposed=transposed)
        count = torch.Size(support.offsets_shape).numel()
        there = support.offsets(7, "layer", 0, count, device)
        assert torch.equal(there.cpu(), support.offsets(7, "layer", 0, count)), kind
    return {"size": size, "equal": True}


def op(device: str, small: bool) -> dict[str, Any]:
    """Largest relative error of outputs and gradients, per support and dtype."""
    out, in_, rank, tokens = (512, 256, 32, 100) if small else (2048, 1024, 128, 1000)
    errors = {}
    for kind, block, transposed in KINDS:
        support = Support.plan(kind, (out, in_), 0.0625, block=block, transposed=transposed)
        count = torch.Size(support.offsets_shape).numel()
        offsets = support.offsets(0, "layer", 0, count).view(support.offsets_shape)
        shapes = [(tokens, in_), (out, rank), (rank, in_), support.values_shape]
        exact = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
        dy = torch.randn(tokens, out, dtype=torch.float64)
        wanted = _gradients(exact, dy, offsets, support)
        for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 3e-2)):
            inputs = [tensor.to(device, dtype) for tensor in exact]
            got = _gradients(inputs, dy.to(device, dtype), offsets.to(device), support)
            worst = max(
                float((g.cpu().double() - w).norm() / w.norm())
                for g, w in zip(got, wanted, strict=True)
            )
            assert worst < tolerance, f"{kind} {dtype}: relative error {worst}"
            errors[f"{kind}{' transposed' if transposed else ''} {dtype}"] = worst
    return errors


def _gradients(
    inputs: list[torch.Tensor], dy: torch.Tensor, offsets: torch.Tensor, support: Support
) -> list[torch.Tensor]:
    x, b, a, values = (tensor.detach().requires_grad_() for tensor in inputs)
    y = sltrain_linear(x, (b, a), values, offsets, None, None, 0.25, support.tiles)
    return [y.detach(), *torch.autograd.grad(y, [x, b, a, values], dy)]


def linears(device: str, small: bool) -> dict[str, Any]:
    """benchmarks/linear.py at the shapes of 60m, 1b and 7b."""
    shapes = (
        [(256, 256, 64, 8)]
        if small
        else [(512, 512, 8192, 128), (5472, 2048, 8192, 512), (11008, 4096, 8192, 1024)]
    )
    dtype = torch.float32 if small else torch.bfloat16
    tables = {}
    for out, in_, tokens, rank in shapes:
        rows = linear.measure(out, in_, tokens, rank, 0.0625, dtype, device, 3 if small else 9)
        linear.show(f"{out} x {in_}, {tokens} tokens, rank {rank}", rows)
        tables[f"{out}x{in_}"] = rows
    return tables


def train(device: str, small: bool) -> dict[str, Any]:
    """A real run through the launcher's main; returns its summary."""
    from launcher.pretrain import main as pretrain

    with tempfile.TemporaryDirectory() as folder:
        line = f"--corpus stdlib --cache_dir {folder}/cache --save_dir {folder}/run --tracker none --eval_tokens 16K "
        if small:
            line += "--model llama_demo --num_training_steps 3 --total_batch_size 2 --max_length 32"
        else:
            line += "--model llama_60m --dtype bfloat16 --num_training_steps 200 --total_batch_size 128 --batch_size 64"
        assert pretrain(line.split()) == 0
        run = Path(folder) / "run"
        losses = [
            json.loads(text).get("loss")
            for text in (run / "metrics.jsonl").read_text().splitlines()
        ]
        losses = [loss for loss in losses if loss is not None]
        assert small or losses[-1] < losses[0] - 3
        result: dict[str, Any] = json.loads((run / "summary.json").read_text())
        return result | {"first_loss": losses[0], "last_loss": losses[-1]}


SECTIONS: dict[str, Callable[[str, bool], dict[str, Any]]] = {
    "supports": supports,
    "op": op,
    "linear": linears,
    "train": train,
}


def about(device: str) -> dict[str, Any]:
    """Date, commit, device and versions, as every result file needs them."""
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit.stdout.strip() or None,
        "device": torch.cuda.get_device_name()
        if device == "cuda"
        else platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
    }


def main() -> int:
    """Run the sections; 0 if all passed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small", action="store_true", help="sizes for a test on the CPU")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--output", help="JSON file for the results")
    arguments = parser.parse_args()
    results: dict[str, Any] = {"about": about(arguments.device)}
    failed = []
    for name in arguments.only:
        print(f"== {name}", flush=True)
        try:
            results[name] = SECTIONS[name](arguments.device, arguments.small)
        except Exception:
            results[name] = {"failed": traceback.format_exc()}
            failed.append(name)
            traceback.print_exc()
        if arguments.output:
            Path(arguments.output).parent.mkdir(parents=True, exist_ok=True)
            Path(arguments.output).write_text(json.dumps(results, indent=1) + "\n")
    print(f"failed: {', '.join(failed)}" if failed else "all sections passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
