"""What a rank holds is its share of the whole: parameters, offsets and moments, in bytes, measured and printed.

Within 2%, because norms and row-parallel biases are held whole and FSDP2 and ZeRO round pieces up.
"""

import dataclasses
from typing import Any

import pytest
import torch

from sltrain_dist.parallel.mesh import Mesh
from tests.parallel import tiny
from tests.ranks import run_ranks

# Wide enough for norms to be less than a hundredth of the parameters.
MODEL = dataclasses.replace(tiny.SHARED, num_hidden_layers=1, hidden_size=128, head_dim=32)
ZERO3: dict[str, Any] = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
CASES = {  # name: (engine, tensor parallel, replicate, divisors of parameters, offsets, moments, on 4 ranks)
    "zero0 tp4": ("zero0", 4, 1, (4, 4, 4)),
    "zero1 tp2": ("zero1", 2, 1, (2, 2, 4)),
    "zero2 tp2": ("zero2", 2, 1, (2, 2, 4)),
    "fsdp": ("fsdp", 1, 1, (4, 4, 4)),
    "fsdp tp2": ("fsdp", 2, 1, (4, 4, 4)),
    "fsdp tp4": ("fsdp", 4, 1, (4, 4, 4)),
    "fsdp tp2 replicated": ("fsdp", 2, 2, (2, 2, 2)),
    "zero3": ("zero3", 1, 1, (4, 4, 4)),
    "zero3 tp2": ("zero3", 2, 1, (4, 4, 4)),
}
Bytes = tuple[int, int, int]  # of parameters, offsets, moments


def size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _held(_: Mesh, method: str) -> dict[str, Bytes]:
    found = {}
    for name, (kind, tensor, replicate, _) in CASES.items():
        mesh = tiny.arranged(tensor, replicate)
        changes = {"ds_config": ZERO3} if kind == "zero3" else {}
        engine = tiny.build(mesh, kind, method=tiny.SHARED_METHODS[method], model=MODEL, **changes)
        tiny.update(engine, 0, 1e-3)
        own = engine.held_bytes()
        found[name] = (own["parameters"], own["offsets"], own["moments"])
    return found


def whole(method: str) -> Bytes:
    """Of the model: fp32 parameters, offsets, two fp32 moments."""
    model = tiny.tiny_factory(tiny.SHARED_METHODS[method], MODEL)(
        device="meta", dtype=torch.float32
    )
    trained = sum(size(p) for p in model.parameters() if p.requires_grad)
    return trained, sum(size(p) for p in model.parameters() if not p.requires_grad), 2 * trained


@pytest.mark.parametrize("method", ["fan_in", "block", "low_rank", "full", "slope"])
def test_a_rank_holds_its_share(method: str, capsys: pytest.CaptureFixture[str]) -> None:
    total = whole(method)
    lines = [
        f"{method}: {total[0]} bytes of parameters, {total[1]} of offsets, {total[2]} of moments"
    ]
    for rank, found in enumerate(run_ranks(_held, 4, method)):
        for name, own in found.items():
            divisors = CASES[name][3]
            shares = [part / (one / by) if one else 1.0 for part, one, by in zip(own, total, divisors, strict=True)]  # fmt: skip
            text = ", ".join(f"1/{by} x {share:.3f}" for by, share in zip(divisors, shares, strict=True))  # fmt: skip
            lines.append(f"  rank {rank} {name:<20} {text}")
            assert all(abs(share - 1) <= 0.02 for share in shares), lines[-1]
    with capsys.disabled():
        print("\n" + "\n".join(lines))
