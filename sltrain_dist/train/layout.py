"""How ranks are dealt over the axes of the mesh, and the sequences of an update over ranks and micro-batches.

Steps of train.settings: they work on its dictionary of settings, by names of flags.
"""

from typing import Any

from sltrain_dist.parallel.mesh import check_axes
from sltrain_dist.utils.errors import UserError

_LARGEST_MICRO_BATCH = 16


def finish_axes(settings: dict[str, Any], world_size: int) -> int:
    """Check the axes that ranks stand on against each other and their number; returns data-parallel ranks."""
    tensor_parallel, replicate, shard = (
        settings["tensor_parallel"], settings["replicate"], settings["shard"],
    )  # fmt: skip
    check_axes(world_size, tensor_parallel, replicate)
    dp_size = int(world_size // tensor_parallel)
    if shard is not None and replicate * shard != dp_size:
        raise UserError(
            f"--shard {shard}: x --replicate {replicate} is {replicate * shard}, but there are {dp_size} data-parallel"
            " ranks; leave one of the two out"
        )
    if settings["single_gpu"] and world_size > 1:
        raise UserError(
            f"--single_gpu: the run was started on {world_size} ranks; start one process"
        )
    if not settings["sequence_parallel"]:
        return dp_size
    if tensor_parallel == 1:
        raise UserError(
            "--sequence_parallel: cuts positions over tensor-parallel ranks; add --tensor_parallel 2 or more"
        )
    if settings["max_length"] % tensor_parallel:
        raise UserError(
            f"--max_length {settings['max_length']}: --sequence_parallel cuts it over {tensor_parallel} ranks; take a"
            f" multiple of {tensor_parallel}"
        )
    if settings["use_hf_model"]:
        raise UserError(
            "--sequence_parallel: transformers' decoder (--use_hf_model) cannot; drop one of them"
        )
    return dp_size


def finish_batches(settings: dict[str, Any], given: dict[str, Any], dp_size: int) -> None:
    """Fix micro-batch, accumulation and total, each derived from the others where it was not given."""
    batch, total, steps = (
        settings["batch_size"], settings["total_batch_size"], settings["gradient_accumulation"],
    )  # fmt: skip
    if "total_batch_size" not in given and batch is not None:
        # Accumulating needs a gradient of every weight, which --per_layer is there to avoid.
        steps = steps or (1 if settings["per_layer"] else None)
        total = batch * steps * dp_size if steps else total
    if total is None:
        batch = batch or 8
        total = batch * (steps or 1) * dp_size
    ranks = (
        f"{dp_size} {'data-parallel ' * (settings['tensor_parallel'] > 1)}rank{'s' * (dp_size > 1)}"
    )
    if total % dp_size:
        raise UserError(f"--total_batch_size {total}: not divisible by {ranks}")
    per_rank = total // dp_size
    if batch is None:
        share = per_rank // steps if steps and per_rank % steps == 0 else per_rank
        batch = (
            share if steps else max(n for n in range(1, _LARGEST_MICRO_BATCH + 1) if share % n == 0)
        )
    if "batch_size" not in given and steps is None and per_rank % batch:
        batch = max(n for n in range(1, batch + 1) if per_rank % n == 0)
    if per_rank % batch:
        raise UserError(
            f"--total_batch_size {total}: not divisible by --batch_size {batch} x {ranks}; "
            f"the nearest multiple is {max(1, round(total / batch / dp_size)) * batch * dp_size}"
        )
    if steps is not None and batch * steps * dp_size != total:
        raise UserError(
            f"--gradient_accumulation {steps}: x --batch_size {batch} x {ranks} is "
            f"{batch * steps * dp_size}, not --total_batch_size {total}; leave one of them out"
        )
    settings |= {"batch_size": batch, "total_batch_size": total,
                 "gradient_accumulation": per_rank // batch}  # fmt: skip
