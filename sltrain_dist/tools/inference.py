"""What generation and evaluation share: where a model runs, in which format, by which path, with which tokenizer."""

import torch
from torch import nn

from sltrain_dist.config import ModelConfig
from sltrain_dist.data.tokenizer import Tokenizer, check_vocabulary, load_tokenizer
from sltrain_dist.params import paths
from sltrain_dist.tools.weights import Pretrained
from sltrain_dist.train.flags import DTYPES
from sltrain_dist.utils.errors import UserError


def choose_device(name: str | None) -> torch.device:
    """The device of --device; None: CUDA where there is any.

    Raises:
        UserError: no such device, or none that models run on.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: unknown; give cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: models run on cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"--device {name}: this machine shows {torch.cuda.device_count()} GPUs; give cpu"
        )
    return device


def choose_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """The number format of --dtype; None: bfloat16 on CUDA, else float32.

    Raises:
        UserError: an unknown format.
    """
    if name is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in DTYPES:
        raise UserError(f"--dtype {name}: unknown; give one of {', '.join(DTYPES)}")
    dtype: torch.dtype = getattr(torch, DTYPES[name])
    return dtype


def merged_flag(merged: bool, factored: bool) -> bool | None:
    """--merged as True, --factored as False, neither as None.

    Raises:
        UserError: both.
    """
    if merged and factored:
        raise UserError("--merged: contradicts --factored; drop one of them")
    return True if merged else False if factored else None


def check_merged(merged: bool | None, pretrained: Pretrained) -> bool:
    """Whether linears are merged into dense W before use; None: no, factored weights stay factored.

    Raises:
        UserError: --factored for a model without factors.
    """
    if merged is False and pretrained.method.method == "full":
        raise UserError(
            f"--factored: the linears of {pretrained.path} are dense already; leave it out"
        )
    return bool(merged) and pretrained.method.method != "full"


def choose_tokenizer(name: str | None, pretrained: Pretrained) -> Tokenizer:
    """The tokenizer of --tokenizer; None: the model's own.

    Raises:
        UserError: there is none, it cannot be read, or it has more tokens than the model.
    """
    tokenizer = pretrained.tokenizer if name is None else load_tokenizer(name)
    if tokenizer is None:
        raise UserError(
            f"--tokenizer is not given, and {pretrained.flag} {pretrained.path} has none beside it; "
            "add --tokenizer FOLDER with the one it was trained with"
        )
    check_vocabulary(tokenizer, name or str(pretrained.path), pretrained.model.vocab_size)
    return tokenizer


def check_length(length: int, model: ModelConfig) -> None:
    """Raise UserError where samples of ``length`` tokens are longer than the model."""
    if length > model.max_position_embeddings:
        raise UserError(
            f"--max_length {length}: the model has {model.max_position_embeddings} positions "
            "(max_position_embeddings)"
        )


def choose_paths(model: nn.Module, tokens: int) -> None:
    """Give every SLTrain linear the path that is faster for ``tokens`` at once, without timing any.

    A few tokens always go factorized: composed, each would pay for building W, 2 r out in operations,
    where reading the factors is enough.
    """
    for linear in paths.linears(model):
        device, dtype = linear.values.device, linear.values.dtype
        situation = paths.Situation(device, dtype, tokens)
        few = tokens <= linear.method.rank
        linear.path = "factorized" if few else paths.settled(paths.key_of(linear), situation)
