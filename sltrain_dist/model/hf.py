"""transformers' LlamaForCausalLM as the model (--use_hf_model): its forward code, our parameters.

Every module that owns parameters is replaced by ours, so that initial values, supports, names and
sharding are the same whichever code runs; what remains of transformers is how they are called.
"""

from typing import Any

import torch
from torch import Tensor, nn

from sltrain_dist.config import MethodConfig, ModelConfig
from sltrain_dist.model.backends import NORM
from sltrain_dist.model.llama import Embedding, Head, RMSNorm
from sltrain_dist.model.rope import cos_sin, validate_rope
from sltrain_dist.params import make_linear


class _Rotary(nn.Module):
    """Cosines and sines without a buffer, which meta initialisation would lose."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """[1, T, Dh] twice, for positions 0 .. T-1."""
        cos, sin = cos_sin(self.config, position_ids.shape[-1], x.device, x.dtype)
        return cos.transpose(0, 1), sin.transpose(0, 1)


class HFLlama(nn.Module):
    """The same contract as `model.llama.Llama`, computed by transformers' decoder."""

    def __init__(
        self,
        config: ModelConfig,
        method: MethodConfig,
        *,
        checkpointing: str = "none",
        device: torch.device | str = "meta",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        from transformers import LlamaForCausalLM

        validate_rope(config)
        device = torch.device(device)
        with torch.device("meta"):
            theirs: Any = LlamaForCausalLM(_hf_config(config))
        norm = (config.hidden_size, config.rms_norm_eps, NORM["torch"], device, dtype)
        for index, block in enumerate(theirs.model.layers):
            _replace_linears(block, f"model.layers.{index}", config, method, device, dtype)
            block.input_layernorm = RMSNorm(*norm)
            block.post_attention_layernorm = RMSNorm(*norm)
        theirs.model.embed_tokens = Embedding(config, device, dtype)
        theirs.model.norm = RMSNorm(*norm)
        theirs.model.rotary_emb = _Rotary(config)
        if checkpointing == "block":
            theirs.gradient_checkpointing_enable({"use_reentrant": False})
        self.config = config
        self.method = method
        self.model = theirs.model
        self.lm_head = Head(config, device, dtype)
        self.tie_weights()

    @property
    def blocks(self) -> nn.ModuleList:
        """Decoder blocks in order."""
        layers: nn.ModuleList = self.model.layers
        return layers

    def tie_weights(self) -> None:
        """See `Llama.tie_weights`."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, tokens: Tensor, labels: Tensor | None = None) -> Tensor:
        """See `Llama.forward`."""
        hidden = self.model(input_ids=tokens, use_cache=False).last_hidden_state
        out: Tensor = self.lm_head(hidden, labels)
        return out


def _hf_config(config: ModelConfig) -> Any:
    from transformers import LlamaConfig

    make: Any = LlamaConfig
    return make(
        vocab_size=config.padded_vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.padded_intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_position_embeddings,
        rms_norm_eps=config.rms_norm_eps,
        attention_bias=config.attention_bias,
        mlp_bias=config.mlp_bias,
        attn_implementation="sdpa",
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )


def _replace_linears(
    block: nn.Module,
    name: str,
    config: ModelConfig,
    method: MethodConfig,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Put ours in place of every nn.Linear of a decoder block, by the same rules as `Llama`."""
    ff, padded = config.intermediate_size, config.padded_intermediate_size
    linears = [(path, m) for path, m in block.named_modules() if isinstance(m, nn.Linear)]
    for path, linear in linears:
        parent, _, leaf = path.rpartition(".")
        ours = make_linear(
            f"{name}.{path}",
            linear.out_features,
            linear.in_features,
            method=method,
            bias=linear.bias is not None,
            parallel="row" if leaf in ("o_proj", "down_proj") else "column",
            logical_out=ff if linear.out_features == padded and parent == "mlp" else None,
            logical_in=ff if linear.in_features == padded and parent == "mlp" else None,
            initializer_range=config.initializer_range,
            device=device,
            dtype=dtype,
        )
        setattr(block.get_submodule(parent), leaf, ours)
