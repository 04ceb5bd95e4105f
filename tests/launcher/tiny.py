"""A run small enough for a test: real text, real tokenizer, a LLaMA of 64 x 2, and the flags that select it."""

import argparse
import json
import optparse
import os
import subprocess
import sys
from pathlib import Path

from sltrain_dist.parallel.mesh import free_port

REPOSITORY = Path(__file__).parents[2]
CONFIG = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 172,  # not divisible by 8: padding is part of what is tested
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}


def write_inputs(folder: Path) -> None:
    """model.json and text.txt (two modules of the standard library)."""
    (folder / "model.json").write_text(json.dumps(CONFIG))
    text = "".join(Path(module.__file__).read_text() for module in (argparse, optparse))
    (folder / "text.txt").write_text(text)


def flags(folder: Path, save_dir: Path | str, **changes: object) -> list[str]:
    """The command line of a tiny run; a flag set to None is left out."""
    settings: dict[str, object] = {
        "model": folder / "model.json",
        "corpus": folder / "text.txt",
        "cache_dir": folder / "cache",
        "tokenizer_vocab": 512,
        "max_length": 64,
        "rank": 8,
        "sp_ratio": 0.0625,
        "total_batch_size": 8,
        "batch_size": 2,
        "num_training_steps": 6,
        "warmup_steps": 2,
        "grad_clipping": 1.0,
        "eval_every": 3,
        "save_every": 3,
        "eval_tokens": 1000,
        "tracker": "none",
        "save_dir": save_dir,
    } | changes
    return [
        text
        for name, value in settings.items()
        if value is not None
        for text in (f"--{name}", str(value))
    ]


def launch(command: list[str], timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """Run a launcher of this environment from the repository's root, one thread a rank."""
    binary = Path(sys.executable).parent
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PATH": f"{binary}{os.pathsep}{os.environ['PATH']}",
    }
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    return subprocess.run(
        command,
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def deepspeed(ranks: int, *arguments: str) -> list[str]:
    """The deepspeed launcher on a port of its own (its default, 29500, is shared by all runs of a machine)."""
    port = str(free_port())
    return [
        "deepspeed",
        "--num_gpus",
        str(ranks),
        "--master_port",
        port,
        "launcher/pretrain.py",
        *arguments,
    ]


def metrics(run: Path) -> list[dict]:
    """All lines of a run's metrics file."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> dict[int, float]:
    """Training loss by update."""
    return {line["step"]: line["loss"] for line in metrics(run) if "loss" in line}
