"""`ParameterSpec.fill` writes what `flat` gives, piece by piece, whatever the parameter, cut, range and format."""

import dataclasses

import pytest
import torch

from sltrain_dist.params import ParameterSpec, collect_specs, initial
from sltrain_dist.params.initial import Cut
from tests.model.small import FULL, LOW_RANK, SLTRAIN, small

METHODS = {
    "full": FULL,
    "low_rank": LOW_RANK,
    "fan_in": SLTRAIN,
    "uniform": dataclasses.replace(SLTRAIN, support="uniform"),
}


def specs(method: str) -> dict[str, ParameterSpec]:
    """One of each kind: of a model with a padded vocabulary and MLP."""
    from sltrain_dist.model.llama import Llama

    config = small(num_hidden_layers=1, vocab_size=201, intermediate_size=107)
    return collect_specs(Llama(config, METHODS[method]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("method", METHODS)
def test_fill_equals_flat(method: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(initial, "_FILLED", 1000)
    for name, spec in specs(method).items():
        cuts = [None]
        if len(spec.shape) == 2:
            cuts += [Cut(dim, 1, 2) for dim in (0, 1)]
        for cut in cuts:
            held = dataclasses.replace(spec, cut=cut)
            count = torch.Size(held.local_shape).numel()
            for start, stop in ((0, count), (count // 3, count - 1), (count, count)):
                wanted = held.flat(7, name, start, stop)
                wanted = wanted.to(dtype) if wanted.is_floating_point() else wanted
                found = torch.empty(stop - start, dtype=wanted.dtype)
                held.fill(found, 7, name, start)
                assert torch.equal(found, wanted), (name, cut, start)


def test_fill_takes_a_tensor_of_any_shape() -> None:
    name, spec = next(iter(specs("full").items()))
    found = torch.empty(spec.shape)
    spec.fill(found, 7, name, 0)
    assert torch.equal(found.flatten(), spec.flat(7, name, 0, found.numel()))


def test_a_matrix_that_starts_at_zero_is_not_drawn() -> None:
    spec = next(s for n, s in specs("fan_in").items() if n.endswith("q_proj.b"))
    assert torch.equal(spec.flat(7, "b", 3, 9), torch.zeros(6))
