"""Folders of weights, written aside and renamed: a reader finds a whole one or none.

One shard is in memory at a time, so ``max_shard_size`` bounds the memory of a conversion too.
"""

import contextlib
import errno
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
from sltrain_dist.train.checkpoint_folder import MANIFEST, sync
from sltrain_dist.utils.errors import UserError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)  # only writing fails like this


@dataclass(frozen=True)
class Written:
    """What was written. bytes: of the tensors."""

    shards: int
    bytes: int


@contextlib.contextmanager
def new_folder(output: Path, flag: str = "--output") -> Iterator[Path]:
    """A temporary folder beside ``output`` that takes its name when the block ends, and goes when it fails.

    Raises:
        UserError: ``output`` exists and is not an empty folder; it cannot be written; the disk is full; a
            file that the block reads cannot be read, which the line names instead.
    """
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise UserError(f"{flag} {output}: exists and is no folder; give a new one")
    temporary: Path | None = None
    reading = False  # whether the block runs, which may also read
    try:
        if output.is_dir() and any(output.iterdir()):
            raise UserError(f"{flag} {output}: exists and is not empty; give a new folder")
        target = output.absolute()
        if any((parent / MANIFEST).is_file() for parent in target.parents):
            raise UserError(f"{flag} {output}: lies inside a checkpoint; give a folder beside it")
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f"{target.name}.tmp-", dir=target.parent))
        temporary.chmod(0o755)  # mkdtemp's is 0700
        reading = True
        yield temporary
        reading = False
        for path in temporary.iterdir():
            path.chmod(0o644)  # safetensors leaves 0600, which would shut out others
            sync(path)
        sync(temporary)
        os.rename(temporary, target)
        sync(target.parent)
    except OSError as error:
        raise UserError(_blame(error, flag, output, temporary if reading else None)) from None
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _blame(error: OSError, flag: str, output: Path, temporary: Path | None) -> str:
    """The line for people: whether writing failed or reading a source. temporary: None where nothing was read."""
    reason, target = error.strerror or error, f"{flag} {output}"
    written = f"{target}: cannot be written ({reason}); nothing was left there"
    if temporary is None or error.errno in _FULL:
        return written
    if error.filename is None and error.errno is None:  # of our own readers, which name the file
        return f"{target}: not written, its source cannot be read ({reason})"
    if error.filename is None or error.filename2 is not None:
        return f"{target}: cannot be written, or its source not read ({reason}); nothing was left there"
    path = Path(os.fsdecode(error.filename)).absolute()
    if path == temporary or temporary in path.parents or path in temporary.parents:
        return written
    return f"{target}: not written, {path} cannot be read ({reason})"


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
            text = " ".join(str(error).split())
            raise OSError(errno.EIO, text, str(folder / name)) from None
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
