"""Memory of a run in closed form: bytes per rank and purpose, in microseconds, from shapes alone.

docs/memory.md derives every line. With P trained elements of a rank's part of the model (all of it over t tensor-parallel
ranks), E those of embedding or head, U those of a block, L blocks, d ranks that shard, n tokens, c bytes as
computed and w as held:

    weights        P w / d                FSDP2, ZeRO-3; P c below; and ZeRO's float32 masters, 4 P / d from stage 1 on
    offsets        1 or 4 bytes an entry of S, bits/8 + 1/8 a value of slope (position and mask), / d where weights are
    optimizer      8 P / d, or 2 (1 + 4/256) for each element whose moments are kept in 8 bits
    gradients      P w / d at the end of backward; of the largest unit alone where blocks are updated one by one
    activations    n L (8 D + 3 F + 7 r) c, of which each number is named in docs/memory.md; n L D c and one
                   block whole under checkpointing
    loss           logits of a chunk of tokens and two gradients of the head
    workspaces     of the largest linear
    communication  FSDP2: E c + 2 U c gathered; ZeRO: the buckets

Not all of it is there at once. Activations are largest when backward begins, gradients when it ends: the
estimate is that of the larger moment. tools/plan.py has the same by running the model, and says by how much it differs.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch

from sltrain_dist.config import TrainConfig
from sltrain_dist.ops import composed, cross_entropy, factorized, pruned
from sltrain_dist.ops.precision import native_bfloat16
from sltrain_dist.ops.tiles import Tiles
from sltrain_dist.parallel.ds_config import resolve_ds_config
from sltrain_dist.params.slope import layer_pattern
from sltrain_dist.train.linear_paths import LinearPaths

KINDS = (
    "weights",
    "offsets",
    "gradients",
    "optimizer",
    "activations",
    "loss",
    "workspaces",
    "communication",
)


@dataclass(frozen=True)
class Elements:
    """Trained elements that a rank computes with, before sharding: of embedding (or head), a block, and all."""

    vocabulary: int
    block: int
    total: int


def estimate_memory(
    config: TrainConfig,
    parameters: dict[str, int],
    ranks: int,
    paths: LinearPaths,
    device: str = "cpu",
) -> dict[str, int]:
    """Bytes of a rank by `KINDS` (see the top of this file), and their "total".

    Args:
        parameters: params.count_parameters of the whole model.
        ranks: that parameters, gradients or states are sharded over.
        paths: of the linears. device: "cpu" or "cuda".
    """
    engine = config.engine
    tp = engine.tensor_parallel
    elements = _elements(config, parameters)
    half = engine.dtype == "bfloat16"
    held = _held(config, elements, parameters["indices_bytes"] // tp, ranks, half)
    begins = _activations(config, paths, device) | _communication(config, elements, ranks, half)
    if engine.gradient_accumulation > 1:  # those of the micro-batches before
        begins["gradients"] = _gradients(config, elements, ranks, half)
    ends_: dict[str, int] = _communication(config, elements, ranks, half)
    ends_["gradients"] = _gradients(config, elements, ranks, half)
    ends_["communication"] += _reduced(config, elements, half)
    larger = max(begins, ends_, key=lambda moment: sum(moment.values()))
    result = dict.fromkeys(KINDS, 0) | held | larger
    return result | {"total": sum(result.values())}


def _elements(config: TrainConfig, parameters: dict[str, int]) -> Elements:
    model, tp = config.model, config.engine.tensor_parallel
    vocabulary = model.padded_vocab_size * model.hidden_size // tp
    total = parameters["total"] // tp
    ends = vocabulary * (1 if model.tie_word_embeddings else 2)
    return Elements(vocabulary, (total - ends) // model.num_hidden_layers, total)


def _held(
    config: TrainConfig, elements: Elements, offsets: int, ranks: int, half: bool
) -> dict[str, int]:
    """What is there all the time."""
    engine = config.engine
    stage = 3 if engine.engine == "fsdp" else engine.stage
    compute = 2 if half else 4
    bits8, bits32 = _by_bits(config, elements)
    states = _states(config, elements)
    plain = "8bit" not in config.optimizer.name and config.optimizer.rounding == "nearest"
    moment = 2 if half and not engine.master_weights and plain else 4
    optimizer = states * (bits8 * (1 + 4 / 256) + bits32 * moment)
    if engine.engine == "fsdp":
        weights = elements.total * (4 if engine.master_weights else compute) / ranks
    else:
        weights = elements.total * compute / (ranks if stage == 3 else 1)
        if (stage > 0 or half) and engine.master_weights:
            weights += 4 * elements.total / (ranks if stage > 0 else 1)
    return {
        "weights": int(weights),
        "offsets": offsets // (ranks if stage == 3 else 1),
        "optimizer": int(optimizer / (ranks if stage > 0 else 1)),
    }


def checkpoint_bytes(config: TrainConfig, parameters: dict[str, int]) -> int:
    """Bytes of one checkpoint on the disk: trained weights, as they are kept, and the optimizer's state of all ranks."""
    whole = replace(config, engine=replace(config.engine, tensor_parallel=1))
    elements = _elements(whole, parameters)
    half = config.engine.dtype == "bfloat16"
    width = 4 if config.engine.master_weights or not half else 2
    held = _held(whole, elements, 0, 1, half)
    masks = parameters["sparse"] // 8 if config.method.method == "slope" else 0
    return elements.total * width + masks + held["optimizer"]


def _states(config: TrainConfig, elements: Elements) -> float:
    """Elements of optimizer state for each that is trained, on average; galore's and apollo's as of square matrices."""
    name, hidden = config.optimizer.name, config.model.hidden_size
    projected = min(2.0, 3 * config.optimizer.proj_rank / hidden)
    if name in ("sgd", "adafactor"):  # whose means of rows and columns are small
        return 1.0 if config.optimizer.momentum else 0.0
    if config.method.method == "slope":  # whose values are no matrices
        return 2.0
    of_matrices = {"muon": 1.0, "galore_adamw": projected, "apollo": projected}.get(name)
    if of_matrices is None:
        return 2.0
    blocks = elements.block * config.model.num_hidden_layers / elements.total
    return blocks * of_matrices + (1 - blocks) * 2


def _by_bits(config: TrainConfig, elements: Elements) -> tuple[int, int]:
    """Elements whose moments are kept in 8 bits, and the others."""
    if "8bit" not in config.optimizer.name:
        return 0, elements.total
    blocks = elements.block * config.model.num_hidden_layers
    if config.optimizer.embedding_state_bits == 8:
        return elements.total, 0
    return blocks, elements.total - blocks


def _gradients(config: TrainConfig, elements: Elements, ranks: int, half: bool) -> int:
    """Gradients of the whole model as they stand when backward ends."""
    engine = config.engine
    element = 4 if engine.master_weights else 2
    if engine.per_layer and engine.gradient_accumulation == 1:
        return max(elements.vocabulary, elements.block) * element // ranks
    stage = 3 if engine.engine == "fsdp" else engine.stage
    kept = elements.total // (ranks if stage >= 2 else 1)
    if engine.engine == "fsdp":
        sums = 4 if half and not engine.master_weights and engine.gradient_accumulation > 1 else 0
        return kept * max(element, sums)
    return kept * 4


def _communication(
    config: TrainConfig, elements: Elements, ranks: int, half: bool
) -> dict[str, int]:
    """Weights that FSDP2 has gathered, or ZeRO's bucket."""
    compute = 2 if half else 4
    if config.engine.engine == "fsdp":
        return {"communication": (elements.vocabulary + 2 * elements.block) * compute}
    resolved = zero_config(config, ranks)
    zero = resolved["zero_optimization"]
    size = min(int(zero["reduce_bucket_size"]), elements.total) * 4
    if zero.get("overlap_comm"):
        size *= 2
    if config.engine.stage == 3:
        live = int(zero.get("stage3_max_live_parameters", 1e9))
        size += min(live, elements.total) * compute
    return {"communication": size if config.engine.stage > 0 else 0}


def _reduced(config: TrainConfig, elements: Elements, half: bool) -> int:
    """What FSDP2 has beside it while it reduces the embedding's gradient."""
    return 3 * 4 * elements.vocabulary if config.engine.engine == "fsdp" else 0


def zero_config(config: TrainConfig, ranks: int) -> dict[str, Any]:
    """The DeepSpeed configuration that the run would hand over."""
    return resolve_ds_config(config.engine.ds_config, config.engine, config.optimizer, ranks)


def _activations(config: TrainConfig, paths: LinearPaths, device: str) -> dict[str, int]:
    """What is alive when forward has ended, and the workspace of the largest operator."""
    engine, model, method = config.engine, config.model, config.method
    tp, width = engine.tensor_parallel, 2 if engine.dtype == "bfloat16" else 4
    tokens = engine.batch_size * config.data.sequence_length
    hidden, ff = model.hidden_size, model.padded_intermediate_size
    key = hidden * model.num_key_value_heads // model.num_attention_heads
    outside = hidden // (tp if engine.sequence_parallel else 1)
    # residual, norm, twice; q, k, v, what attention gives; gate, up and silu(gate) up
    selective = config.activation_checkpointing == "selective"
    norms = 2 if selective else 4
    layer = norms * outside + (2 * hidden + 2 * key + (2 if selective else 3) * ff) // tp
    if method.method == "low_rank" or (
        "factorized" in paths.chosen.values() and paths.keeps_hidden
    ):
        layer += 7 * method.rank
    if method.dropout and method.method in ("low_rank", "sltrain"):
        layer += 6 * hidden + ff // tp  # inputs after dropout
    layers = model.num_hidden_layers
    if config.activation_checkpointing == "block":
        activations = tokens * (outside * layers + layer) * width
    else:
        activations = tokens * layer * layers * width
    loss = cross_entropy.workspace_bytes(
        tokens, hidden, model.padded_vocab_size // tp, getattr(torch, engine.dtype), device
    )
    return {
        "activations": activations,
        "loss": loss,
        "workspaces": _workspace(config, paths, device, tokens, hidden, ff // tp),
    }


def _pruned_workspace(config: TrainConfig, device: str, tokens: int, hidden: int, ff: int) -> int:
    """The same of slope: the operator is one, and does not depend on a path."""
    half = config.engine.dtype == "bfloat16"
    wide = half and device == "cpu" and not native_bfloat16()
    pattern = layer_pattern(config.method.pattern, None)
    declared = pruned.workspace_bytes(ff, hidden, pattern, 2 if half and not wide else 4)
    copies = (tokens * (ff + hidden) + ff * pattern.width(hidden)) * 4 if wide else 0
    return declared["backward"] + copies


def _workspace(
    config: TrainConfig, paths: LinearPaths, device: str, tokens: int, hidden: int, ff: int
) -> int:
    """Of the largest linear, backward."""
    if config.method.method == "slope":
        return _pruned_workspace(config, device, tokens, hidden, ff)
    method, half = config.method, config.engine.dtype == "bfloat16"
    wide = half and device == "cpu" and not native_bfloat16()
    element = 2 if half and not wide else 4
    entries = int(method.density * hidden * ff)
    if "composed" in paths.chosen.values():
        rows = composed.workspace_bytes(
            ff, hidden, entries, Tiles(1, hidden, 1), element, method.rank
        )
        copies = (tokens * (ff + hidden) + method.rank * (ff + hidden) + entries) * 4 if wide else 0
        return rows["backward"] + copies
    if "factorized" not in paths.chosen.values():
        return 0
    if device == "cuda":
        return 2 * tokens * method.rank * element
    threads = torch.get_num_threads()
    return factorized.workspace_bytes(ff, hidden, entries, method.rank, tokens, threads)["backward"]
