"""Starting a model never holds it twice: the peak of resident memory while an engine is built.

Of a model with 277 MB of float32 weights, in a process of its own: `python -m tests.parallel.test_materialise fsdp float32`.
"""

import dataclasses
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from tests.parallel import tiny

FULL = dataclasses.replace(tiny.METHOD, method="full")
SMALLEST = dataclasses.replace(tiny.MODEL, num_hidden_layers=1)
LARGE = dataclasses.replace(
    tiny.MODEL,
    vocab_size=8192,
    hidden_size=768,
    intermediate_size=2048,
    num_hidden_layers=8,
    num_attention_heads=12,
    num_key_value_heads=12,
    head_dim=64,
)
LARGEST_TENSOR = 8192 * 768 * 4
# What stays beside the parameters, in units of 4 bytes an element. DeepSpeed has masters and a buffer for gradients.
KEPT = {("fsdp", "float32"): 2, ("fsdp", "bfloat16"): 2, ("zero3", "bfloat16"): 2 + 2}
WITHOUT_BUCKETS = {"zero_optimization": {"stage": 3, "reduce_bucket_size": 1_000_000}}


def main(kind: str, dtype: str) -> None:
    """Print by how many bytes building grows the process at its peak, and what the engine holds of it."""
    from sltrain_dist.parallel.mesh import close, initialise
    from sltrain_dist.train.summary import peak_resident

    mesh = initialise(device="cpu")
    options = {"ds_config": WITHOUT_BUCKETS} if kind == "zero3" else {}
    tiny.build(mesh, kind, model=SMALLEST, method=FULL, dtype=dtype, **options)  # imports
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    engine = tiny.build(mesh, kind, model=LARGE, method=FULL, dtype=dtype, **options)
    peak = peak_resident()
    elements = sum(spec.logical_numel for spec in engine.specs.values())  # type: ignore[attr-defined]
    held = engine.held_bytes()["parameters"]
    print(json.dumps({"growth": peak - before, "elements": elements, "held": held}))
    close()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("kind", "dtype"), KEPT, ids=" ".join)
def test_building_never_holds_the_model_twice(kind: str, dtype: str) -> None:
    # Pieces that are freed go back to the system at once, so that the process holds what is alive.
    exact = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-m", "tests.parallel.test_materialise", kind, dtype]
    environment = os.environ | exact | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    expected = found["held"] + KEPT[kind, dtype] * 4 * found["elements"]
    slack = 2 * LARGEST_TENSOR
    assert found["held"] > 100e6
    assert slack < found["held"] / 2  # a second copy would not go unnoticed
    assert expected - slack < found["growth"] < expected + slack


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_peak_is_not_that_of_the_process_that_started_this_one() -> None:
    ballast = b"1" * 1_500_000_000
    code = "from sltrain_dist.train.summary import peak_resident; print(peak_resident())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 50e6 < int(done.stdout) < len(ballast)


if __name__ == "__main__":
    main(*sys.argv[1:])
