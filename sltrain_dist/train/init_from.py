"""--init_from: a run that starts from weights that stand somewhere, instead of random ones.

An engine asks each parameter's spec for the flat range it holds, whatever the layout; here specs are made
to answer from the folder. So all engines, shardings and number formats start alike, master weights
come from what is stored and not from its rounding, and no rank holds more than one whole tensor. The
optimizer, the data and the count of updates start at zero.
"""

import dataclasses
import json
from pathlib import Path

import torch
from torch import Tensor, nn

from sltrain_dist.config import MethodConfig, ModelConfig, TrainConfig
from sltrain_dist.data.tokenizer import Tokenizer
from sltrain_dist.parallel.engine import ModelFactory
from sltrain_dist.parallel.mesh import Mesh, gather_patiently
from sltrain_dist.params import ParameterSpec
from sltrain_dist.params.initial import FROZEN
from sltrain_dist.train.pretrained import Pretrained, open_pretrained
from sltrain_dist.train.summary import say
from sltrain_dist.utils.errors import UserError

_FLAG = "--init_from"
_FREE = ("name", "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id")
# The fields of MethodConfig that say what the weights are, by method; the seed makes the support.
_FIELDS = {
    "full": (),
    "low_rank": ("rank", "alpha", "train_scaling"),
    "sltrain": ("rank", "alpha", "train_scaling", "density", "support", "seed"),
    "slope": ("pattern", "seed"),
}
_FLAGS = {
    "rank": "--rank",
    "alpha": "--lora_alpha",
    "train_scaling": "--train_scaling",
    "density": "--sp_ratio",
    "support": "--support",
    "block_size": "--block_size",
    "seed": "--seed",
    "pattern": "--slope_pattern",
}


class _Stored:
    """First values of all parameters, from open weights; keeps the tensor that was asked for last until forget()."""

    def __init__(self, source: Pretrained) -> None:
        self._source = source
        self._latest: tuple[str, Tensor] | None = None

    def _whole(self, name: str) -> Tensor:
        if self._latest is None or self._latest[0] != name:
            self._latest = None  # before the next one is read
            self._latest = name, self._source.tensor(name).flatten()
        return self._latest[1]

    def forget(self) -> None:
        """Give its memory back; a later question reads the tensor again."""
        self._latest = None

    def flat(
        self, seed: int, name: str, start: int, stop: int, device: torch.device | str = "cpu"
    ) -> Tensor:
        return self._whole(name)[start:stop].to(device, torch.float32)

    def at(self, seed: int, name: str, index: Tensor) -> Tensor:
        return self._whole(name)[index.cpu()].to(index.device, torch.float32)


class Start:
    """A ModelFactory whose models start from stored weights; ``close`` once the engine is built."""

    def __init__(self, factory: ModelFactory, source: Pretrained) -> None:
        self._factory, self._stored = factory, _Stored(source)

    def __call__(self, *, device: torch.device | str, dtype: torch.dtype) -> nn.Module:
        model = self._factory(device=device, dtype=dtype)
        for module in model.modules():
            specs: dict[str, ParameterSpec] = getattr(module, "specs", {})
            for name, spec in specs.items():
                # Indices are our generator's, for the seeds are the same; masks are chosen from the values.
                if spec.kind not in FROZEN:
                    specs[name] = dataclasses.replace(spec, initial=self._stored)
        return model

    def close(self) -> None:
        """Let go of the tensor that was read last: the engine keeps the specs, and they this, to the end."""
        self._stored.forget()


def start_from(
    factory: ModelFactory, config: TrainConfig, mesh: Mesh, tokenizer: Tokenizer
) -> Start:
    """``factory``, whose models start from the weights of ``config.init_from``; collective.

    Checksums are compared on the first rank alone.

    Raises:
        UserError: on all ranks, when any cannot read the folder, or it holds another model, method or
            support than this run has.
    """
    assert config.init_from is not None
    source, problem = None, None
    try:
        source = open_pretrained(config.init_from, _FLAG, verify=mesh.is_first)
        check_start(source, config)
    except UserError as error:
        problem = str(error)
    problems = [text for text in gather_patiently(mesh, problem) if text]
    if problems or source is None:
        raise UserError(problems[0])
    say(mesh, f"starting from the weights of {source.path}")
    theirs = source.tokenizer
    if theirs is not None and theirs.fingerprint != tokenizer.fingerprint:
        folder = source.path.parent if source.kind == "checkpoint" else source.path
        say(
            mesh,
            f"warning: {_FLAG} {source.path}: trained with another tokenizer than this run's; "
            f"--tokenizer {folder} is its own",
        )
    return Start(factory, source)


def check_start(source: Pretrained, config: TrainConfig) -> None:
    """Compare weights with what this run trains.

    Raises:
        UserError: the first difference, naming the flag to change.
    """
    _check_method(source, config.method)
    if not source.generated:
        raise UserError(
            f"{_FLAG} {source.path}: its support was drawn by the reference implementation, and a run draws its own; "
            "convert it by launcher/import_weights.py --method sltrain"
        )
    _check_model(source, config.model)


def _check_method(source: Pretrained, here: MethodConfig) -> None:
    there = source.method
    if there.method != here.method:
        mend = f"give --method {there.method}"
        if there.method == "full" and here.method != "slope":
            mend += f", or convert it by launcher/import_weights.py --method {here.method}"
        raise UserError(
            f"{_FLAG} {source.path}: holds weights of --method {there.method}, this run has --method "
            f"{here.method}; {mend}"
        )
    fields = _FIELDS[here.method]
    if "support" in fields and here.support == "block":
        fields = (*fields, "block_size")
    for name in fields:
        old, new, flag = getattr(there, name), getattr(here, name), _FLAGS[name]
        if old != new:
            what = "its support was drawn with" if name == "seed" else "holds weights of"
            raise UserError(
                f"{_FLAG} {source.path}: {what} {flag} {old}, this run has {flag} {new}; give {flag} {old}"
            )


def _check_model(source: Pretrained, here: ModelConfig) -> None:
    there, ours = (json.loads(json.dumps(dataclasses.asdict(m))) for m in (source.model, here))
    for name in ours:
        if name not in _FREE and there[name] != ours[name]:
            own: Path = source.path / ("model.json" if source.kind == "factored" else "config.json")
            mend = (
                "the --model it was trained with"
                if source.kind == "checkpoint"
                else f"--model {own}"
            )
            raise UserError(
                f"{_FLAG} {source.path}: another model: {name} is {there[name]}, in this run {ours[name]}; give {mend}"
            )
