#!/usr/bin/env python
"""Everything that only a GPU can show, in one call: python benchmarks/gpu_suite.py --out results/DEVICE.json

    build          the kernels, into a temporary folder, with the compilers that are here (SLT_BUILD=cuda)
    correctness    each operator and both paths against float64 (correctness.py)
    per_layer      updates inside backward against after it, and the peaks of 350m, 1b, 7b (per_layer.py)
    activations    what is kept for backward: checkpointing and offloading, gradients compared (activations.py)
    linear         the linears of 60m, 350m, 1b and 7b in bf16, 8k and 32k tokens (linear.py)
    step_60m, _1b  training steps: tokens/s, MFU, peak memory (step.py)

It needs torch, numpy, transformers (or tokenizers and safetensors), for CUDA kernels nvcc and a C++ compiler, and no
network; nothing has to be installed first. At most ten minutes. Every section is a process of its own with its own
time; its failure is recorded and the others still run (without kernels, if these did not build); results are written
after each. The exit code is 1 if any failed. --device cpu --tiny shows on a machine without a GPU, in a minute, that
all of it runs; kernels that are built already are taken as they are.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from measure import ROOT

HERE = Path(__file__).resolve().parent
SECONDS = {
    "build": 150,
    "correctness": 40,
    "activations": 30,
    "per_layer": 120,
    "linear": 130,
    "step_60m": 90,
    "step_1b": 60,
}
TOTAL = 570.0


def commands(arguments: argparse.Namespace) -> dict[str, list[str]]:
    """What each section runs, with the interpreter; `--out` is added where a section takes it."""
    device = ["--device", arguments.device]
    if arguments.tiny:
        built = list((ROOT / "sltrain_dist").glob("_kernels_cpu.*.so"))
        return {
            **({} if built else {"build": ["setup.py", "build_ext"]}),
            "correctness": ["correctness.py", *device, "--quick"],
            "activations": ["activations.py", *device, "--quick"],
            "per_layer": ["per_layer.py", *device, "--quick"],
            "linear": ["linear.py", *device, "--quick", "--shapes", "128x128r16d.0625", "--supports", "fan_in", "block"],
            "step_60m": ["step.py", *device, "--quick", "--dtype", "bfloat16"],
            "step_1b": ["step.py", *device, "--quick", "--dtype", "bfloat16", "--support", "uniform", "--methods", "ours"],
        }  # fmt: skip
    linear = ["--presets", "7b", "1b", "350m", "60m", "--tokens", "8192", "32768", "--dtypes", "bfloat16",
              "--supports", "fan_in", "block", "--modes", "fwd_bwd", "--turns", "7", "--seconds", "1.5"]  # fmt: skip
    step = ["--dtype", "bfloat16", "--turns", "7"]
    small = ["--model", "llama_60m", "--batch_size", "128", "--compile"]
    return {
        "build": ["setup.py", "build_ext"],
        "correctness": ["correctness.py", *device],
        "activations": ["activations.py", *device],
        "per_layer": ["per_layer.py", *device],
        "linear": ["linear.py", *device, *linear],
        "step_60m": ["step.py", *device, *small, *step],
        "step_1b": ["step.py", *device, "--model", "llama_1b", "--batch_size", "32", *step],
    }


def run(
    name: str, command: list[str], device: str, limit: float, folder: str, built: bool
) -> dict[str, Any]:
    """One section: its rows, whether it passed, and, where it did not, the end of what it printed.

    Args:
        built: the section "build" of this run has left kernels in ``folder``.
    """
    out = Path(folder, f"{name}.json")
    script = HERE / command[0] if name != "build" else ROOT / command[0]
    line = [sys.executable, str(script), *command[1:]]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if name == "build":
        environment["SLT_BUILD"] = "cuda" if device == "cuda" else "cpu"
        line += ["--build-lib", folder, "--build-temp", f"{folder}/objects"]
    else:
        line += ["--out", str(out)]
        if built:
            environment["SLT_KERNELS_DIR"] = f"{folder}/sltrain_dist"
            environment["SLT_KERNELS"] = "compiled"  # never the fallback by accident
    began = time.perf_counter()
    log = Path(folder, f"{name}.log")
    with log.open("w") as file:
        try:
            code = subprocess.run(
                line, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT,
                timeout=limit, check=False,
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            code = 124
            file.write(f"\nstopped after {limit:.0f} s\n")
    content = json.loads(out.read_text()) if out.is_file() else {}
    text = log.read_text(errors="replace")
    print(text, flush=True)
    return {
        "passed": code == 0, "code": code, "seconds": time.perf_counter() - began,
        "about": content.get("about"), "rows": content.get("rows", []),
        **({} if code == 0 else {"log": text[-6000:]}),
    }  # fmt: skip


def summary(results: dict[str, Any]) -> str:
    """The short table."""
    lines = []
    for name, section in results["sections"].items():
        verdict = "passed" if section["passed"] else f"FAILED ({section['code']})"
        lines.append(
            f"{name:11} {verdict:13} {section['seconds']:5.0f} s  {len(section['rows'])} rows"
        )
    for row in results["sections"].get("linear", {}).get("rows", []):
        if row["mode"] == "fwd_bwd" and row["path"] == "auto":
            lines.append(
                f"linear {row['out']:>5} x {row['in']:<5} n {row['tokens']:<6} {row['support']:7} "
                f"{row['choice']:10} {row['ours_ms'] / row['dense_ms']:.2f} x the time of dense, reference "
                f"{row['reference_ms'] / row['dense_ms']:.2f} x; transient {row['transient_bytes'] / 2**20:.0f} MiB"
            )
    for row in results["sections"].get("per_layer", {}).get("rows", []):
        if "peak_bytes" in row:
            lines.append(
                f"{row['what']}, 8-bit per layer: peak {row['peak_bytes'] / 2**30:.2f} GiB (limit {row['limit_bytes'] / 2**30:.2f})"
            )
    for name in ("step_60m", "step_1b"):
        for row in results["sections"].get(name, {}).get("rows", []):
            mfu = f"MFU {row['mfu']:.1%}, " if row["mfu"] else ""
            lines.append(
                f"{row['model']} {row['method']:9} {row['tokens_per_second']:>10,.0f} tokens/s, {mfu}"
                f"peak {row['peak_bytes'] / 2**30:.2f} GiB"
            )
    return "\n".join(lines)


def main() -> int:
    """Run the sections; 0 if all passed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="sizes for a test on the CPU")
    parser.add_argument("--only", nargs="+", choices=SECONDS, default=list(SECONDS))
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    arguments = parser.parse_args()
    began = time.perf_counter()
    results: dict[str, Any] = {"about": {}, "sections": {}}
    with tempfile.TemporaryDirectory() as folder:
        for name, command in commands(arguments).items():
            if name not in arguments.only:
                continue
            print(f"== {name}", flush=True)
            left = TOTAL - (time.perf_counter() - began)
            limit = max(5.0, min(SECONDS[name], left))
            built = results["sections"].get("build", {}).get("passed", False)
            section = run(name, command, arguments.device, limit, folder, built)
            results["sections"][name] = section
            results["about"] = (
                section.pop("about") or results["about"] or {"device": arguments.device}
            )
            if arguments.out:
                arguments.out.parent.mkdir(parents=True, exist_ok=True)
                arguments.out.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")
    print(summary(results))
    failed = [name for name, section in results["sections"].items() if not section["passed"]]
    print(f"failed: {', '.join(failed)}" if failed else "all sections passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
