"""Cut a model over tensor-parallel ranks, in place, before it has memory (DESIGN section 5).

Nothing of the model's code changes: linears, norms, embedding and head are told how to compute with
a part of their parameters. Works on both decoders, but for sequence parallelism on transformers'.
"""

from typing import Any

from sltrain_dist.config import MethodConfig, ModelConfig
from sltrain_dist.model.llama import Embedding, Head, RMSNorm
from sltrain_dist.parallel.linear import Region, cut_dims, cut_parameters, parallelize_linear
from sltrain_dist.parallel.tensor import TensorParallel
from sltrain_dist.parallel.vocabulary import ParallelVocabulary
from sltrain_dist.params import ParameterizedLinear
from sltrain_dist.utils.errors import UserError


def check_tensor_parallel(model: Any, size: int) -> None:
    """Refuse a model that ``size`` ranks cannot share equally; ``model`` is whole, on the meta device.

    Raises:
        UserError: the first size that does not divide, with the sizes that would.
    """
    config: ModelConfig = model.config
    heads, key_heads = config.num_attention_heads, config.num_key_value_heads
    _check_divides(
        size, key_heads, "num_key_value_heads" if key_heads < heads else "num_attention_heads"
    )
    _check_divides(size, config.padded_intermediate_size, "padded intermediate_size")
    _check_divides(size, config.padded_vocab_size, "padded vocab_size")
    for module in model.modules():
        if isinstance(module, ParameterizedLinear):
            _check_linear(module, size, model.method)


def _check_linear(linear: ParameterizedLinear, size: int, method: MethodConfig) -> None:
    if method.method == "sltrain" and method.support == "uniform":
        raise UserError(
            f"--tensor_parallel {size}: --support uniform is one sample of the whole matrix and cannot be cut;"
            " take --support fan_in or block, or --tensor_parallel 1"
        )
    if "b" in linear.specs:
        _check_divides(size, method.rank, "--rank")
    if problem := linear.part_problem(size):
        fits = ", ".join(str(n) for n in range(1, size) if _fits(linear, n))
        raise UserError(
            f"--tensor_parallel {size}: layer {linear.shape.name}: {problem}; sizes that do: {fits}"
        )
    for name, dim in cut_dims(linear).items():
        what = f"layer {linear.shape.name}: dimension {dim} of its {name}"
        _check_divides(size, linear.specs[name].shape[dim], what)


def _fits(linear: ParameterizedLinear, size: int) -> bool:
    shapes = [linear.specs[name].shape[dim] for name, dim in cut_dims(linear).items()]
    return not any(length % size for length in shapes) and not linear.part_problem(size)


def _check_divides(size: int, length: int, what: str) -> None:
    if length % size:
        fits = ", ".join(str(n) for n in range(1, min(length, 64) + 1) if length % n == 0)
        raise UserError(
            f"--tensor_parallel {size}: does not divide {what} = {length}; sizes that do: {fits}"
        )


def parallelize(model: Any, tp: TensorParallel) -> None:
    """Cut ``model`` (a Llama or HFLlama on the meta device) over ``tp``; `check_tensor_parallel` has passed."""
    for block in model.blocks:
        for part in (block.self_attn, block.mlp):
            region = Region(tp)
            part.register_forward_pre_hook(region.enter_hook, with_kwargs=True)
            for module in part.modules():
                if isinstance(module, ParameterizedLinear):
                    parallelize_linear(module, region)
    vocabulary = ParallelVocabulary(tp, model.config.vocab_size)
    for module in model.modules():
        if isinstance(module, Embedding | Head):
            cut_parameters(module, {"weight": 0}, tp)
            module.parallel = vocabulary
        elif isinstance(module, RMSNorm) and tp.sequence:
            module.shared = tp.shared
    model.tie_weights()
