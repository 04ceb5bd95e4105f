"""The GPU suite runs whole on a CPU, so that a GPU's minutes are spent on measuring, not on mending it."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run(*arguments):
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )


def test_gpu_suite(tmp_path):
    output = tmp_path / "results" / "cpu.json"
    done = run("benchmarks/gpu_suite.py", "--device", "cpu", "--small", "--output", output)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(output.read_text())
    assert set(results) == {"about", "supports", "op", "linear", "train"}
    assert {"dense", "reference formula", "ours fan_in"} <= set(results["linear"]["256x256"])
    assert results["train"]["parameters"]["total"] == 2438272


def test_parameters():
    done = run("benchmarks/parameters.py")
    assert "43.5M" in done.stdout
    assert "3144.7M" in done.stdout


def test_supports():
    done = run(
        "benchmarks/supports.py",
        "--model",
        "llama_9m",
        "--sp_ratio",
        "0.06",
        "--block_size",
        "4",
        "--repeat",
        "1",
    )
    assert [line.split()[0] for line in done.stdout.splitlines()[1:]] == [
        "fan_in",
        "uniform",
        "block",
    ]
