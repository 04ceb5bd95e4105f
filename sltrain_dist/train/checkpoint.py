"""Save a run and bring it back: one format for every engine and layout of ranks (DESIGN section 7).

How a save goes: checkpoint_write; beside training: checkpoint_async; what lies on the disk:
checkpoint_folder; tensors and random states: checkpoint_tensors; which folder is meant: checkpoint_find.

Loading refuses, before anything in the engine is touched, a checkpoint of another model, method,
support or optimizer, and names the first difference (checkpoint_identity).
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sltrain_dist.config import TrainConfig
from sltrain_dist.ops.linear import PATHS
from sltrain_dist.ops.linear import Path as LinearPath
from sltrain_dist.parallel.engine import MODEL, Engine
from sltrain_dist.parallel.mesh import Mesh
from sltrain_dist.parallel.quantised import QUANTISED, buffer_state
from sltrain_dist.params import paths
from sltrain_dist.train.checkpoint_find import Found, find, verify
from sltrain_dist.train.checkpoint_folder import STATE
from sltrain_dist.train.checkpoint_identity import changes, check_identity
from sltrain_dist.train.checkpoint_quantised import encode_anew, same_pieces
from sltrain_dist.train.checkpoint_tensors import describe, read_tensors, restore_random_state
from sltrain_dist.train.checkpoint_write import FORMAT, Progress, Saved, hexadecimal, stage, store
from sltrain_dist.utils.errors import UserError

__all__ = ["FORMAT", "Found", "Progress", "Resumed", "Saved", "find", "load", "save", "verify"]


@dataclass(frozen=True)
class Resumed:
    """Outcome of a load. ``exact``: same layout, random states restored, so resuming is bit-exact."""

    progress: Progress
    exact: bool
    messages: tuple[str, ...] = ()


def save(engine: Engine, progress: Progress, config: TrainConfig) -> Saved:
    """Save a checkpoint as ``save_dir/step_N``; collective, and done when it returns.

    A failure of the disk is no exception: ``Saved.folder`` is None then (see ``store``).
    """
    staged = stage(engine, progress, config)
    return store(staged, Path(config.save_dir), config.keep_last, engine.mesh)


def saved_linear_paths(folder: Path) -> dict[str, LinearPath]:
    """The paths that the linears of a checkpoint had, by situation and key (params.paths); none in old ones."""
    document = json.loads((folder / STATE).read_text(encoding="utf-8"))
    saved = document.get("linear_paths", {})
    return {key: path for path in PATHS for key, value in saved.items() if value == path}


def load(folder: Path, engine: Engine, config: TrainConfig) -> Resumed:
    """Bring ``engine`` to the state saved in ``folder`` (which ``find`` has verified); collective.

    The layout of ranks and the engine may differ from those that saved. Random states are restored
    only where both are the same. Where the checkpoint holds weights alone, the optimizer starts anew.

    Raises:
        UserError: a checkpoint of another format, model, method, support or optimizer; the engine
            is then untouched.
        RuntimeError: a file could not be read after all.
    """
    document = json.loads((folder / STATE).read_text(encoding="utf-8"))
    if document.get("format") != FORMAT:
        raise UserError(
            f"--continue_from {folder}: format {document.get('format')!r},"
            f" this version reads {FORMAT!r}"
        )
    support_hash = hexadecimal(engine.support_hash())
    state = engine.state()
    stored = state
    messages = []
    if document.get("weights_only"):
        stored = {name: tensor for name, tensor in state.items() if name.startswith(MODEL)}
        messages.append("the checkpoint holds weights only: the optimizer's moments start at zero")
    messages += check_identity(document, describe(stored), support_hash, config, folder)
    messages += changes(document, config, paths.assigned(engine.module))
    anew = not document.get("weights_only") and not same_pieces(folder, engine, document)
    if anew:
        stored = {name: t for name, t in stored.items() if not name.startswith(QUANTISED)}
    read_tensors(folder, stored)
    if anew:
        encode_anew(folder, engine)
        state |= buffer_state(engine.mesh, engine.buffers())
        messages.append("8-bit moments were decoded and encoded anew for these ranks")
    engine.load_state(state, document["scalars"])
    exact = not messages
    if (layout := _other_layout(document, engine.name, engine.mesh, config)) is None:
        path = folder / f"rng-{engine.mesh.rank:05d}.json"
        restore_random_state(json.loads(path.read_text(encoding="utf-8")))
    else:
        exact = False
        messages.append(layout)
    progress = Progress(**{f.name: document[f.name] for f in dataclasses.fields(Progress)})
    return Resumed(progress, exact, tuple(messages))


def _other_layout(
    document: dict[str, Any], engine: str, mesh: Mesh, config: TrainConfig
) -> str | None:
    """A line where a checkpoint was saved by other ranks, another engine, or ranks that add up in another order."""
    before = document["config"]["engine"]  # older checkpoints know neither of the last two
    saved = {
        "tensor parallel": document.get("tensor_parallel", 1),
        "replicate": before.get("replicate", 1),
        "sequence parallel": "on" if before.get("sequence_parallel") else "off",
    }
    here = {
        "tensor parallel": mesh.tp_size,
        "replicate": config.engine.replicate,
        "sequence parallel": "on" if config.engine.sequence_parallel else "off",
    }
    ranks = (document["world_size"], document["engine"])
    changed = [axis for axis in saved if saved[axis] != here[axis]]
    if ranks == (mesh.world_size, engine) and not changed:
        return None
    return (
        f"saved by {ranks[0]} ranks of engine {ranks[1]}{_axes(saved, changed)}, resumed by"
        f" {mesh.world_size} of {engine}{_axes(here, changed)}:"
        " random states start anew, not bit-exact"
    )


def _axes(layout: dict[str, int | str], names: list[str]) -> str:
    """ " (tensor parallel 2, sequence parallel on)", or nothing."""
    return f" ({', '.join(f'{name} {layout[name]}' for name in names)})" if names else ""
