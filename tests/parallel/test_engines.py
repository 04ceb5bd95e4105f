"""What every engine owes beyond the fp32 curve: number formats, clipping, odd parameters, silence."""

import dataclasses
import json
import math
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sltrain_dist.config import MethodConfig, ModelConfig, OptimizerConfig
from sltrain_dist.optim import OptimizerFactory, assert_live
from sltrain_dist.parallel.engine import Engine, add_hashes, build_engine, check_support
from sltrain_dist.parallel.mesh import Mesh, initialise, sum_over_ranks
from sltrain_dist.params import collect_specs
from sltrain_dist.utils.errors import UserError
from tests.parallel import tiny
from tests.ranks import run_ranks

FULL = dataclasses.replace(tiny.METHOD, method="full")

ROOT = Path(__file__).parents[2]
HALF: dict[str, Any] = {"dtype": "bfloat16"}
PURE: dict[str, Any] = {"dtype": "bfloat16", "master_weights": False}
HALF_ENGINES: dict[str, tuple[str, dict[str, Any]]] = {
    "fsdp": ("fsdp", HALF),
    "fsdp pure": ("fsdp", PURE),
    "fsdp pure, grad_sync last": ("fsdp", PURE | {"grad_sync": "last"}),
    "zero1": ("zero1", HALF),
    "zero2": ("zero2", HALF),
    "zero2 pure": ("zero2", PURE),
    "zero3": ("zero3", HALF),
    "zero3 pure": ("zero3", PURE),
}
VARIANTS: dict[str, tuple[MethodConfig, ModelConfig]] = {
    "uniform support": (dataclasses.replace(tiny.METHOD, support="uniform"), tiny.SMALL),
    "trained scale": (dataclasses.replace(tiny.METHOD, train_scaling=True), tiny.SMALL),
    "low rank": (dataclasses.replace(tiny.METHOD, method="low_rank"), tiny.SMALL),
    "full": (MethodConfig(method="full", seed=3), tiny.SMALL),
    "tied, biased": (
        tiny.METHOD,
        dataclasses.replace(
            tiny.SMALL, tie_word_embeddings=True, attention_bias=True, mlp_bias=True
        ),
    ),
}


def _half_loss_falls(mesh: Mesh) -> None:
    reference = tiny.train(tiny.build(mesh, "fsdp"), 0, 5)
    for name, (kind, changes) in HALF_ENGINES.items():
        curve = tiny.train(tiny.build(mesh, kind, **changes), 0, 5)
        worst = max(abs(a - b) for (a, _), (b, _) in zip(curve, reference, strict=True))
        assert worst < 0.06, f"{name}: {curve} against {reference}"


def _accumulates_in_float32(mesh: Mesh) -> None:
    """One micro-batch of weight 1, then 16 of weight 1/512: added in bfloat16 those would all be lost."""
    tokens, labels = (part[mesh.dp_rank :][:1] for part in tiny.batch(0))
    for name, (kind, changes) in HALF_ENGINES.items():
        norms = []
        for weights in ([1.0], [1.0] + [1 / 512] * 16):
            engine = tiny.build(
                mesh, kind, gradient_accumulation=len(weights), batch_size=len(tokens), **changes
            )
            for number, weight in enumerate(weights):
                loss = engine.module(tokens, labels) * (weight / 30)
                engine.accumulate(loss, last=number == len(weights) - 1)
            norms.append(engine.step(0.0))
        assert norms[1] / norms[0] == pytest.approx(1 + 16 / 512, abs=4e-3), (name, norms)


def _masters_start_exact(mesh: Mesh) -> None:
    """Masters hold the float32 initial values, not their bfloat16 rounding; pure runs the rounding."""
    plain = {name: t.full_tensor() for name, t in tiny.build(mesh, "fsdp").state().items()}
    for name, (kind, changes) in HALF_ENGINES.items():
        for key, tensor in tiny.build(mesh, kind, **changes).state().items():
            expected = plain[key] if changes is HALF else plain[key].bfloat16()
            assert torch.equal(tensor.full_tensor().to(expected.dtype), expected), (name, key)


def _half_under_stage_0(mesh: Mesh) -> None:
    with pytest.raises(UserError, match="--gradient_accumulation 2: with --dtype bfloat16"):
        tiny.build(mesh, "zero0", **HALF)
    rows = tiny.GLOBAL_BATCH // mesh.dp_size
    tokens, labels = (part[mesh.dp_rank * rows :][:rows] for part in tiny.batch(0))
    losses = []
    for kind in ("fsdp", "zero0"):
        engine = tiny.build(mesh, kind, gradient_accumulation=1, batch_size=rows, **HALF)
        for _ in range(3):
            loss = engine.module(tokens, labels) / 500
            engine.accumulate(loss, last=True)
            norm = engine.step(1e-2)
        assert math.isfinite(norm)
        losses.append(sum_over_ranks(mesh, loss.detach()).item())
    assert losses[0] == pytest.approx(losses[1], abs=0.02)


def _clips_to_the_limit(mesh: Mesh) -> None:
    """With SGD the step's length is lr * min(norm, limit) (and Adam's indifference to scale is out)."""
    for limit in (0.0, 0.5):
        optimizer = OptimizerConfig(name="sgd", lr=1.0, grad_clipping=limit)
        for kind in ("fsdp", "zero0", "zero1", "zero2", "zero3"):
            engine = tiny.build(mesh, kind, optimizer)
            before = {name: t.full_tensor().clone() for name, t in engine.state().items()}
            _, norm = tiny.update(engine, 0, 0.25)
            after = {name: t.full_tensor() for name, t in engine.state().items()}
            moved = sum((after[name] - old).square().sum() for name, old in before.items())
            expected = 0.25 * (min(norm, limit) if limit else norm)
            assert moved**0.5 == pytest.approx(expected, rel=1e-3), (kind, limit, norm)
            assert norm > 0.5
            assert_live(engine.optimizer, optimizer)


def _skips_an_update_that_is_not_finite(mesh: Mesh) -> None:
    for kind in ("fsdp", "zero0", "zero1", "zero2", "zero3"):
        engine = tiny.build(mesh, kind)
        before = {name: t.full_tensor().clone() for name, t in engine.state().items()}
        _, norm = tiny.update(engine, 0, 1e-2, lambda loss: loss * math.nan)
        assert not math.isfinite(norm), kind
        assert engine.scalars()["updates"] == 0, kind
        for name, tensor in engine.state().items():
            assert torch.equal(tensor.full_tensor(), before[name]), (kind, name)
        assert math.isfinite(tiny.update(engine, 1, 1e-2)[1]), kind


def _odd_parameters(mesh: Mesh) -> None:
    """[1] scales (nothing on rank 1), flat int32 supports, biases, tied weights, recomputed blocks."""
    for name, (method, model) in VARIANTS.items():
        curves, hashes = {}, set()
        for kind in ("zero0", "fsdp", "zero2", "zero3"):
            engine = tiny.build(mesh, kind, method=method, model=model)
            hashes.add(engine.support_hash())
            curves[kind] = tiny.train(engine, 0, 3)
            losses = [abs(a[0] - b[0]) for a, b in zip(curves[kind], curves["zero0"], strict=True)]
            assert max(losses) < 1e-5, (name, kind, curves)
        assert len(hashes) == 1, (name, hashes)
        assert (hashes == {0}) == (method.method != "sltrain")


def _recomputed_blocks(mesh: Mesh) -> None:
    curves = []
    for kind, checkpointing in (("zero0", "none"), ("fsdp", "block"), ("zero3", "block")):
        factory = tiny.tiny_factory(checkpointing=checkpointing)
        optimizer = OptimizerFactory(tiny.OPTIMIZER)
        engine = build_engine(factory, mesh, tiny.config(kind, mesh.dp_size), optimizer, 3)
        curves.append(tiny.train(engine, 0, 3))
    for curve in curves[1:]:
        assert curve[-1][0] == pytest.approx(curves[0][-1][0], abs=1e-5), curves


def _offloaded(mesh: Mesh) -> None:
    config = json.loads((ROOT / "ds_configs" / "zero3_offload.json").read_text())
    offloaded = tiny.train(tiny.build(mesh, "zero3", ds_config=config), 0, 4)
    plain = tiny.train(tiny.build(mesh, "fsdp"), 0, 4)
    for one, other in zip(offloaded, plain, strict=True):
        assert one == pytest.approx(other, abs=1e-5)


def _adafactor(mesh: Mesh) -> None:
    optimizer = OptimizerConfig(name="adafactor", lr=1e-2)
    for kind in ("fsdp", "zero1", "zero3"):
        with pytest.raises(UserError, match="--optimizer adafactor: needs whole matrices"):
            tiny.build(mesh, kind, optimizer)
    engine = tiny.build(mesh, "zero0", optimizer)
    curve = tiny.train(engine, 0, 4)
    assert curve[-1][0] < curve[0][0]
    assert any(name.startswith("optimizer.row_mean.") for name in engine.state())


def _other_support_on_one_rank(mesh: Mesh) -> None:
    assert add_hashes(mesh, 5, ranks_with_same=2) == 5
    assert add_hashes(mesh, 5) == 10
    with pytest.raises(UserError, match="the support on rank 1 differs from rank 0's"):
        add_hashes(mesh, mesh.rank, ranks_with_same=2)
    specs = collect_specs(tiny.tiny_factory()(device="meta", dtype=torch.float32))
    check_support(mesh, specs, 3)
    with pytest.raises(
        UserError, match="--seed 0: rank 1 makes another sparse support than rank 0"
    ):
        check_support(mesh, specs, mesh.rank)


def _older_torch(mesh: Mesh) -> None:
    """torch 2.11 casts integer parameters in mixed precision; the engine must prevent it there."""
    from torch.distributed.fsdp._fully_shard import _fsdp_param

    parameter_class: Any = _fsdp_param.FSDPParam

    def settle(self: Any, policy: Any) -> None:
        self.orig_dtype = self.sharded_param.dtype
        param, reduce = policy.param_dtype, policy.reduce_dtype
        self.reduce_dtype = None if reduce == param else reduce
        self.param_dtype = None if param == self.orig_dtype else param

    newer = tiny.train(tiny.build(mesh, "fsdp", **HALF), 0, 2)
    kept, parameter_class.init_dtype_attrs = parameter_class.init_dtype_attrs, settle
    try:
        assert tiny.train(tiny.build(mesh, "fsdp", **HALF), 0, 2) == newer
    finally:
        parameter_class.init_dtype_attrs = kept


CHECKS: dict[str, Callable[[Mesh], None]] = {
    check.__name__.strip("_"): check
    for check in (
        _half_loss_falls,
        _accumulates_in_float32,
        _masters_start_exact,
        _half_under_stage_0,
        _clips_to_the_limit,
        _skips_an_update_that_is_not_finite,
        _odd_parameters,
        _recomputed_blocks,
        _offloaded,
        _adafactor,
        _other_support_on_one_rank,
        _older_torch,
    )
}


def _all(mesh: Mesh) -> dict[str, str | None]:
    """Run every check in one process group; a check that fails on one rank must fail on all of them."""
    outcome: dict[str, str | None] = {}
    for name, check in CHECKS.items():
        try:
            check(mesh)
            outcome[name] = None
        except Exception:
            outcome[name] = traceback.format_exc()
    return outcome


@pytest.fixture(scope="module")
def outcome() -> dict[str, str | None]:
    result: dict[str, str | None] = run_ranks(_all, 2, timeout=400)[0]
    return result


@pytest.mark.parametrize("name", CHECKS)
def test_on_two_ranks(outcome: dict[str, str | None], name: str) -> None:
    assert outcome[name] is None, outcome[name]


BARE = """
from tests.parallel import tiny
from sltrain_dist.parallel.mesh import close, initialise
mesh = initialise()
dtype = "bfloat16" if "KIND" == "zero1" else "float32"  # there DeepSpeed has another optimizer
tiny.train(tiny.build(mesh, "KIND", dtype=dtype), 0, 1)
close()
print("done")
"""


@pytest.mark.parametrize("kind", ["fsdp", "zero1", "zero3"])
def test_bare_python_trains_silently(kind: str, tmp_path: Path) -> None:
    """One process without a launcher; no log, no warning, nothing compiled at start."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    } | {"PYTHONPATH": str(ROOT), "TORCH_EXTENSIONS_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", BARE.replace("KIND", kind)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout == "done\n", done.stdout + done.stderr
    assert done.stderr == ""
    assert not list(tmp_path.iterdir())


def test_an_unknown_engine_is_a_user_error() -> None:
    config: Any = dataclasses.replace(tiny.config("fsdp", 1), engine="ddp")  # type: ignore[arg-type]
    mesh: Any = None
    with pytest.raises(UserError, match="--engine ddp: unknown; engines are fsdp, zero"):
        build_engine(tiny.tiny_factory(), mesh, config, OptimizerFactory(tiny.OPTIMIZER), 0)


def _whole_matrices_on_one_rank(mesh: Mesh, name: str) -> tuple[float, float]:
    """Possible under FSDP2 where nothing is cut, and the same as under ZeRO-0, whose checkpoint goes on under FSDP2."""
    optimizer = OptimizerConfig(name=name, lr=1e-2, proj_rank=4, update_proj_gap=2)
    engine: Engine = tiny.build(mesh, "fsdp", optimizer, method=FULL)
    other = tiny.build(mesh, "zero0", optimizer, method=FULL)
    mine, theirs = tiny.train(engine, 0, 3), tiny.train(other, 0, 3)
    assert mine[-1][0] < mine[0][0]
    fresh = tiny.build(mesh, "fsdp", optimizer, method=FULL)
    fresh.load_state(other.state(), other.scalars())
    after = [abs(tiny.update(fresh, n, 0.0)[0] - tiny.update(other, n, 0.0)[0]) for n in (3, 4, 5)]
    return mine[-1][0] - theirs[-1][0], max(after)


@pytest.mark.parametrize(
    ("name", "package"),
    [("adafactor", "torch"), ("muon", "torch"), ("galore_adamw", "galore_torch"), ("apollo", "apollo_torch")],
)  # fmt: skip
def test_optimizers_of_whole_matrices_on_one_rank(name: str, package: str) -> None:
    pytest.importorskip(package)
    trained, loaded = run_ranks(_whole_matrices_on_one_rank, 1, name)[0]
    assert abs(trained) < 1e-5
    assert abs(loaded) < 1e-6


def _axes(_: Mesh) -> None:
    mesh = initialise(45.0, "cpu", tensor_parallel=2)
    for group in (mesh.tp_group, mesh.dp_group):
        backend: Any = group._get_backend(torch.device("cpu"))
        assert backend.options._timeout.total_seconds() == 45
    assert (mesh.tp_size, mesh.tp_rank, mesh.dp_size) == (2, mesh.rank, 1)


def test_every_axis_has_the_timeout_of_the_run() -> None:
    run_ranks(_axes, 2)
