"""What a run is: frozen dataclasses that every part reads and none changes.

They are built once by the command line (launcher), validated there, and dumped as ``config.json``
beside the run. Only the model's architecture has a file format of its own, HF's ``config.json``.
"""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from sltrain_dist.utils.errors import UserError

PRESETS = Path(__file__).parent / "presets"

Method = Literal["full", "low_rank", "sltrain", "slope"]
SupportKind = Literal["fan_in", "uniform", "block"]
Dtype = Literal["float32", "bfloat16"]
Checkpointing = Literal["none", "block", "selective"]


class Kind(NamedTuple):
    """What a value read from a JSON file may be: words for the error, and the test."""

    words: str
    holds: Callable[[Any], bool]


def _integer(value: Any, lowest: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and lowest <= value < 2**31


def _number(value: Any) -> bool:
    """A finite number; JSON readers give NaN and Infinity too, and true is an int to Python."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _numbers(value: Any) -> bool:
    return isinstance(value, list) and all(_number(item) and item > 0 for item in value)


POSITIVE_INTEGER = Kind("a positive integer", lambda value: _integer(value, 1))
POSITIVE_NUMBER = Kind("a positive number", lambda value: _number(value) and value > 0)
NOT_NEGATIVE_NUMBER = Kind(
    "a number that is not negative", lambda value: _number(value) and value >= 0
)
BOOLEAN = Kind("true or false", lambda value: isinstance(value, bool))
TEXT = Kind("a string", lambda value: isinstance(value, str))
OBJECT = Kind("an object", lambda value: isinstance(value, dict))
_TOKEN_ID = Kind("a token id", lambda value: _integer(value, -1))  # -1: none, in old configs
_TOKEN_IDS = Kind(
    "a token id, or a list of them",
    lambda value: (
        all(_integer(item, -1) for item in value)
        if isinstance(value, list) and value
        else _integer(value, -1)
    ),
)


def round_up(size: int, multiple: int) -> int:
    """The smallest multiple of ``multiple`` that is at least ``size``."""
    return -(-size // multiple) * multiple


@dataclass(frozen=True)
class ModelConfig:
    """Architecture of a LLaMA model; fields have the names and meaning of HF's LlamaConfig."""

    name: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    initializer_range: float = 0.02
    bos_token_id: int | None = 0
    eos_token_id: int | None = 1
    pad_token_id: int | None = None

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding and head: padding is fixed at 128 so that it never depends on the layout."""
        return round_up(self.vocab_size, 128)

    @property
    def padded_intermediate_size(self) -> int:
        """Physical MLP width: widths not divisible by 8 (5461, 1708) go to the next multiple of 32."""
        width = self.intermediate_size
        return width if width % 8 == 0 else round_up(width, 32)

    @staticmethod
    def presets() -> list[str]:
        """Names that ``load`` knows without a file."""
        return sorted(path.stem for path in PRESETS.glob("llama_*.json"))

    @classmethod
    def load(cls, name_or_path: str, flag: str = "--model_config") -> "ModelConfig":
        """Read a preset by name, or any HF LLaMA ``config.json`` (or a folder holding one) by path.

        ``configs/llama_60m.json`` finds the preset of that name where no such file stands, because
        that is what the reference implementation's commands say.

        Raises:
            UserError: no such preset or file, malformed JSON, or not a LLaMA.
        """
        path = Path(name_or_path)
        if path.is_dir():
            path = path / "config.json"
        if not path.is_file():
            stem = path.name.removesuffix(".json")
            preset = PRESETS / f"{stem if stem.startswith('llama_') else 'llama_' + stem}.json"
            if not preset.is_file():
                known = ", ".join(cls.presets())
                raise UserError(
                    f"{flag} {name_or_path}: no such file or preset; presets are {known}"
                )
            path = preset
        try:
            raw = json.loads(path.read_text())
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{flag} {path}: not a readable JSON file ({error})") from None
        return _from_hf(raw, path, flag)


_REQUIRED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
)  # fmt: skip
# The optional fields: (what they may be, whether null stands for their default, names).
_FIELDS = (
    (POSITIVE_INTEGER, True, "num_key_value_heads head_dim max_position_embeddings"),
    (POSITIVE_INTEGER, True, "max_sequence_length"),
    (POSITIVE_NUMBER, False, "rms_norm_eps"),
    (NOT_NEGATIVE_NUMBER, False, "initializer_range"),
    (POSITIVE_NUMBER, True, "rope_theta"),
    (OBJECT, True, "rope_parameters rope_scaling"),
    (BOOLEAN, False, "tie_word_embeddings attention_bias mlp_bias"),
    (_TOKEN_ID, True, "bos_token_id pad_token_id"),
    (_TOKEN_IDS, True, "eos_token_id"),
)
_ROPE_FIELDS = (
    (TEXT, False, "rope_type type"),
    (POSITIVE_NUMBER, True, "rope_theta factor low_freq_factor high_freq_factor beta_fast"),
    (POSITIVE_NUMBER, True, "beta_slow attention_factor partial_rotary_factor"),
    (NOT_NEGATIVE_NUMBER, True, "mscale mscale_all_dim"),
    (POSITIVE_INTEGER, True, "original_max_position_embeddings"),
    (Kind("a list of positive numbers", _numbers), True, "short_factor long_factor"),
    (BOOLEAN, False, "truncate"),
)


def _check_fields(raw: dict[str, Any], path: Path, flag: str) -> None:
    """Refuse every field of a wrong type or out of its range, before any is read."""

    def check(value: Any, name: str, kind: Kind) -> None:
        if not kind.holds(value):
            text = repr(value)[:60]
            raise UserError(f"{flag} {path}: {name} is {text}; it must be {kind.words}")

    for key in _REQUIRED:
        check(raw.get(key), key, POSITIVE_INTEGER)
    blocks: dict[str, tuple[Any, tuple[tuple[Kind, bool, str], ...]]] = {"": (raw, _FIELDS)}
    blocks |= {key: (raw.get(key), _ROPE_FIELDS) for key in ("rope_parameters", "rope_scaling")}
    for block, (content, table) in blocks.items():
        for kind, nullable, names in table:
            for key in names.split():
                if content and key in content and not (nullable and content[key] is None):
                    check(content[key], f"{block}.{key}" if block else key, kind)


def _from_hf(raw: Any, path: Path, flag: str) -> ModelConfig:
    """Turn the content of an HF config.json (any transformers version) into a ModelConfig."""
    if not isinstance(raw, dict) or raw.get("model_type") != "llama":
        kind = raw.get("model_type") if isinstance(raw, dict) else type(raw).__name__
        raise UserError(
            f'{flag} {path}: model_type is {kind!r}; only LLaMA configs ("llama") train here'
        )
    if raw.get("hidden_act", "silu") != "silu":
        raise UserError(f"{flag} {path}: hidden_act {raw['hidden_act']!r}; LLaMA here means silu")
    _check_fields(raw, path, flag)
    heads = raw["num_attention_heads"]
    kv_heads = raw.get("num_key_value_heads") or heads
    if raw.get("head_dim") is None and raw["hidden_size"] % heads:
        raise UserError(
            f"{flag} {path}: hidden_size {raw['hidden_size']} is not divisible by num_attention_heads {heads}"
        )
    if heads % kv_heads:
        raise UserError(
            f"{flag} {path}: num_attention_heads {heads} is not divisible by num_key_value_heads {kv_heads}"
        )
    rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    theta = rope.pop("rope_theta", None) or raw.get("rope_theta") or 10000.0
    rope_type = rope.get("rope_type", rope.pop("type", "default"))
    pad = raw.get("pad_token_id")
    eos = raw.get("eos_token_id", 1)
    return ModelConfig(
        name=path.parent.name if path.stem == "config" else path.stem,
        **{key: raw[key] for key in _REQUIRED},
        num_key_value_heads=kv_heads,
        head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
        max_position_embeddings=raw.get("max_position_embeddings")
        or raw.get("max_sequence_length")
        or 2048,
        rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        rope_theta=float(theta),
        rope_scaling=None if rope_type == "default" else {**rope, "rope_type": rope_type},
        tie_word_embeddings=raw.get("tie_word_embeddings", False),
        attention_bias=raw.get("attention_bias", False),
        mlp_bias=raw.get("mlp_bias", False),
        initializer_range=float(raw.get("initializer_range", 0.02)),
        bos_token_id=raw.get("bos_token_id", 0),
        eos_token_id=eos[0] if isinstance(eos, list) else eos,
        pad_token_id=None if pad is None or pad < 0 else pad,
    )


@dataclass(frozen=True)
class MethodConfig:
    """What a linear's weight is made of: W = scale * B A + S (SLTrain), or dense, low rank only, or N:M pruned (SLoPe)."""

    method: Method = "sltrain"
    rank: int = 128  # columns of B
    density: float = 0.03  # share of W's entries in the support of S
    alpha: float = 32.0  # scale = alpha / rank
    dropout: float = 0.0  # on the input of the low-rank product
    train_scaling: bool = (
        False  # scale = tanh(scaling), scaling trained from 1, in place of alpha / rank
    )
    support: SupportKind = "fan_in"
    block_size: int = 16  # edge of the blocks of support "block"
    seed: int = 42  # of the support and of all initial values
    pattern: str = "2:4"  # of slope: N:M, and others for ranges of layers, as "2:4,8-15=2:8"
    mask_change_freq: int = 100  # of slope: updates between choices of the second mask; 0: never

    @property
    def scale(self) -> float:
        """The fixed factor of the low-rank product."""
        return self.alpha / self.rank


@dataclass(frozen=True)
class DataConfig:
    """Where text comes from and how it becomes samples."""

    corpus: str = "stdlib"  # a name in data.corpora.CORPORA, or a file or folder
    tokenizer: str | None = None  # None: the corpus' own default
    pack: Literal["packed", "padded"] = "packed"
    sequence_length: int = 256  # tokens per sample
    cache_dir: str = "~/.cache/sltrain_dist"
    eval_tokens: int = 10_000_000  # at most so many tokens of the held-out split
    workers: int = 0  # background loader processes
    seed: int = 42  # of the order of samples
    vocab_size: int = 8192  # of a tokenizer trained on the corpus


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer and its learning-rate schedule; steps are updates, never micro-batches."""

    name: str = "adamw"
    lr: float = 3e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    momentum: float = 0.0  # the reference's --beta1: SGD's momentum
    scheduler: Literal["linear", "cosine", "cosine_restarts"] = "cosine"
    warmup_steps: int = 0
    total_steps: int = 1000
    min_lr_ratio: float = 0.1
    cycle_length: int | None = None
    grad_clipping: float = 0.0  # global norm; 0 is off
    embedding_state_bits: Literal[8, 32] = 32  # of embedding's and head's moments, of 8-bit ones
    per_layer_clip: Literal["error", "block", "lagged"] = "error"  # what clipping means per layer
    rounding: Literal["nearest", "stochastic"] = "nearest"  # of bfloat16 weights without masters
    proj_rank: int = 128  # that GaLore and APOLLO project gradients of matrices to
    update_proj_gap: int = 200  # updates between their projections
    proj_scale: float | None = None  # of the projected updates; None: the method's own
    seed: int = 42  # of stochastic rounding


@dataclass(frozen=True)
class EngineConfig:
    """How the run is distributed and in which number formats it computes."""

    engine: Literal["fsdp", "zero"] = "fsdp"
    stage: int = 2  # DeepSpeed ZeRO stage, of engine zero
    ds_config: dict[str, Any] | None = None
    dtype: Dtype = "float32"
    master_weights: bool = True  # keep fp32 weights beside bf16 compute
    grad_sync: Literal["each", "last"] = (
        "each"  # reduce gradients every micro-batch, or once an update
    )
    tensor_parallel: int = 1  # ranks that every layer is cut over
    sequence_parallel: bool = False  # between the cut layers a rank holds a part of the positions
    per_layer: bool = False  # FSDP2: update inside backward, block by block
    replicate: int = 1  # copies of the model that FSDP2 keeps beside each other (HSDP)
    cpu_offload: bool = False  # FSDP2: shards, gradients and optimizer in host memory
    batch_size: int = 8  # sequences per micro-batch and data-parallel rank
    gradient_accumulation: int = 1
    seed: int = 42


@dataclass(frozen=True)
class WatchConfig:
    """What a run does about faults and spikes, and what it measures beside its curves."""

    max_skips: int = (
        20  # updates in a row without a finite gradient before it goes back to a checkpoint
    )
    max_rewinds: int = 3  # times that it goes back before it gives up
    spike_sigma: float = 6.0  # standard deviations above the last losses that make a spike; 0: none
    spike_action: Literal["log", "skip"] = "log"
    sample_every: int = 100  # updates between samples of what collectives take; 0: none
    prometheus: str | None = None  # text file for a node exporter
    profile: tuple[int, int] | None = None  # first and last update that is traced


@dataclass(frozen=True)
class TrainConfig:
    """The run itself: what to train, for how long, what to write where."""

    model: ModelConfig
    method: MethodConfig
    data: DataConfig
    optimizer: OptimizerConfig
    engine: EngineConfig
    total_batch_size: int = 16  # sequences per update, over all ranks and micro-batches
    eval_every: int = 0  # updates between evaluations; 0: only at the end
    save_every: int = 0  # updates between checkpoints; 0: only at the end
    keep_last: int = 3
    async_save: Literal["auto", "yes", "no"] = "auto"  # write checkpoints beside training
    eval_mode: Literal["exact", "reference"] = "exact"
    save_dir: str = "runs/run"
    continue_from: str | None = None
    init_from: str | None = None  # weights to start from, where no checkpoint is continued
    attention: Literal["auto", "sdpa", "flash_attn"] = "auto"
    norm: Literal["auto", "torch", "apex"] = "auto"
    linear_path: Literal["auto", "composed", "factorized"] = "auto"  # of sltrain's linears
    keep_hidden: Literal["auto", "yes", "no"] = "auto"  # x A^T of factorized linears, for backward
    activation_checkpointing: Checkpointing = "none"
    offload_activations: bool = False  # what blocks keep for backward waits in host memory
    compile: Literal["none", "default", "reduce-overhead", "max-autotune"] = "none"
    use_hf_model: bool = False  # transformers' LlamaForCausalLM with its linears replaced
    loss_average: Literal["tokens", "micro_batches"] = (
        "tokens"  # micro_batches: the reference's mean of means
    )
    tracker: Literal["auto", "wandb", "tensorboard", "none"] = "auto"
    name: str = "run"
    tags: tuple[str, ...] = ()
    timeout: float = 600.0  # seconds a collective may take
    watch: WatchConfig = WatchConfig()
    command: tuple[str, ...] = field(default=(), compare=False)

    @property
    def tokens_per_update(self) -> int:
        return self.total_batch_size * self.data.sequence_length

    def to_json(self) -> dict[str, Any]:
        """The resolved configuration as JSON-able data."""
        return dataclasses.asdict(self)
