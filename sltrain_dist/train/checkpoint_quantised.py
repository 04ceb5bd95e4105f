"""8-bit moments between layouts: which bytes of a checkpoint are whose, and what to do where these ranks want others.

The tensors are `parallel.quantised`'s. Beside them every rank writes ``pieces-RANK.json``: what its buffers hold,
fragment by fragment. Ranks that find their own pieces there read bytes. Otherwise each rank puts the moments of one
parameter after another together, whole and in float32, takes its part, and encodes its buffers anew: an error of at
most half a step of the code, once for each change of layout.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sltrain_dist.optim.blockwise import decode, encode
from sltrain_dist.parallel.engine import Engine
from sltrain_dist.parallel.mesh import gather_objects
from sltrain_dist.parallel.quantised import BLOCK, QUANTISED, SCALES, Fragment, blocks, buffer_state
from sltrain_dist.train.checkpoint_shards import Stored, read_headers, read_rows

PIECES = "pieces-"  # files begin so


def pieces_of(engine: Engine) -> dict[str, Any] | None:
    """This rank's pieces, JSON-able; None where no moment has 8 bits."""
    buffers, mesh = engine.buffers(), engine.mesh
    if not buffers:
        return None
    return {
        "tp_rank": mesh.tp_rank,
        "tp_size": mesh.tp_size,
        "row": mesh.tp_rank * mesh.shard_size + mesh.shard_rank,
        "shared": any(buffer.shared for buffer in buffers),
        "data_ranks": mesh.shard_size,
        "cuts": {name: spec.cut.dim for name, spec in engine.specs.items() if spec.cut is not None},
        "buffers": {
            buffer.label: [list(fragment) for fragment in buffer.fragments] for buffer in buffers
        },
    }


def pieces_file(folder: Path, rank: int) -> Path:
    """Where a rank's pieces stand."""
    return folder / f"{PIECES}{rank:05d}.json"


def same_pieces(folder: Path, engine: Engine, document: dict[str, Any]) -> bool:
    """Whether all moments have 32 bits, or every rank finds exactly what it holds in a checkpoint, in buffers of the same sizes; collective."""
    if (pieces := pieces_of(engine)) is None:
        return True
    path, own = pieces_file(folder, engine.mesh.rank), json.loads(json.dumps(pieces))
    same = path.is_file() and json.loads(path.read_text(encoding="utf-8")) == own
    for name, tensor in buffer_state(engine.mesh, engine.buffers()).items():
        same = same and document["tensors"].get(name, {}).get("shape") == list(tensor.shape)
    return all(gather_objects(engine.mesh, same))


@torch.no_grad()
def encode_anew(folder: Path, engine: Engine) -> None:
    """Fill the engine's 8-bit moments from a checkpoint of other buffers.

    Raises:
        RuntimeError: the checkpoint has no moments, or not all, of a parameter.
        OSError, checkpoint_shards.FileError: a file cannot be read.
    """
    saved = SavedMoments(folder)
    for buffer in engine.buffers():
        for moment in (key for key in buffer.tensors if not key.endswith(SCALES)):
            values = torch.zeros(buffer.tensors[moment].numel())
            for name, start, length, offset in buffer.fragments:
                whole = saved.read(name, moment, engine.specs[name].shape)
                cut = engine.specs[name].cut
                held = whole if cut is None else whole.chunk(cut.count, cut.dim)[cut.index]
                values[offset : offset + length] = held.flatten()[start : start + length]
            codes, scales = encode(values, signed=moment == "exp_avg")
            buffer.tensors[moment].copy_(codes)
            buffer.tensors[moment + SCALES].copy_(scales)


@dataclass(frozen=True)
class _Place:
    """A fragment in the checkpoint: of which buffer, in which of its rows."""

    label: str
    row: int
    fragment: Fragment


class SavedMoments:
    """The 8-bit moments in a checkpoint, by parameter."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._tensors: dict[str, Stored] = {
            name: stored
            for name, stored in read_headers(folder).items()
            if name.startswith(QUANTISED)
        }
        self._places: dict[str, dict[int, list[_Place]]] = {}
        self._rows = self._tp_size = 1
        self._cuts: dict[str, int] = {}
        seen = set()
        for path in sorted(folder.glob(PIECES + "*.json")):
            pieces = json.loads(path.read_text(encoding="utf-8"))
            data_ranks = 1 if pieces["shared"] else pieces["data_ranks"]
            row = pieces["tp_rank"] if pieces["shared"] else pieces["row"]
            if row in seen:  # a replica's
                continue
            seen.add(row)
            self._tp_size, self._cuts = pieces["tp_size"], pieces["cuts"]
            self._rows = self._tp_size * data_ranks
            for label, fragments in pieces["buffers"].items():
                for fragment in (Fragment(*values) for values in fragments):
                    of_rank = self._places.setdefault(fragment.name, {})
                    of_rank.setdefault(pieces["tp_rank"], []).append(_Place(label, row, fragment))

    @property
    def names(self) -> list[str]:
        """Parameters that have such moments."""
        return list(self._places)

    def read(self, name: str, moment: str, shape: tuple[int, ...]) -> Tensor:
        """The moment of a parameter of global ``shape``, float32.

        Raises:
            RuntimeError: elements are missing.
        """
        whole = torch.empty(shape)
        dim = self._cuts.get(name)
        parts = (whole,) if dim is None else whole.chunk(self._tp_size, dim)
        for tp_rank, part in enumerate(parts):
            flat = torch.full((part.numel(),), torch.nan)
            for place in self._places.get(name, {}).get(tp_rank, []):
                values = self._decode(place, moment)
                flat[place.fragment.start : place.fragment.start + values.numel()] = values
            part.copy_(flat.view(part.shape))
        if whole.isnan().any():
            raise RuntimeError(
                f"{self.folder}: elements of the 8-bit {moment} of {name} are missing"
            )
        return whole

    def _decode(self, place: _Place, moment: str) -> Tensor:
        codes = self._tensors[f"{QUANTISED}{moment}.{place.label}"]
        scales = self._tensors[f"{QUANTISED}{moment}{SCALES}.{place.label}"]
        length = codes.shape[0] // self._rows
        begin, end = place.fragment.offset, place.fragment.offset + place.fragment.length
        first, last = begin // BLOCK, blocks(end)  # whole blocks
        row, scale_row = place.row * length, place.row * blocks(length)
        values = decode(
            read_rows(codes, row + first * BLOCK, row + min(last * BLOCK, length)),
            read_rows(scales, scale_row + first, scale_row + last),
            signed=moment == "exp_avg",
        )
        return values[begin - first * BLOCK : end - first * BLOCK]
