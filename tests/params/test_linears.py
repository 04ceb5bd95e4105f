"""Every parameterization of the table: shapes, initial values, padding, counts, errors."""

import math

import pytest
import torch

from sltrain_dist.config import MethodConfig
from sltrain_dist.params import (
    PARAMETERIZATIONS,
    collect_specs,
    count_parameters,
    make_linear,
)
from sltrain_dist.utils.errors import UserError


def build(out=64, in_=96, name="layer", **options):
    """A linear on the CPU with all of its parameters filled from their specs."""
    keys = ("bias", "parallel", "logical_out", "logical_in", "dtype")
    shape = {key: options.pop(key) for key in keys if key in options}
    method = MethodConfig(**{"rank": 8, "density": 0.125, "block_size": 4, **options})
    layer = make_linear(name, out, in_, method=method, device="cpu", **shape)
    fill(layer, name, method.seed)
    return layer


def fill(layer, name, seed):
    for key, parameter in layer.named_parameters():
        flat = layer.specs[key].initial.flat(seed, f"{name}.{key}", 0, parameter.numel())
        parameter.data.copy_(flat.view(parameter.shape))


@pytest.mark.parametrize("method", PARAMETERIZATIONS)
def test_forward_equals_its_weight(method):
    """Whatever the parameterization, it is linear: y = x W^T with W read off the identity."""
    layer = build(method=method, bias=True, dtype=torch.float64)
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.is_floating_point():
                parameter.normal_()
    x = torch.randn(2, 5, 96, dtype=torch.float64)
    weight = (layer(torch.eye(96, dtype=torch.float64)) - layer.bias).t()
    torch.testing.assert_close(layer(x), x @ weight.t() + layer.bias)


@pytest.mark.parametrize("method", PARAMETERIZATIONS)
def test_initial_values_by_range(method):
    layer = build(method=method)
    for key, parameter in layer.named_parameters():
        initial = layer.specs[key].initial
        start, stop = parameter.numel() // 3, parameter.numel() // 2
        part = initial.flat(42, f"layer.{key}", start, stop)
        assert torch.equal(part, parameter.detach().view(-1)[start:stop].to(part.dtype))


@torch.no_grad()
def test_initial_distributions():
    """SLTrain's start: B zero, A kaiming-uniform(a=sqrt 5), values uniform(+-1/sqrt(in))."""
    layer = build(512, 384, rank=64)
    assert not layer.b.any()
    for parameter in (layer.a, layer.values):
        bound = 1 / math.sqrt(384)
        assert parameter.abs().max() <= bound
        assert parameter.std() == pytest.approx(bound / math.sqrt(3), rel=0.02)
        assert parameter.mean().abs() < 0.03 * bound
    dense = build(512, 384, method="full").weight
    assert dense.std() == pytest.approx(0.02, rel=0.02)
    low = build(512, 384, rank=64, method="low_rank")
    product = low.method.scale * low.b @ low.a
    assert product.std() == pytest.approx(0.02, rel=0.05), "B zero would be a dead point"
    assert not torch.equal(build(name="one").a, build(name="two").a)


@pytest.mark.parametrize("support", ["fan_in", "uniform", "block"])
@pytest.mark.parametrize("method", PARAMETERIZATIONS)
def test_padding_is_zero_and_not_counted(method, support):
    layer = build(method=method, support=support, logical_out=60, logical_in=90)
    with torch.no_grad():
        if method == "sltrain":
            layer.b[:60].normal_()
    weight = layer(torch.eye(96)).t()
    assert weight[:60, :90].any()
    assert not weight[60:].any()
    assert not weight[:, 90:].any()
    counts = count_parameters(layer)
    assert counts["total"] == counts["dense"] + counts["low_rank"] + counts["sparse"]
    if method == "full":
        assert counts["dense"] == 60 * 90
    elif method == "slope":
        assert counts["sparse"] == counts["total"] == int((layer.values != 0).sum()) == 60 * 46
    else:
        assert counts["low_rank"] == 8 * (60 + 90)
    if method == "sltrain":
        assert counts["sparse"] == int((layer.values != 0).sum())
        assert counts["indices_bytes"] == layer.offsets.numel() * layer.offsets.element_size()


def test_offsets_are_frozen_parameters():
    layer = build()
    assert not layer.offsets.requires_grad
    assert "offsets" in dict(layer.named_parameters())
    assert [p for p in layer.parameters() if p.requires_grad] == [layer.b, layer.a, layer.values]


def test_trained_scale():
    layer = build(train_scaling=True, alpha=5.0)
    torch.nn.init.normal_(layer.b)
    x = torch.randn(3, 96)
    plain = layer(x)
    torch.nn.init.zeros_(layer.b)
    sparse = layer(x)
    torch.nn.init.normal_(layer.b)
    with torch.no_grad():
        layer.scaling.zero_()
    torch.testing.assert_close(layer(x), sparse)
    assert layer.scaling.shape == (1,)
    assert not torch.allclose(plain, sparse)


@pytest.mark.parametrize("method", ["sltrain", "low_rank"])
def test_dropout_acts_on_the_low_rank_input(method):
    layer = build(method=method, dropout=0.5)
    torch.nn.init.normal_(layer.b)
    x = torch.randn(400, 96)
    layer.eval()
    exact = layer(x)
    torch.testing.assert_close(layer(x), exact)
    layer.train()
    mean = torch.stack([layer(x) for _ in range(200)]).mean(0)
    assert not torch.allclose(layer(x), exact, atol=1e-3)
    assert (mean - exact).norm() < 0.15 * exact.norm()
    torch.nn.init.zeros_(layer.b)
    torch.testing.assert_close(layer(x), layer.eval()(x), msg="S must not see the dropout")


def test_missing_spec_is_an_error():
    layer = build()
    layer.extra = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(KeyError, match="extra"):
        collect_specs(layer)


def test_rank_must_fit():
    for rank in (0, 65):
        with pytest.raises(UserError, match=rf"--rank {rank}: layer layer is 64 x 96"):
            build(rank=rank)


def test_density_error_names_the_layer():
    with pytest.raises(UserError, match=r"nearest density.*layer up"):
        build(density=0.0001, name="up")
