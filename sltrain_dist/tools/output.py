"""Folders of weights, written aside and renamed: a reader finds a whole one or none.

One shard is in memory at a time, so ``max_shard_size`` bounds the memory of a conversion too.
"""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sltrain_dist.data.storage import write_synced
from sltrain_dist.train.checkpoint_folder import sync
from sltrain_dist.utils.errors import UserError


@dataclass(frozen=True)
class Written:
    """What was written. bytes: of the tensors."""

    shards: int
    bytes: int


@contextlib.contextmanager
def new_folder(output: Path, flag: str = "--output") -> Iterator[Path]:
    """A temporary folder beside ``output`` that takes its name when the block ends, and goes when it fails.

    Raises:
        UserError: ``output`` exists and is not an empty folder; it cannot be written; the disk is full.
    """
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise UserError(f"{flag} {output}: exists and is no folder; give a new one")
    temporary: Path | None = None
    try:
        if output.is_dir() and any(output.iterdir()):
            raise UserError(f"{flag} {output}: exists and is not empty; give a new folder")
        target = output.absolute()
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f"{target.name}.tmp-", dir=target.parent))
        temporary.chmod(0o755)  # mkdtemp's is 0700
        yield temporary
        for path in temporary.iterdir():
            path.chmod(0o644)  # safetensors leaves 0600, which would shut out others
            sync(path)
        sync(temporary)
        os.rename(temporary, target)
        sync(target.parent)
    except OSError as error:
        raise UserError(
            f"{flag} {output}: cannot be written ({error.strerror or error}); nothing was left there"
        ) from None
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def write_tensors(
    folder: Path,
    like: Mapping[str, Tensor],
    read: Callable[[str], Tensor],
    max_shard_size: str,
) -> Written:
    """Write model.safetensors, or model-0000x-of-0000n.safetensors and their index.

    Args:
        like: name -> meta tensor of the shape and dtype that is written.
        read: gives the tensor of a name, in any dtype.
        max_shard_size: as "5GB"; a larger tensor gets a shard of its own.

    Raises:
        UserError: ``max_shard_size`` is none.
        OSError: the disk refused.
    """
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        split = split_torch_state_dict_into_shards(dict(like), max_shard_size=max_shard_size)
    except ValueError:
        raise UserError(f"--max_shard_size {max_shard_size}: give a size such as 5GB") from None
    files = split.filename_to_tensors
    for name, tensors in files.items():
        shard = {key: read(key).to(like[key].dtype).contiguous() for key in tensors}
        for key, tensor in shard.items():
            assert tensor.shape == like[key].shape, (key, tensor.shape, like[key].shape)
        try:
            save_file(shard, folder / name, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(" ".join(str(error).split())) from None
    if len(files) > 1:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index)
    return Written(len(files), sum(like[key].nbytes for names in files.values() for key in names))


def blank(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor of no memory, to say what will be written."""
    return torch.empty(shape, dtype=dtype, device="meta")


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Write a JSON document and force it to the disk; raises OSError."""
    write_synced(path, (json.dumps(document, indent=2) + "\n").encode())
