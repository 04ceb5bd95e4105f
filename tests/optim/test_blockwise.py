"""8-bit moments: the kernels' arithmetic against its formula, the code's error, rounding, and long-run parity."""

import math

import pytest
import torch
from torch import Tensor, nn

from sltrain_dist.config import OptimizerConfig
from sltrain_dist.optim import OptimizerFactory, blockwise
from sltrain_dist.optim.blockwise import (
    BLOCK,
    BlockwiseAdam,
    decode,
    encode,
    round_stochastically,
)
from sltrain_dist.parallel.engine import Trained, grouped
from sltrain_dist.utils.errors import UserError


def optimizer(parameters: list[nn.Parameter], bits: int, **arguments: object) -> BlockwiseAdam:
    return BlockwiseAdam([{"params": parameters, "bits": bits}], lr=0.01, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("size", [1, 255, 256, 257, 5000])
def test_the_code_is_within_its_step(signed: bool, size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    moment = torch.randn(size, generator=generator)
    moment = moment if signed else moment.square()
    codes, scales = encode(moment, signed)
    assert codes.dtype == torch.uint8
    assert scales.shape == (math.ceil(size / BLOCK),)
    largest = scales.repeat_interleave(BLOCK)[:size]
    error = (decode(codes, scales, signed) - moment).abs()
    assert bool(
        (error <= 0.04 * moment.abs() + 1e-6 * largest).all() | (error <= 0.0101 * largest).all()
    )


def formula(weight: Tensor, first: Tensor, second: Tensor, gradient: Tensor, step: int) -> Tensor:
    """One update as the module's head has it, in float64 from decoded moments."""
    m, v = (
        0.9 * first.double() + 0.1 * gradient,
        0.999 * second.double() + 0.001 * gradient.square(),
    )
    direction = (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
    return weight.double() * (1 - 0.01 * 0.1) - 0.01 * direction


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("shape", [(7, 91), (4096,), (3, 5, 300)])
def test_an_update_is_the_formula(bits: int, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = nn.Parameter(torch.randn(shape, generator=generator))
    live = optimizer([weight], bits, weight_decay=0.1)
    for step in (1, 2, 3):
        state = live.create_state(weight, bits)
        moments = [
            decode(state[name].view(-1), state[name + "_absmax"], name == "exp_avg").view(shape)
            if bits == 8
            else state[name].clone()
            for name in blockwise.MOMENTS
        ]
        weight.grad = torch.randn(shape, generator=generator)
        expected = formula(weight.detach().clone(), *moments, weight.grad, step)
        live.step()
        assert state["step"] == step
        torch.testing.assert_close(weight.detach().double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pieces_change_nothing(
    bits: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tensor updated 512 elements at a time, the last piece and block not whole, is the tensor updated at once."""
    results = []
    for chunk in (512, 1 << 20):
        monkeypatch.setitem(blockwise.CHUNK, "cpu", chunk)
        generator = torch.Generator().manual_seed(2)
        weight = nn.Parameter(torch.randn(5, 409, generator=generator).to(dtype))
        live = optimizer([weight], bits)
        for _ in range(3):
            weight.grad = torch.randn(5, 409, generator=generator).to(dtype)
            live.step()
        results.append((weight.detach(), *map(live.state[weight].get, blockwise.MOMENTS)))
    for whole, pieces in zip(*results, strict=True):
        assert torch.equal(whole, pieces)


def test_stochastic_rounding_is_right_in_the_mean_and_repeatable() -> None:
    source = torch.full((200_000,), 1.0 + 2.0**-10)  # between 1 and 1 + 2**-7
    target = torch.empty_like(source, dtype=torch.bfloat16)
    round_stochastically(source.clone(), target, torch.Generator().manual_seed(0))
    assert set(target.tolist()) == {1.0, 1.0 + 2.0**-7}
    assert target.float().mean().item() == pytest.approx(1.0 + 2.0**-10, abs=2e-5)
    negative = torch.empty_like(target)
    round_stochastically(-source, negative, torch.Generator().manual_seed(0))
    assert torch.equal(negative, -target)
    odd = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, 1.5])
    out = torch.empty(5, dtype=torch.bfloat16)
    round_stochastically(odd.clone(), out, torch.Generator().manual_seed(0))
    torch.testing.assert_close(out.float(), odd, rtol=0, atol=0, equal_nan=True)


def test_steps_below_half_a_unit_are_not_lost() -> None:
    """A bfloat16 weight of 1 has neighbours 1/128 away; 200 steps of 1/1000 move it by 0.2, or not at all."""
    moved = {}
    for stochastic in (False, True):
        weight = nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
        live = optimizer([weight], 8, stochastic=stochastic, seed=3)
        live.param_groups[0]["lr"] = 0.001
        for _ in range(200):
            weight.grad = torch.ones_like(weight)
            live.step()
        moved[stochastic] = 1.0 - weight.float().mean().item()
    assert moved[False] == 0.0
    assert moved[True] == pytest.approx(0.2, rel=0.02)


def test_ranks_with_one_key_round_alike_and_others_do_not() -> None:
    results = []
    for key in ("w 0", "w 0", "w 1"):
        weight = nn.Parameter(torch.ones(512, dtype=torch.bfloat16))
        weight.rounding_key = key  # type: ignore[attr-defined]
        live = optimizer([weight], 32, stochastic=True)
        weight.grad = torch.linspace(-1, 1, 512).to(torch.bfloat16)
        live.param_groups[0]["lr"] = 0.001
        live.step()
        results.append(weight.detach().clone())
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_who_gets_how_many_bits() -> None:
    """By the size of the whole parameter, whatever a rank holds of it; vectors and, unless asked, the vocabulary never 8."""
    for bits in (8, 32):
        factory = OptimizerFactory(OptimizerConfig(name="adamw8bit", embedding_state_bits=bits))  # type: ignore[arg-type]
        assert factory.bits("model.layers.0.mlp.up_proj.b", 4096) == 8
        assert factory.bits("model.layers.0.mlp.up_proj.b", 4095) == 32
        assert factory.bits("model.layers.0.input_layernorm.weight", 8192) == 32
        assert factory.bits("model.norm.weight", 8192) == 32
        assert factory.bits("model.layers.0.mlp.up_proj.bias", 8192) == 32
        assert factory.bits("model.embed_tokens.weight", 10**6) == bits
        assert factory.bits("lm_head.weight", 10**6) == bits
    small, large = (nn.Parameter(torch.zeros(10)) for _ in range(2))
    live = factory.build([Trained("a", small, 10), Trained("b", large, 10_000)])
    assert {group["bits"]: group["params"] for group in live.param_groups} == {
        32: [small],
        8: [large],
    }
    factory.begin(live, grouped(live), 5)
    assert live.state[large]["exp_avg"].dtype == torch.uint8
    assert live.state[small]["exp_avg"].dtype == torch.float32
    assert live.state[large]["step"] == 5


def test_hundred_steps_are_those_of_float_moments() -> None:
    """A small regression by both: the losses stay within a hundredth of each other, and fall."""
    losses: dict[int, list[float]] = {}
    for bits in (8, 32):
        generator = torch.Generator().manual_seed(5)
        truth = torch.randn(64, 128, generator=generator) / 8
        weight = nn.Parameter(torch.zeros(64, 128))
        live = optimizer([weight], bits)
        losses[bits] = []
        for _ in range(100):
            x = torch.randn(256, 128, generator=generator)
            loss = (x @ (weight - truth).t()).square().mean()
            weight.grad = None
            loss.backward()
            live.step()
            losses[bits].append(loss.item())
    assert losses[32][-1] < 0.3 * losses[32][0]
    for eight, plain in zip(losses[8], losses[32], strict=True):
        assert eight == pytest.approx(plain, rel=1e-2, abs=1e-3 * losses[32][0])


def test_refusals() -> None:
    with pytest.raises(UserError, match=r"--weight_decay 0.1: --optimizer adam8bit .* adamw8bit"):
        OptimizerFactory(OptimizerConfig(name="adam8bit", weight_decay=0.1))
    with pytest.raises(UserError, match="--master_weights stochastic: --optimizer sgd rounds"):
        OptimizerFactory(OptimizerConfig(name="sgd", rounding="stochastic"))
    factory = OptimizerFactory(OptimizerConfig(name="adamw", rounding="stochastic"))
    assert factory.row.kind is BlockwiseAdam
