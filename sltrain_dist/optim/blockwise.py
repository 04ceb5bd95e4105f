"""Adam and AdamW whose moments take one byte an element, with bitsandbytes' blockwise kernels (arXiv 2110.02861).

A moment is kept as codes, one uint8 an element, and the largest magnitude of every block of 256 elements, float32;
code c of a block stands for map[c] * absmax, with the signed dynamic map for the first moment and the unsigned
one for the second. An update decodes a block, does

    m = b1 m + (1 - b1) g      v = b2 v + (1 - b2) g^2
    w = (1 - lr wd) w - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

and encodes it again. Groups with "bits": 32 keep float32 moments and take torch's fused kernel. bitsandbytes' own
classes are not used: they synchronise with the GPU after every tensor, decide by the size of a shard, and decode a whole tensor at once
on a CPU. Here at most `CHUNK` elements are decoded at a time.

Weights are float32 or bfloat16; the update of a bfloat16 weight is computed in float32 and rounded to nearest, or
stochastically: up with the probability of the distance, so that steps below half a unit are not lost.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from sltrain_dist.parallel import quantised
from sltrain_dist.parallel.quantised import BLOCK, blocks
from sltrain_dist.utils import counter_random

CHUNK = {"cpu": 1 << 22, "cuda": 1 << 26}  # elements decoded at a time; multiples of BLOCK
MOMENTS = ("exp_avg", "exp_avg_sq")
SCALES = {name: name + quantised.SCALES for name in MOMENTS}


class BlockwiseAdam(Optimizer):
    """Adam with decoupled weight decay; each group says in "bits" how its moments are kept, 8 or 32.

    State of a parameter: "exp_avg", "exp_avg_sq" of its shape, uint8 or float32; for uint8 also
    "exp_avg_absmax", "exp_avg_sq_absmax", float32 [`blocks`]; "step", the number of updates done, an int.

    Args:
        parameters: groups of float32 or bfloat16 tensors.
        stochastic: round bfloat16 weights stochastically, with numbers drawn from ``seed``, the
            parameter's "rounding_key" attribute (0 where there is none) and the step.
    """

    def __init__(
        self,
        parameters: Iterable[Any],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        stochastic: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(
            parameters,
            {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "bits": 8},
        )
        self.stochastic, self.seed = stochastic, seed

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and parameter.numel():
                    self._update(parameter, parameter.grad, group)

    def create_state(self, parameter: Tensor, bits: int) -> dict[str, Any]:
        """The state of ``parameter``, made of zeros where there is none."""
        state: dict[str, Any] = self.state[parameter]
        for name in MOMENTS:
            if name not in state:
                dtype = torch.uint8 if bits == 8 else torch.float32
                state[name] = torch.zeros_like(parameter, dtype=dtype)
            if bits == 8 and SCALES[name] not in state:
                state[SCALES[name]] = parameter.new_zeros(
                    blocks(parameter.numel()), dtype=torch.float32
                )
        state.setdefault("step", 0)
        return state

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.create_state(parameter, group["bits"])
        state["step"] += 1
        kernel = _update_bytes if group["bits"] == 8 else _update_floats
        tensors = {
            name: value.view(-1)
            for name, value in (state | {"grad": gradient.contiguous()}).items()
            if isinstance(value, Tensor)
        }
        weights = parameter.view(-1)
        generator = self._generator(parameter, state["step"]) if self.stochastic else None
        chunk = CHUNK.get(parameter.device.type, CHUNK["cuda"])
        for start in range(0, weights.numel(), chunk):
            stop = min(start + chunk, weights.numel())
            part = {
                name: tensor[start // BLOCK : blocks(stop)]
                if name in SCALES.values()
                else tensor[start:stop]
                for name, tensor in tensors.items()
            }
            weight = weights[start:stop]
            wide = weight.float()  # itself where it is float32
            part["grad"] = part["grad"].float()
            kernel(wide, part, state["step"], group)
            if wide is not weight and generator is not None:
                round_stochastically(wide, weight, generator)
            elif wide is not weight:
                weight.copy_(wide)

    def _generator(self, parameter: Tensor, step: int) -> torch.Generator:
        key = counter_random.key(self.seed, getattr(parameter, "rounding_key", 0), step)
        generator = torch.Generator(parameter.device)
        generator.manual_seed(key % 2**63)
        return generator


def round_stochastically(source: Tensor, target: Tensor, generator: torch.Generator) -> None:
    """Write float32 ``source`` into bfloat16 ``target``, up or down so that the expectation is ``source``; ``source`` is spent.

    What is not finite stays so, and nothing else becomes so.
    """
    noise = torch.randint(
        0, 1 << 16, source.shape, dtype=torch.int32, device=source.device, generator=generator
    )
    noise.masked_fill_(~(source.abs() < torch.finfo(torch.bfloat16).max), 0)
    bits = source.view(torch.int32)
    target.copy_(bits.add_(noise).bitwise_and_(-65536).view(torch.float32))


def encode(moment: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Codes uint8 [n] and scales float32 [`blocks`] of a flat float32 moment."""
    values = _map(signed, moment.device)
    codes, scales = torch.ops.bitsandbytes.quantize_blockwise(moment, values, BLOCK)
    return codes, scales


def decode(codes: Tensor, scales: Tensor, signed: bool) -> Tensor:
    """The float32 moment [n] that flat ``codes`` stand for."""
    values = _map(signed, codes.device)
    moment: Tensor = torch.ops.bitsandbytes.dequantize_blockwise(
        codes, scales, values, BLOCK, torch.float32
    )
    return moment


_MAPS: dict[tuple[bool, torch.device], Tensor] = {}


def _map(signed: bool, device: torch.device) -> Tensor:
    """The 256 values of the dynamic map; the first call makes bitsandbytes' operators known."""
    from bitsandbytes.functional import create_dynamic_map

    key = (signed, device)
    if key not in _MAPS:
        _MAPS[key] = create_dynamic_map(signed=signed).to(device)
    return _MAPS[key]


def _update_bytes(
    weight: Tensor, part: dict[str, Tensor], step: int, group: dict[str, Any]
) -> None:
    (beta1, beta2), device = group["betas"], weight.device
    first, second = MOMENTS
    signed, unsigned = _map(True, device), _map(False, device)
    torch.ops.bitsandbytes.optimizer_update_8bit_blockwise(
        "adam", part["grad"], weight, part[first], part[second],
        beta1, beta2, 0.0, 0.0, group["eps"], step, group["lr"],
        signed, unsigned, part[SCALES[first]], part[SCALES[second]],
        group["weight_decay"], 1.0, False,
    )  # fmt: skip


def _update_floats(
    weight: Tensor, part: dict[str, Tensor], step: int, group: dict[str, Any]
) -> None:
    first, second = MOMENTS
    torch._fused_adamw_(
        [weight], [part["grad"]], [part[first]], [part[second]], [],
        [torch.full((), float(step), device=weight.device)],
        lr=group["lr"], beta1=group["betas"][0], beta2=group["betas"][1],
        weight_decay=group["weight_decay"], eps=group["eps"], amsgrad=False, maximize=False,
    )  # fmt: skip
