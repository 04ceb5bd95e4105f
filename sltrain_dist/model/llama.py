"""The LLaMA decoder: pure model code, no process groups, no engine, no initial values.

Parameters are created empty (on the meta device by default) and carry a ``specs`` entry from which
an engine fills its own shard. Names are exactly those of HF's LlamaForCausalLM, whatever the
linears are made of (``...q_proj.weight``, or ``...q_proj.b``, ``.a``, ``.values``, ``.offsets``).

    tokens [B, T] -> embed_tokens -> blocks x L -> norm -> lm_head -> sum of token losses, or logits
    block:  x + o(attention(rotate(q(n)), rotate(k(n)), v(n))),  n = input_layernorm(x)
            x + down(silu(gate(n)) * up(n)),                      n = post_attention_layernorm(x)

Shapes: B batch, T tokens, D model width, F MLP width (padded), H heads, K key/value heads,
Dh width of a head, V vocabulary, P padded vocabulary.
"""

import contextlib
from collections.abc import Callable
from functools import partial
from typing import get_args

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from sltrain_dist.config import Checkpointing, MethodConfig, ModelConfig
from sltrain_dist.model.backends import ATTENTION, NORM, AttentionFunction, NormFunction
from sltrain_dist.model.cache import KeyValueCache, LayerCache
from sltrain_dist.model.offload import HostStore
from sltrain_dist.model.recompute import forget
from sltrain_dist.model.rope import cos_sin, rotate, same_angles, validate_rope
from sltrain_dist.ops.cross_entropy import linear_cross_entropy
from sltrain_dist.ops.pointwise import swiglu
from sltrain_dist.parallel.vocabulary import ParallelVocabulary
from sltrain_dist.params import ParameterSpec, constant_spec, make_linear, matrix_spec

# (full name, out, in, parallel=, bias=, logical_out=, logical_in=) -> module: ``make_linear`` with
# the method, spread, device and dtype of the model filled in
LinearFactory = Callable[..., nn.Module]


class Embedding(nn.Module):
    """Token embedding with padded rows: tokens [B, T] -> [B, T, D]."""

    parallel: ParallelVocabulary | None = None  # set under tensor parallelism

    def __init__(self, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight, self.specs = _vocabulary_matrix(config, device, dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        """``tokens`` int64 in [0, V)."""
        if self.parallel is not None:
            return self.parallel.embed(tokens, self.weight)
        return functional.embedding(tokens, self.weight)


class Head(nn.Module):
    """Output projection and loss in one module, so that an engine's gather hooks cover both."""

    parallel: ParallelVocabulary | None = None  # set under tensor parallelism

    def __init__(self, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.vocab_size = config.vocab_size
        self.weight, self.specs = _vocabulary_matrix(config, device, dtype)

    def forward(self, hidden: Tensor, labels: Tensor | None = None) -> Tensor:
        """Hidden [B, T, D]; without ``labels`` logits [B, T, V], else the summed loss (fp32 scalar)."""
        if self.parallel is not None:
            if labels is None:
                return self.parallel.logits(hidden, self.weight)
            return self.parallel.loss(hidden, self.weight, labels)
        if labels is None:
            return functional.linear(hidden, self.weight)[..., : self.vocab_size]
        flat = hidden.reshape(-1, hidden.shape[-1])
        return linear_cross_entropy(flat, self.weight, labels.reshape(-1), self.vocab_size)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension (arXiv 1910.07467), statistics in float32."""

    # set under sequence parallelism, where each rank's gradient of the weight is a part of the sum
    shared: Callable[[Tensor], Tensor] | None = None

    def __init__(
        self,
        width: int,
        eps: float,
        function: NormFunction,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.function = function
        self.weight = nn.Parameter(torch.empty(width, device=device, dtype=dtype))
        self.specs = {"weight": constant_spec(1.0, (width,))}

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight if self.shared is None else self.shared(self.weight)
        return self.function(x, weight, self.eps)


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads and rotary positions."""

    def __init__(
        self, name: str, config: ModelConfig, linear: LinearFactory, attention: AttentionFunction
    ) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.attention = attention
        hidden, bias = config.hidden_size, config.attention_bias
        query = config.num_attention_heads * config.head_dim
        key = config.num_key_value_heads * config.head_dim
        column = partial(linear, bias=bias, parallel="column")
        self.q_proj = column(f"{name}.q_proj", query, hidden)
        self.k_proj = column(f"{name}.k_proj", key, hidden)
        self.v_proj = column(f"{name}.v_proj", key, hidden)
        self.o_proj = linear(f"{name}.o_proj", hidden, query, bias=bias, parallel="row")

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, cache: LayerCache | None = None
    ) -> Tensor:
        """x [B, T, D], cos and sin [T, 1, Dh] -> [B, T, D]; positions in ``cache`` come before x's."""
        heads = (*x.shape[:-1], -1, self.head_dim)
        q = rotate(self.q_proj(x).view(heads), cos, sin)
        k = rotate(self.k_proj(x).view(heads), cos, sin)
        v = self.v_proj(x).view(heads)
        if cache is not None:
            k, v = cache.append(k, v)
        mixed = self.attention(q, k, v)
        out: Tensor = self.o_proj(mixed.flatten(-2))
        return out


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)). Padded columns of F stay exactly zero: silu(0) * 0."""

    selective = False  # forget the product between forward and backward

    def __init__(self, name: str, config: ModelConfig, linear: LinearFactory) -> None:
        super().__init__()
        hidden, bias = config.hidden_size, config.mlp_bias
        padded, logical = config.padded_intermediate_size, config.intermediate_size
        column = partial(linear, bias=bias, parallel="column", logical_out=logical)
        self.gate_proj = column(f"{name}.gate_proj", padded, hidden)
        self.up_proj = column(f"{name}.up_proj", padded, hidden)
        self.down_proj = linear(
            f"{name}.down_proj", hidden, padded, bias=bias, parallel="row", logical_in=logical
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        gate, up = self.gate_proj(x), self.up_proj(x)
        product = swiglu(gate, up)
        out: Tensor = self.down_proj(product)
        if self.selective:
            forget(product, partial(swiglu, gate, up), until=out)
        return out


class Block(nn.Module):
    """One decoder layer; the unit that FSDP2 shards and activation checkpointing recomputes.

    ``name`` is its place in the parameter tree: it keys supports and initial values.
    selective: forget what is cheap to compute between forward and backward (model.recompute).
    """

    def __init__(
        self,
        name: str,
        config: ModelConfig,
        linear: LinearFactory,
        attention: AttentionFunction,
        norm: Callable[[], RMSNorm],
        selective: bool = False,
    ) -> None:
        super().__init__()
        self.self_attn = Attention(f"{name}.self_attn", config, linear, attention)
        self.mlp = MLP(f"{name}.mlp", config, linear)
        self.selective = self.mlp.selective = selective
        self.input_layernorm = norm()
        self.post_attention_layernorm = norm()

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, cache: LayerCache | None = None
    ) -> Tensor:
        """x [B, T, D], cos and sin [T, 1, Dh] -> [B, T, D]."""
        normal = self.input_layernorm(x)
        mixed = self.self_attn(normal, cos, sin, cache)
        if self.selective:
            forget(normal, partial(self.input_layernorm, x), until=mixed)
        x = x + mixed
        normal = self.post_attention_layernorm(x)
        out: Tensor = self.mlp(normal)
        if self.selective:
            forget(normal, partial(self.post_attention_layernorm, x), until=out)
        return x + out


class Decoder(nn.Module):
    """Embedding, blocks and final norm: tokens [B, T] -> hidden states [B, T, D]."""

    def __init__(
        self,
        config: ModelConfig,
        method: MethodConfig,
        attention: AttentionFunction,
        norm_function: NormFunction,
        checkpointing: Checkpointing,
        offload: bool,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.config = config
        self.checkpointing = checkpointing
        self.offload = offload
        norm = partial(
            RMSNorm, config.hidden_size, config.rms_norm_eps, norm_function, device, dtype
        )
        linear = partial(
            make_linear,
            method=method,
            initializer_range=config.initializer_range,
            device=device,
            dtype=dtype,
        )
        self.embed_tokens = Embedding(config, device, dtype)
        self.layers = nn.ModuleList(
            Block(
                f"model.layers.{index}",
                config,
                linear,
                attention,
                norm,
                checkpointing == "selective",
            )
            for index in range(config.num_hidden_layers)
        )
        self.norm = norm()

    def forward(self, tokens: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """``tokens`` int64 [B, T]; positions are 0 .. T-1, or follow those in ``cache``, which takes them up.

        Raises:
            ValueError: more positions than the cache has, or they change the angles of those it holds.
        """
        x = self.embed_tokens(tokens)
        start = 0 if cache is None else cache.length
        length = start + tokens.shape[1]
        if start and not same_angles(self.config, start, length):
            raise ValueError(
                f"keys of {start} positions cannot serve {length}: the rope scaling changes"
            )
        cos, sin = cos_sin(self.config, length, tokens.device, x.dtype, start)
        if cache is not None:
            for block, layer in zip(self.layers, cache.layers, strict=True):
                x = block(x, cos, sin, layer)
        else:
            x = self._blocks(x, cos, sin)
        hidden: Tensor = self.norm(x)
        return hidden

    def _blocks(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """All blocks, and what of them is kept for backward; without wrapper modules, which would rename parameters."""
        trained = torch.is_grad_enabled()
        recompute = self.checkpointing == "block" and trained
        store = HostStore(x.device) if self.offload and trained else None
        for block in self.layers:
            # recomputed blocks keep their input alone, and no parameters
            kept = store.block(None if recompute else block) if store else contextlib.nullcontext()
            with kept:
                if recompute:
                    x = checkpoint(block, x, cos, sin, use_reentrant=False)
                else:
                    x = block(x, cos, sin)
        return x


class Llama(nn.Module):
    """LLaMA language model with dense, low-rank or sparse-plus-low-rank linears.

    Args:
        config: architecture.
        method: what the linears of attention and MLP are made of; embedding and head are dense.
        attention, norm: a key of ``backends.ATTENTION`` and ``backends.NORM`` ("auto" is resolved
            before, by ``resolve_attention`` and ``resolve_norm``: here the device may be meta).
        checkpointing: "block" keeps only each block's input and recomputes the rest in backward;
            "selective" recomputes what norms and SwiGLU gave, and no product.
        offload: what blocks keep for backward waits in host memory (model.offload).
        device, dtype: of the (uninitialised) parameters.

    Raises:
        UserError: the config's rope scaling cannot be computed here.
    """

    def __init__(
        self,
        config: ModelConfig,
        method: MethodConfig,
        *,
        attention: str = "sdpa",
        norm: str = "torch",
        checkpointing: Checkpointing = "none",
        offload: bool = False,
        device: torch.device | str = "meta",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        validate_rope(config)
        if checkpointing not in get_args(Checkpointing):
            raise ValueError(f"checkpointing {checkpointing!r}: none of {get_args(Checkpointing)}")
        device = torch.device(device)
        self.config = config
        self.method = method
        self.model = Decoder(
            config, method, ATTENTION[attention], NORM[norm], checkpointing, offload, device, dtype
        )
        self.lm_head = Head(config, device, dtype)
        self.tie_weights()

    @property
    def blocks(self) -> nn.ModuleList:
        """Decoder blocks in order: what FSDP2 shards one by one."""
        return self.model.layers

    def tie_weights(self) -> None:
        """Make the head use the embedding's Parameter where the config ties them; repeatable.

        ``Module.to_empty`` on meta parameters makes two tensors of one: call this again after it.
        """
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self, tokens: Tensor, labels: Tensor | None = None, cache: KeyValueCache | None = None
    ) -> Tensor:
        """Logits [B, T, V], or the sum of token losses (fp32 scalar) where ``labels`` are given.

        Args:
            tokens: int64 [B, T] in [0, V).
            labels: int64 [B, T], already shifted: the token that follows each position; -100 where
                there is none to predict.
            cache: of the positions before ``tokens``; takes theirs up. For inference, without gradients.
        """
        out: Tensor = self.lm_head(self.model(tokens, cache), labels)
        return out


def _vocabulary_matrix(
    config: ModelConfig, device: torch.device, dtype: torch.dtype
) -> tuple[nn.Parameter, dict[str, ParameterSpec]]:
    """Weight [P, D] of embedding or head and its spec: normal, padded rows zero."""
    shape = (config.padded_vocab_size, config.hidden_size)
    logical = (config.vocab_size, config.hidden_size)
    spec = matrix_spec("normal", config.initializer_range, shape, logical)
    return nn.Parameter(torch.empty(shape, device=device, dtype=dtype)), {"weight": spec}
