"""The parameters of method slope: its start, what it costs, which layers it prunes, what it refuses."""

from dataclasses import replace

import pytest
import torch

from sltrain_dist.config import MethodConfig, ModelConfig
from sltrain_dist.model.llama import Llama
from sltrain_dist.ops.pattern import Pattern, are_largest, unpack
from sltrain_dist.ops.pruned import compose
from sltrain_dist.params import Cut, collect_specs, count_parameters, make_linear
from sltrain_dist.params.slope import Slope, check_patterns, layer_pattern, parse_patterns
from sltrain_dist.utils.errors import UserError
from tests.params.test_linears import build

METHOD = MethodConfig(method="slope", seed=42)


def test_rows_begin_with_a_byte_of_their_own():
    """As in llama_71m, whose MLP is 1368 wide: 684 values, 171 bytes of positions, 85.5 of the mask."""
    layer, dense = (build(8, 24, method=method) for method in ("slope", "full"))
    assert layer.offsets.shape == (8, 3)
    assert layer.backward.shape == (8, 2)
    pattern = Pattern(2, 4)
    w = compose(layer.values.detach(), layer.offsets, pattern)
    assert torch.equal(w, dense.weight * are_largest(dense.weight.detach().abs(), pattern))
    layer, dense = (build(8, 20, method=method, pattern="1:4") for method in ("slope", "full"))
    assert layer.offsets.shape == (8, 2)
    w = compose(layer.values.detach(), layer.offsets, Pattern(1, 4))
    assert torch.equal(w, dense.weight * are_largest(dense.weight.detach().abs(), Pattern(1, 4)))


@pytest.mark.parametrize("text", ["2:4", "1:2", "2:8", "1:4"])
def test_starts_as_the_dense_weight_pruned(text):
    """At the largest of every group, the weight that method full has under the same seed and name."""
    layer, dense = (
        build(64, 96, method=method, pattern=text, logical_out=60, logical_in=93)
        for method in ("slope", "full")
    )
    pattern = Pattern.parse(text)
    keeps = are_largest(dense.weight.detach().abs(), pattern)
    w = compose(layer.values.detach(), layer.offsets, pattern)
    assert torch.equal(w, dense.weight.detach() * keeps)
    assert layer.specs["values"].logical_numel == int((layer.values != 0).sum())
    assert bool(
        (unpack(layer.backward, 1, layer.values.shape[1]) == 1).all()
    )  # until an engine chooses


@pytest.mark.parametrize("name", ["values", "offsets", "backward"])
@pytest.mark.parametrize("dim", [0, 1])
def test_every_part_is_what_the_whole_has_there(name, dim):
    """Any range of the flattened tensor, and the parts of tensor-parallel ranks, without the rest."""
    spec = build(64, 96, method="slope", logical_in=90).specs[name]
    count = torch.Size(spec.shape).numel()
    whole = spec.flat(42, f"layer.{name}", 0, count)
    assert torch.equal(spec.flat(42, f"layer.{name}", 37, count - 5), whole[37:-5])
    for index in range(2):
        cut = replace(spec, cut=Cut(dim, index, 2))
        part = whole.view(spec.shape).chunk(2, dim)[index]
        out = torch.empty(part.shape, dtype=whole.dtype)
        cut.fill(out, 42, f"layer.{name}", 0)
        assert torch.equal(out, part)


def test_stored_bytes():
    """Values, positions and second mask of 2:4 are at most 0.6 of dense bfloat16; 8-bit or not, moments are of half the weights."""
    with torch.device("meta"):
        layer = make_linear("layer", 4096, 4096, method=METHOD, dtype=torch.bfloat16)
    stored = sum(p.numel() * p.element_size() for p in layer.parameters())
    assert stored <= 0.60 * 2 * 4096 * 4096
    assert [p is layer.values for p in layer.parameters() if p.requires_grad] == [True]
    assert layer.values.numel() * 2 == 4096 * 4096
    assert count_parameters(layer) == {
        "total": 2**23,
        "low_rank": 0,
        "sparse": 2**23,
        "dense": 0,
        "indices_bytes": 2**23 // 4 + 2**23 // 8,
    }


def test_long_and_thin_matrices_stay_dense():
    kinds = {
        out: type(make_linear("layer", out, 64, method=METHOD)).__name__ for out in (64, 320, 336)
    }
    assert kinds == {64: "Slope", 320: "Slope", 336: "Dense"}
    assert type(make_linear("layer", 16, 96, method=METHOD)).__name__ == "Dense"


def test_patterns_of_ranges_of_layers():
    text = "2:4,1-2=2:8,2=1:2"
    assert [str(layer_pattern(text, n)) for n in (None, 0, 1, 2, 3)] == ["2:4", "2:4", "2:8", "1:2", "2:4"]  # fmt: skip
    check_patterns(text, 3)
    with pytest.raises(
        UserError,
        match=r"--slope_pattern .*: 2:8 is for layers up to 2, and the model's are 0 to 1",
    ):
        check_patterns(text, 2)
    model = ModelConfig("tiny", 256, 64, 96, 3, 4, 4, 16)
    layers = Llama(model, replace(METHOD, pattern=text)).blocks
    found = [{str(m.pattern) for m in block.modules() if isinstance(m, Slope)} for block in layers]
    assert found == [{"2:4"}, {"2:8"}, {"1:2"}]


@pytest.mark.parametrize(
    "text", ["", "2", "4:2", "0:4", "2:4,8", "2:4,8=", "2:4,9-8=2:8", "2:4,a-b=2:8", "1-2=2:4"]
)
def test_malformed_patterns_are_one_line(text):
    with pytest.raises(UserError, match=r"^--slope_pattern .*: give N:M") as caught:
        parse_patterns(text)
    assert "\n" not in str(caught.value)


def test_sizes_that_do_not_fit_name_the_layer():
    with pytest.raises(
        UserError, match=r"layer up is 64 x 70, and 2:4 needs inputs in whole groups of 4"
    ):
        make_linear("up", 64, 70, method=METHOD)
    with pytest.raises(
        UserError, match=r"layer up is 66 x 64, and 2:4 needs outputs in whole groups"
    ):
        make_linear("up", 66, 64, method=METHOD)


@pytest.mark.parametrize("name", ModelConfig.presets())
def test_presets_can_be_pruned(name):
    model = Llama(ModelConfig.load(name), METHOD)
    specs = collect_specs(model)
    linears = [m for block in model.blocks for m in block.modules() if isinstance(m, Slope)]
    assert len(linears) == 7 * len(model.blocks)
    assert sum(spec.kind == "mask" for spec in specs.values()) == len(linears)
