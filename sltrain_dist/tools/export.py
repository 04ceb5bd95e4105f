"""Write weights for others to load: a dense LLaMA folder of transformers, or a small factored one of ours.

hf         W = s * B A + S (slope's with its zeros) of every linear in float32, padding cut away, under HF's names
factored   the parameters as they are (B, A, values, offsets, slope's second mask, dense rest), sealed by checksums
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sltrain_dist.config import Dtype, ModelConfig
from sltrain_dist.data.tokenizer import Tokenizer
from sltrain_dist.params.initial import FROZEN
from sltrain_dist.params.parameterized import ParameterizedLinear
from sltrain_dist.tools.output import blank, new_folder, write_json, write_tensors
from sltrain_dist.tools.weights import Pretrained, merge, parameterized
from sltrain_dist.train.parameter_names import blank_specs, logical_shape
from sltrain_dist.train.pretrained import CONFIG, FACTORED, file_records, seal

SHARD_SIZE = "5GB"
MODEL = "model.json"  # the architecture in HF's format, for --model; no config.json, which would load as dense


@dataclass(frozen=True)
class Exported:
    """What was written: trained elements without padding, bytes of tensors, density of S, files."""

    folder: Path
    parameters: int
    bytes: int
    density: float | None
    shards: int

    def lines(self) -> list[str]:
        """The summary, for people."""
        density = [] if self.density is None else [f"density     {self.density:.4f} of S"]
        return [
            f"parameters  {self.parameters:,}",
            f"bytes       {self.bytes:,} in {self.shards} file{'s' if self.shards > 1 else ''}",
            *density,
            f"path        {self.folder}",
        ]


def export_hf(
    pretrained: Pretrained,
    output: Path,
    dtype: Dtype = "float32",
    max_shard_size: str = SHARD_SIZE,
) -> Exported:
    """A folder that `transformers.AutoModelForCausalLM` loads: dense, without padding.

    Memory: one shard, and one linear in float32.

    Raises:
        UserError: the folder stands already, cannot be written, or a tensor cannot be read.
    """
    dense, model = merge(pretrained), pretrained.model
    shapes = {name: logical_shape(name, shape, model) for name, shape in dense.shapes.items()}
    like = {name: blank(shape, getattr(torch, dtype)) for name, shape in shapes.items()}

    def read(name: str) -> Tensor:
        return dense.tensor(name)[tuple(slice(0, size) for size in shapes[name])]

    config, generation = hf_config(model, pretrained.tokenizer, dtype)
    with new_folder(output) as folder:
        if pretrained.tokenizer is not None:
            pretrained.tokenizer.save(folder)
        write_json(folder / CONFIG, config)
        write_json(folder / "generation_config.json", generation)
        written = write_tensors(folder, like, read, max_shard_size)
    parameters = sum(math.prod(shape) for shape in shapes.values())
    return Exported(output, parameters, written.bytes, density(pretrained), written.shards)


def export_factored(
    pretrained: Pretrained,
    output: Path,
    dtype: Dtype = "float32",
    max_shard_size: str = SHARD_SIZE,
) -> Exported:
    """A folder that `open_pretrained` knows: physical parameters and offsets, tokenizer, configuration.

    Raises:
        UserError: as ``export_hf``.
    """
    specs = blank_specs(pretrained.model, pretrained.method)
    frozen = {name for name, spec in specs.items() if spec.kind in FROZEN}
    modules = parameterized(pretrained)
    like = {
        name: blank(
            shape, integer_dtype(modules, name) if name in frozen else getattr(torch, dtype)
        )
        for name, shape in pretrained.shapes.items()
    }
    with new_folder(output) as folder:
        if pretrained.tokenizer is not None:
            pretrained.tokenizer.save(folder)
        write_json(folder / MODEL, hf_config(pretrained.model, pretrained.tokenizer, dtype)[0])
        written = write_tensors(folder, like, pretrained.tensor, max_shard_size)
        document: dict[str, Any] = {
            "format": FACTORED,
            "model": dataclasses.asdict(pretrained.model),
            "method": dataclasses.asdict(pretrained.method),
            "generated": pretrained.generated,
            "support_hash": f"{pretrained.support_hash:016x}",
            "files": file_records(folder),
        }
        write_json(folder / CONFIG, {**document, "seal": seal(document)})
    parameters = sum(spec.logical_numel for name, spec in specs.items() if name not in frozen)
    return Exported(output, parameters, written.bytes, density(pretrained), written.shards)


EXPORTS: dict[str, Callable[[Pretrained, Path, Dtype, str], Exported]] = {
    "hf": export_hf,
    "factored": export_factored,
}


def integer_dtype(modules: dict[str, ParameterizedLinear], name: str) -> torch.dtype:
    """The integer format of one layer's offsets or mask."""
    owner, _, leaf = name.rpartition(".")
    return modules[owner].get_parameter(leaf).dtype


def density(pretrained: Pretrained) -> float | None:
    """Entries of S over entries of the matrices, padding in neither; None without S, which slope's values are not."""
    if pretrained.method.method != "sltrain":
        return None
    specs = blank_specs(pretrained.model, pretrained.method)
    entries = area = 0
    for name, linear in parameterized(pretrained).items():
        values = f"{name}.values"
        entries += (
            specs[values].logical_numel
            if pretrained.generated
            else math.prod(pretrained.shapes[values])
        )
        area += linear.shape.logical_out * linear.shape.logical_in
    return entries / area


def hf_config(
    model: ModelConfig, tokenizer: Tokenizer | None, dtype: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The config.json of transformers' LLaMA and its generation_config.json.

    Rope settings stand under their names of transformers 4 (rope_theta, rope_scaling), which 5 reads
    too. Token ids are the tokenizer's where its end of text is not the configuration's.
    """
    tokens = {
        "bos_token_id": model.bos_token_id,
        "eos_token_id": model.eos_token_id,
        "pad_token_id": model.pad_token_id,
    }
    if tokenizer is not None and tokenizer.eos_id != model.eos_token_id:
        tokens = {
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_id,
            "pad_token_id": tokenizer.pad_id,
        }
    copied = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "rope_theta",
        "rope_scaling", "tie_word_embeddings", "attention_bias", "mlp_bias", "initializer_range",
    )  # fmt: skip
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        **{name: getattr(model, name) for name in copied},
        **tokens,
        "torch_dtype": dtype,
    }
    return config, {name: index for name, index in tokens.items() if index is not None}
