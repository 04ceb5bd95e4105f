"""--init_from: every engine starts from the stored weights to the bit, optimizers from zero, and misfits are named."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher import export
from sltrain_dist.config import MethodConfig, TrainConfig
from sltrain_dist.data.tokenizer import train_tokenizer
from sltrain_dist.model.llama import Llama
from sltrain_dist.model.tensor_parallel import parallelize
from sltrain_dist.ops.pattern import Pattern, prune_rows
from sltrain_dist.optim import OptimizerFactory
from sltrain_dist.parallel.engine import MODEL, build_engine
from sltrain_dist.parallel.mesh import Mesh, close, initialise
from sltrain_dist.parallel.tensor import tensor_parallel
from sltrain_dist.tools.weights import open_pretrained
from sltrain_dist.train.checkpoint import Progress, save
from sltrain_dist.train.init_from import start_from
from sltrain_dist.utils.errors import UserError
from tests.parallel import tiny
from tests.ranks import run_ranks
from tests.tools.saved import checkpoint, configs, tokens
from tests.train.fake_engine import make_config

CASE = "trained_scale"  # tied embeddings and a trained scale: the awkward ones


def run_config(source: Path, **changes: Any) -> TrainConfig:
    model, method = configs(CASE)
    config = dataclasses.replace(make_config("unused"), model=model, method=method)
    return dataclasses.replace(config, init_from=str(source), **changes)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that trained on one rank, and its factored export in bfloat16 beside it."""
    folder = tmp_path_factory.mktemp("source") / "run"
    mesh = initialise(device="cpu")
    logits = checkpoint(mesh, folder, *configs(CASE))
    close()
    torch.save(logits, folder / "logits.pt")
    command = [str(folder), "--to", "factored", "--dtype", "bf16"]
    assert export.main([*command, "--output", str(folder.parent / "half")]) == 0
    return folder


def start(mesh: Mesh, folder: Path, kind: str, **changes: Any) -> dict[str, Any]:
    """What an engine that started from ``folder`` holds; it saves itself beside ``folder``."""
    model, method = configs(CASE)
    tokenizer = train_tokenizer(["text"], 258)
    axes = {"tensor_parallel": mesh.tp_size, "replicate": mesh.replicate_size}
    config = tiny.config(kind, mesh.dp_size, **axes, **changes)
    tp = tensor_parallel(mesh, config)

    def whole_or_cut(*, device: torch.device | str, dtype: torch.dtype) -> torch.nn.Module:
        made = Llama(model, method, device=device, dtype=dtype)
        if tp is not None:
            parallelize(made, tp)
        return made

    factory = start_from(whole_or_cut, run_config(folder), mesh, tokenizer)
    engine = build_engine(factory, mesh, config, OptimizerFactory(tiny.OPTIMIZER), method.seed)
    factory.close()
    layout = f"{mesh.tp_size}-{mesh.replicate_size}-{changes.get('dtype', 'float32')}"
    saved_as = folder.parent / f"{kind}-{layout}"
    saved = save(engine, Progress(1, 0), run_config(folder, save_dir=str(saved_as)))
    assert saved.folder is not None
    with torch.no_grad():
        logits = engine.module(tokens())
    state = {name: tensor.full_tensor().clone() for name, tensor in engine.state().items()}
    return {
        "logits": logits,
        "weights": {k.removeprefix(MODEL): t for k, t in state.items() if k.startswith(MODEL)},
        "moments": max(float(t.abs().max()) for k, t in state.items() if not k.startswith(MODEL)),
        "scalars": engine.scalars(),
        "hash": engine.support_hash(),
        "losses": tiny.train(engine, 0, 2) if not changes else [],
    }


KINDS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("fsdp", {}),
    ("zero1", {}),
    ("zero3", {}),
    ("fsdp", {"dtype": "bfloat16"}),
    ("zero2", {"dtype": "bfloat16"}),
)
CUT = ("fsdp", "zero1")  # over two tensor-parallel ranks; and one copy a rank (HSDP)


def body(mesh: Mesh, folder: Path, damaged: Path) -> tuple[list[dict[str, Any]], str]:
    config = run_config(damaged)
    with pytest.raises(UserError) as caught:
        start_from(tiny.tiny_factory(), config, mesh, train_tokenizer(["text"], 258))
    outcomes = [start(mesh, folder, kind, **changes) for kind, changes in KINDS]
    cut = initialise(device="cpu", tensor_parallel=2)
    outcomes += [start(cut, folder, kind) for kind in CUT]
    copies = initialise(device="cpu", replicate=2)
    return [*outcomes, start(copies, folder, "fsdp")], str(caught.value)


def test_every_engine_starts_from_the_stored_weights(source: Path, tmp_path: Path) -> None:
    """To the bit; and damage, which the first rank alone looks for, stops all ranks."""
    damaged = tmp_path / "damaged"
    shutil.copytree(source, damaged)
    shard = next((damaged / "step_3").glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    stored = open_pretrained(source, "--init_from")
    expected = torch.load(source / "logits.pt", weights_only=True)
    (outcomes, problem), (_, same) = run_ranks(body, 2, source, damaged)
    assert problem == same
    assert f"damaged ({shard.name}: checksum differs)" in problem
    kinds = [*KINDS, *((kind, {}) for kind in (*CUT, "fsdp"))]
    for (kind, changes), outcome in zip(kinds, outcomes, strict=True):
        for name, tensor in outcome["weights"].items():  # also masters: no rounding to bfloat16
            assert torch.equal(tensor, stored.tensor(name).float()), (kind, changes, name)
        assert outcome["moments"] == 0
        assert outcome["scalars"] == {"updates": 0, "optimizer_steps": 0}
        assert outcome["hash"] == stored.support_hash
        if not changes:
            assert (outcome["logits"] - expected).abs().max() < 1e-5, kind
            torch.testing.assert_close(outcome["losses"], outcomes[0]["losses"], rtol=0, atol=1e-4)
    for name in ("fsdp-1-1", "zero3-1-1", "fsdp-2-1", "zero1-2-1", "fsdp-1-2"):
        reopened = open_pretrained(source.parent / f"{name}-float32", "--model")
        assert all(torch.equal(reopened.tensor(n), stored.tensor(n)) for n in stored.names())


def test_a_rounded_export_is_a_start_too(source: Path) -> None:
    half = source.parent / "half"
    mesh = initialise(device="cpu")
    try:
        outcome = start(mesh, half, "fsdp")
    finally:
        close()
    exact = open_pretrained(source, "--init_from")
    for name, tensor in outcome["weights"].items():
        assert torch.equal(tensor, exact.tensor(name).bfloat16().float())


def method(**changes: Any) -> dict[str, MethodConfig]:
    return {"method": dataclasses.replace(configs(CASE)[1], **changes)}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "method": (method(method="low_rank"), "holds weights of --method sltrain.*give --method sltrain"),
    "rank": (method(rank=4), "--rank 8, this run has --rank 4; give --rank 8"),
    "alpha": (method(alpha=1.0), "give --lora_alpha 8.0"),
    "scale": (method(train_scaling=False), "give --train_scaling True"),
    "density": (method(density=0.2), "give --sp_ratio 0.1"),
    "support": (method(support="uniform"), "give --support fan_in"),
    "seed": (method(seed=4), "its support was drawn with --seed 3.*give --seed 3"),
    "model": (
        {"model": dataclasses.replace(configs(CASE)[0], rope_theta=5.0)},
        "another model: rope_theta is 10000.0, in this run 5.0; give the --model it was trained with",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_named(case: str, source: Path) -> None:
    changes, message = REFUSED[case]
    config = run_config(source, **changes)
    mesh = initialise(device="cpu")
    try:
        with pytest.raises(UserError, match=message) as caught:
            start_from(
                tiny.tiny_factory(config.method, config.model), config, mesh,
                train_tokenizer(["text"], 258),
            )  # fmt: skip
    finally:
        close()
    assert str(caught.value).startswith(f"--init_from {source}/step_3: ")
    assert "\n" not in str(caught.value)


def test_slope_chooses_its_masks_from_the_stored_values(tmp_path: Path) -> None:
    """Which moved since the stored masks were chosen; a factored export carries both."""
    model, method = configs("slope")
    mesh = initialise(device="cpu")
    try:
        checkpoint(mesh, tmp_path / "run", model, method)
        command = [str(tmp_path / "run"), "--to", "factored", "--output", str(tmp_path / "small")]
        assert export.main(command) == 0
        for source in (tmp_path / "run", tmp_path / "small"):
            stored = open_pretrained(source, "--init_from")
            config = dataclasses.replace(run_config(source), model=model, method=method)
            whole = tiny.tiny_factory(method, model)
            factory = start_from(whole, config, mesh, train_tokenizer(["text"], 258))
            optimizer = OptimizerFactory(tiny.OPTIMIZER)
            engine = build_engine(factory, mesh, tiny.config("fsdp", 1), optimizer, method.seed)
            factory.close()
            state = {n.removeprefix(MODEL): t.full_tensor() for n, t in engine.state().items()}
            moved = 0
            for name in (name for name in stored.names() if name.endswith(".backward")):
                layer = name.removesuffix("backward")
                values, offsets = (stored.tensor(layer + part) for part in ("values", "offsets"))
                assert torch.equal(state[layer + "values"], values)
                assert torch.equal(state[name], prune_rows(values, offsets, Pattern(2, 4)))
                moved += not torch.equal(state[name], stored.tensor(name))
            assert moved
    finally:
        close()
