"""The table of optimizers: right classes, clear refusals, state that exists before the first update."""

import sys
import types

import pytest
import torch
from torch import nn

from sltrain_dist.config import OptimizerConfig
from sltrain_dist.optim import OPTIMIZERS, OptimizerFactory, assert_live, describe
from sltrain_dist.parallel.engine import Trained, grouped
from sltrain_dist.utils.errors import UserError


def _parameters(seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((6, 4), (5,), (1,))]


def _trained(parameters: list[nn.Parameter]) -> list[Trained]:
    return [Trained(f"p{n}", p, p.numel()) for n, p in enumerate(parameters)]


def _run(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], steps: int) -> None:
    for step in range(steps):
        generator = torch.Generator().manual_seed(100 + step)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_from_the_start_equals_state_made_by_the_first_update(
    name: str, momentum: float
) -> None:
    """An eagerly created zero state with step 0 must not change any update (bias correction off by one)."""
    if name in (
        "adam8bit",
        "muon",
    ):  # whose weight decay is refused, and that has a test of its own
        pytest.skip("elsewhere")
    config = OptimizerConfig(name=name, lr=0.01, weight_decay=0.1, momentum=momentum)
    factory = OptimizerFactory(config)
    eager, lazy = _parameters(), _parameters()
    optimizer = factory.build(_trained(eager))
    factory.begin(optimizer, grouped(optimizer), 0)
    _run(optimizer, eager, 4)
    reference: torch.optim.Optimizer
    if name == "adafactor":
        transformers = pytest.importorskip("transformers")
        reference = transformers.optimization.Adafactor(
            lazy,
            lr=0.01,
            weight_decay=0.1,
            beta1=momentum or None,
            scale_parameter=False,
            relative_step=False,
            warmup_init=False,
        )
    elif name == "sgd":
        reference = torch.optim.SGD(lazy, lr=0.01, momentum=momentum, weight_decay=0.1)
    elif name == "adamw8bit":  # of tensors as small as these the moments have 32 bits
        reference = torch.optim.AdamW(lazy, lr=0.01, weight_decay=0.1)
    else:
        reference = OPTIMIZERS[name].kind(lazy, lr=0.01, weight_decay=0.1)  # type: ignore[call-arg]
    _run(reference, lazy, 4)
    for ours, theirs in zip(eager, lazy, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_tensors_are_those_named(name: str) -> None:
    factory = OptimizerFactory(OptimizerConfig(name=name, momentum=0.5))
    parameters = _parameters()
    optimizer = factory.build(_trained(parameters))
    factory.begin(optimizer, grouped(optimizer), 7)
    for parameter in parameters:
        tensors = factory.tensors(optimizer, parameter)
        assert tuple(tensors) == factory.state_names("p", tuple(parameter.shape))
        extra = set(optimizer.state[parameter]) - set(tensors)
        assert extra <= {"step"}
        if extra:
            assert optimizer.state[parameter]["step"] == 7.0


def test_an_unknown_name_says_which_there_are() -> None:
    with pytest.raises(UserError, match=r"--optimizer adamx: unknown; optimizers are adamw, adam"):
        OptimizerFactory(OptimizerConfig(name="adamx"))


def test_adafactor_is_refused_on_shards() -> None:
    factory = OptimizerFactory(OptimizerConfig(name="adafactor"))
    factory.check("--engine fsdp", sharded=False)
    with pytest.raises(UserError, match=r"needs whole matrices, but ZeRO stage 2 cuts them; use"):
        factory.check("ZeRO stage 2", sharded=True)


@pytest.mark.parametrize(
    "bad", [{"lr": 0.0}, {"weight_decay": -1.0}, {"grad_clipping": -1.0}, {"momentum": 1.0}]
)
def test_bad_numbers_are_user_errors(bad: dict[str, float]) -> None:
    with pytest.raises(UserError):
        OptimizerFactory(OptimizerConfig(**bad))  # type: ignore[arg-type]


def test_the_live_optimizer_is_described_and_checked() -> None:
    """ms-swift trained silently with another optimizer than asked."""
    config = OptimizerConfig(name="adamw", lr=0.5, weight_decay=0.25)
    optimizer = OptimizerFactory(config).build(_trained(_parameters()))
    told = describe(optimizer)
    assert told["class"].endswith("adamw.AdamW")
    assert told["groups"][0]["elements"] == 30
    assert told["groups"][0]["weight_decay"] == 0.25
    assert_live(optimizer, config)
    with pytest.raises(RuntimeError, match="is live"):
        assert_live(optimizer, OptimizerConfig(name="adam", weight_decay=0.25))
    with pytest.raises(RuntimeError, match="weight_decay"):
        assert_live(optimizer, OptimizerConfig(name="adamw"))


def test_apex_without_a_gpu_is_refused_by_name() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UserError, match=r"--optimizer apex_adamw: needs a CUDA GPU; .*adamw"):
        OptimizerFactory(OptimizerConfig(name="apex_adamw"))


def test_apex_resumes_with_its_step_counter_in_the_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in with apex's signature and place of the counter: apex itself needs a GPU."""

    class FusedAdam(torch.optim.AdamW):
        def __init__(self, params, lr, betas, eps, weight_decay, adam_w_mode):  # type: ignore[no-untyped-def]
            super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
            assert adam_w_mode

    module = types.ModuleType("apex.optimizers")
    module.FusedAdam = FusedAdam  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
    monkeypatch.setitem(sys.modules, "apex.optimizers", module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    factory = OptimizerFactory(OptimizerConfig(name="apex_adamw"))
    parameters = _parameters()
    optimizer = factory.build(_trained(parameters))
    assert type(optimizer) is FusedAdam
    factory.begin(optimizer, grouped(optimizer), 7)
    assert [group["step"] for group in optimizer.param_groups] == [7]
    assert set(factory.tensors(optimizer, parameters[0])) == {"exp_avg", "exp_avg_sq"}
    assert "step" not in optimizer.state[parameters[0]]
    assert_live(optimizer, factory.config)
