"""The command line of pretraining: one table of flags, in groups, with units and defaults.

The first four groups take every flag of the reference implementation's torchrun_main.py under the
same name, so that its published commands run here with just the script's path changed.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from sltrain_dist.config import Dtype
from sltrain_dist.utils.errors import UserError

DTYPES: dict[str, Dtype] = {
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    "float32": "float32",
    "fp32": "float32",
}


def token_count(text: str) -> int:
    """Parse "100M" or "1.5B" or a plain number of tokens; ValueError for what is none."""
    factor = {"K": 10**3, "M": 10**6, "B": 10**9}.get(text[-1:].upper(), 1)
    count = float(text[:-1] if factor > 1 else text) * factor
    if not abs(count) < 2**62:  # also NaN
        raise ValueError(f"{text} is no number of tokens")
    return int(count)


@dataclass(frozen=True)
class Flag:
    """One flag: ``default`` is what a run of our own gets; None means that it is derived."""

    name: str
    help: str
    default: Any = None
    kind: Callable[[str], Any] | None = str  # None: a switch
    choices: tuple[str, ...] | None = None
    const: str | None = None  # what the flag means when given without a value


GROUPS: dict[str, tuple[Flag, ...]] = {
    "model and method": (
        Flag("model", "preset (llama_9m ... llama_13b, llama_demo), HF config.json or folder", "llama_demo"),
        Flag("model_config", "the reference's name for --model; implies its defaults, corpus c4 and support uniform"),
        Flag("method", "what linears are made of", "sltrain", choices=("sltrain", "low_rank", "full", "slope")),
        Flag("peft_model", "the reference's name for --method; implies its defaults", choices=("sltrain", "full")),
        Flag("rank", "columns of B; derived: the recipe of the model, else hidden size / 4", kind=int),
        Flag("sp_ratio", "density of S, in (0, 1)", 0.03, float),
        Flag("lora_alpha", "scale = alpha / rank", 32.0, float),
        Flag("lora_dropout", "probability, on the input of the low-rank product", 0.0, float),
        Flag("train_scaling", "train the scale, as tanh(scaling)", False, None),
        Flag("support", "kind of sparse support", "fan_in", choices=("fan_in", "uniform", "block")),
        Flag("block_size", "edge of the blocks of --support block, elements", 16, int),
        Flag("slope_pattern", "of --method slope: N of M neighbouring weights are kept; other ones for ranges of layers as 2:4,8-15=2:8", "2:4"),
        Flag("mask_change_freq", "of --method slope: updates between choices of the second mask, which the gradient of a layer's input takes; 0: never",
             100, int),
        Flag("use_hf_model", "train transformers' LlamaForCausalLM with its linears replaced", False, None),
        Flag("attention", "attention back end", "auto", choices=("auto", "sdpa", "flash_attn")),
        Flag("norm", "RMSNorm back end", "auto", choices=("auto", "torch", "apex")),
        Flag("linear_path", "how linears of --method sltrain are computed: W built, or never; auto: whichever is faster here",
             "auto", choices=("auto", "composed", "factorized")),
        Flag("keep_hidden", "factorized linears keep x A^T for backward, rank numbers a token, or compute it again; auto: keep on a CPU",
             "auto", choices=("auto", "yes", "no")),
        Flag("compile", "torch.compile every block; reduce-overhead replays CUDA graphs, which hides launches up to 350m",
             "none", choices=("none", "default", "reduce-overhead", "max-autotune"), const="default"),
    ),
    "data": (
        Flag("corpus", "stdlib, c4 (c4:FOLDER for a mirror), or a txt|jsonl|json.gz|parquet file or a folder of them", "stdlib"),
        Flag("tokenizer", "HF name or path, or trained: byte-level BPE on the corpus; derived: trained, t5-base for c4"),
        Flag("tokenizer_vocab", "entries of a tokenizer trained on the corpus", 8192, int),
        Flag("pack", "documents joined, or one padded document a sample", "packed", choices=("packed", "padded")),
        Flag("max_length", "tokens per sample", 256, int),
        Flag("workers", "background loader processes", 0, int),
        Flag("cache_dir", "where tokenizers and token indices are kept", "~/.cache/sltrain_dist"),
    ),
    "optimization": (
        Flag("optimizer", "adamw, adam, sgd, adafactor, muon; adamw8bit, adam8bit: moments of one byte; apex_adamw, apex_adam, galore_adamw, apollo "
             "where their packages are installed; NAME_per_layer: --per_layer", "adamw"),
        Flag("proj_rank", "rank that galore_adamw and apollo project gradients to; derived: --rank", kind=int),
        Flag("update_proj_gap", "updates between two projections of galore_adamw and apollo; derived: 200", kind=int),
        Flag("proj_scale", "of the projected updates; derived: 0.25 for galore_adamw, 1 for apollo", kind=float),
        Flag("embedding_state_bits", "of the moments of embedding and head, with 8-bit optimizers", 32, int),
        Flag("per_layer", "fsdp: update every block as soon as its gradient is there, so that no other gradients exist", False, None),
        Flag("per_layer_clip", "what --grad_clipping does per layer: nothing (error), by a block's own norm, or by the norm of the update before; "
             "derived: error, block where a recipe clips", choices=("error", "block", "lagged")),
        Flag("lr", "peak learning rate", 3e-3, float),
        Flag("scheduler", "shape of the learning rate", "cosine", choices=("linear", "cosine", "cosine_restarts")),
        Flag("cycle_length", "updates per cycle of cosine_restarts", kind=int),
        Flag("min_lr_ratio", "floor of the learning rate, share of the peak", 0.1, float),
        Flag("warmup_steps", "updates; derived: a tenth of the training", kind=int),
        Flag("weight_decay", "decoupled for adamw", 0.0, float),
        Flag("beta1", "momentum of sgd, beta1 of adafactor", 0.0, float),
        Flag("betas", "of adam and adamw, as 0.9,0.999", "0.9,0.999"),
        Flag("eps", "of adam and adamw", 1e-8, float),
        Flag("grad_clipping", "largest global gradient norm; 0 is off", 0.0, float),
        Flag("batch_size", "sequences per micro-batch and rank; derived: what divides the total, at most 16", kind=int),
        Flag("total_batch_size", "sequences per update, over all ranks and micro-batches; default the recipe's, but --per_layer with --batch_size updates on every micro-batch", kind=int),
        Flag("gradient_accumulation", "micro-batches per update; derived from the batch sizes", kind=int),
        Flag("num_training_steps", "updates", 1000, int),
        Flag("max_train_tokens", "tokens, with K, M or B; overrides --num_training_steps", kind=token_count),
        Flag("loss_average", "over all valid tokens of the update, or the reference's mean of micro-batch means",
             "tokens", choices=("tokens", "micro_batches")),
    ),
    "run": (
        Flag("save_dir", "folder of the run; derived: runs/MODEL-METHOD-TIME"),
        Flag("continue_from", "a run folder, one of its step_N, or auto: the newest whole checkpoint in save_dir"),
        Flag("init_from", "start from the weights of a run, a step_N, a factored or an HF LLaMA folder; optimizer and data start anew"),
        Flag("save_every", "updates between checkpoints; 0: only at the end", 1000, int),
        Flag("keep_last", "checkpoints kept; 0: all", 3, int),
        Flag("async_save", "write checkpoints beside training, from a copy in host memory; auto: on CUDA where it has room",
             "auto", choices=("auto", "yes", "no")),
        Flag("eval_every", "updates between evaluations; 0: only at the end", 1000, int),
        Flag("eval_tokens", "tokens of the held-out split evaluated, with K, M or B", "10M", token_count),
        Flag("eval_mode", "exact mean over tokens, or the reference's (n + 1 batches: 1.5-2%% too low)", "exact",
             choices=("exact", "reference")),
        Flag("seed", "of support, initial values, order of data and dropout", 42, int),
        Flag("name", "of the run, for the tracker; derived: the folder's"),
        Flag("tags", "comma-separated, for the tracker"),
        Flag("tracker", "wandb (offline unless logged in), tensorboard; auto: the first that is installed", "auto",
             choices=("auto", "wandb", "tensorboard", "none")),
    ),
    "engine": (
        Flag("engine", "derived: zero where --ds_config is given, else fsdp", choices=("fsdp", "zero")),
        Flag("ds_config", 'DeepSpeed JSON; values "auto" are filled from these flags'),
        Flag("tensor_parallel", "ranks that every layer is cut over, neighbours on one machine", 1, int),
        Flag("sequence_parallel", "with --tensor_parallel: norms and residuals on a part of the positions each", False, None),
        Flag("replicate", "fsdp: copies of the model kept beside each other, each sharded over the other ranks (HSDP)", 1, int),
        Flag("shard", "fsdp: ranks a copy is sharded over; derived: data-parallel ranks / --replicate", kind=int),
        Flag("dtype", "number format of compute; derived: bfloat16 on CUDA, else float32"),
        Flag("master_weights", "fp32 weights beside bfloat16 compute, or none, rounding to nearest or stochastically ; derived: fp32, "
             "per layer stochastic for adam and adamw in bfloat16 and none for others, with the reference's flags none", choices=("fp32", "none", "stochastic")),
        Flag("grad_sync", "fsdp: reduce gradients each micro-batch, or once an update", "each", choices=("each", "last")),
        Flag("activation_checkpointing", "in backward compute each block again, or what its norms and SwiGLU gave (no products)",
             "none", choices=("none", "block", "selective"), const="block"),
        Flag("offload_activations", "what blocks keep for backward waits in pinned host memory (on a CPU it is there anyway)", False, None),
        Flag("cpu_offload", "fsdp: shards, gradients and optimizer in host memory, where updates are computed; zero: see ds_configs/zero3_offload.json",
             False, None),
        Flag("single_gpu", "refuse to run on more than one rank", False, None),
        Flag("timeout", "seconds that a collective may take", 600.0, float),
        Flag("local_rank", argparse.SUPPRESS, kind=int),
    ),
    "watch": (
        Flag("max_skips", "updates in a row whose gradient is not finite before the run goes back to its last checkpoint, past the bad data", 20, int),
        Flag("max_rewinds", "times that it goes back before it gives up", 3, int),
        Flag("spike_sigma", "a loss so many standard deviations above the last 64 is a spike; 0: none is", 6.0, float),
        Flag("spike_action", "say spikes, or leave the weights as they are too", "log", choices=("log", "skip")),
        Flag("watch_every", "updates between samples of what communication takes and who is slow; 0: none", 100, int),
        Flag("profile", "updates to trace, as 10:12: trace and memory snapshot in save_dir/profile"),
        Flag("prometheus", "text file for a node exporter, replaced at most once a second"),
    ),
}  # fmt: skip

FLAGS = {flag.name: flag for flags in GROUPS.values() for flag in flags}

# What the reference's torchrun_main.py takes where a flag is not given; --batch_size it requires.
# Its "master_weights" holds under --engine fsdp: DeepSpeed cannot do without them in every stage.
REFERENCE_DEFAULTS: dict[str, Any] = {
    "method": "full",
    "support": "uniform",
    "optimizer": "adam",
    "lr": 1e-4,
    "warmup_steps": 1000,
    "num_training_steps": 10_000,
    "eval_every": 5000,
    "save_every": 10_000,
    "rank": 128,
    "sp_ratio": 0.01,
    "lora_alpha": 32.0,
    "workers": 8,
    "master_weights": "none",
}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UserError, one line, where argparse prints its usage and exits."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def tool_parser(prog: str, description: str | None, flags: dict[str, dict[str, Any]]) -> Parser:
    """The parser of a small launcher: its own table, flag -> `add_argument`'s keywords."""
    result = Parser(prog=prog, description=description, allow_abbrev=False)
    for flag, options in flags.items():
        result.add_argument(flag, **options)
    return result


def parser() -> argparse.ArgumentParser:
    """The argparse parser of the table. Flags not given are absent from its namespace."""
    result = Parser(
        prog="pretrain.py",
        description="Pre-train a LLaMA with sparse-plus-low-rank linears. With no flag but --ds_config it "
        "trains llama_demo on the text of Python's standard library. Defaults stand in brackets; the recipe of a preset "
        "(presets/recipes.json) and numbers in the ds JSON come before them, flags before all.",
        epilog="--dry_run [RANKS]: train nothing, plan the run on so many imagined ranks, with launcher/plan.py's flags "
        "(--device, --gpu_memory, --tflops, --bandwidth, --json).",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    for title, flags in GROUPS.items():
        group = result.add_argument_group(title)
        for flag in flags:
            note = "" if flag.default is None or flag.default is False else f" [{flag.default}]"
            text = flag.help if flag.help == argparse.SUPPRESS else flag.help + note
            if flag.kind is None:
                group.add_argument(f"--{flag.name}", action="store_true", help=text)
            elif flag.const is not None:
                group.add_argument(
                    f"--{flag.name}", nargs="?", const=flag.const, choices=flag.choices, help=text
                )
            else:
                group.add_argument(
                    f"--{flag.name}", type=flag.kind, choices=flag.choices, help=text
                )
    return result


def explicit(arguments: Sequence[str]) -> dict[str, Any]:
    """The flags that were given, by name.

    Raises:
        UserError: an unknown flag, a missing value, or one of the wrong type or choice.
    """
    given = vars(parser().parse_args(list(arguments)))
    given.pop("local_rank", None)
    return given
