"""Everything before the first update, in one order:

mesh -> run folder -> checkpoint to continue from -> data -> model on meta -> paths of its linears
     -> engine -> load -> records

Work that one rank does for all (folders, tokenising) goes through ``on_first``, so that an error of
the first rank ends every rank with the same single line.
"""

import os
import random
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from sltrain_dist.config import TrainConfig
from sltrain_dist.data import Data, open_data, prepare_data
from sltrain_dist.model.backends import resolve_attention, resolve_norm
from sltrain_dist.model.llama import Llama
from sltrain_dist.model.tensor_parallel import parallelize
from sltrain_dist.ops import kernels
from sltrain_dist.optim.table import OptimizerFactory, assert_live
from sltrain_dist.parallel.engine import ModelFactory, build_engine, load_libraries
from sltrain_dist.parallel.mesh import (
    Mesh,
    gather_objects,
    gather_patiently,
)
from sltrain_dist.parallel.tensor import TensorParallel, tensor_parallel
from sltrain_dist.params import count_parameters
from sltrain_dist.train.checkpoint import Found, find, load
from sltrain_dist.train.init_from import start_from
from sltrain_dist.train.journal import Journal, check_prometheus
from sltrain_dist.train.linear_paths import LinearPaths, decide
from sltrain_dist.train.memory import estimate_memory
from sltrain_dist.train.run import Run
from sltrain_dist.train.run_folder import Records, choose_folder, claim_folder, lock_folder
from sltrain_dist.train.summary import peak_memory, print_summary, say
from sltrain_dist.train.tracker import NoTracker, check_tracker, open_tracker
from sltrain_dist.train.watch import LossWatch
from sltrain_dist.utils.errors import UserError
from sltrain_dist.utils.interrupt import InterruptError, interruptible

T = TypeVar("T")
_SLOWEST_FOLDER = 10.0  # seconds until a file written on one node must be seen on another


def on_first(mesh: Mesh, action: Callable[[], T], patient: bool = False) -> T:
    """Run ``action`` on the first rank and give its (picklable) result, or its UserError, to all ranks.

    patient: it may take longer than a collective.
    """
    outcome: tuple[Any, str | None] = (None, None)
    if mesh.is_first:
        try:
            outcome = (action(), None)
        except UserError as error:
            outcome = (None, str(error))
    gather = gather_patiently if patient else gather_objects
    result, problem = gather(mesh, outcome)[0]
    if problem is not None:
        raise UserError(problem)
    value: T = result
    return value


def build(config: TrainConfig, mesh: Mesh) -> Run:
    """Build a run; on return the engine stands where training begins or continues.

    Raises:
        UserError: anything a user can mend; nothing that was saved has been touched.
    """
    check_tracker(config.tracker)
    hosts = [str(host) for host in gather_objects(mesh, socket.gethostname())]
    folder = on_first(mesh, lambda: choose_folder(config))
    found = find(config.continue_from, folder, mesh)
    on_first(mesh, lambda: claim_folder(folder, config))
    on_first(mesh, lambda: check_prometheus(config.watch.prometheus))
    lock = _lock(mesh, folder)
    _check_shared(mesh, folder)
    config = replace(config, save_dir=str(folder), name=config.name or folder.name)
    journal = Journal(folder, mesh.is_first, config.watch.prometheus)
    journal.beat("starting", total_steps=config.optimizer.total_steps)
    with journal.telling(lambda: 0):
        return _build(config, mesh, folder, found, hosts, journal, lock)


def _build(
    config: TrainConfig,
    mesh: Mesh,
    folder: Path,
    found: Found,
    hosts: list[str],
    journal: Journal,
    lock: object,
) -> Run:
    """All that comes after the run folder is ours."""
    data = _open_data(config, mesh)
    dtype, model = getattr(torch, config.engine.dtype), config.model
    attention = resolve_attention(config.attention, mesh.device, dtype, model.head_dim)
    norm = resolve_norm(config.norm, mesh.device, dtype, model.hidden_size)
    tp = tensor_parallel(mesh, config.engine)
    blank = make_model(config, attention, norm, None, tp, device="meta", dtype=torch.float32)
    parameters = count_parameters(blank)
    load_libraries(config.engine.engine)
    if "8bit" in config.optimizer.name:
        import bitsandbytes  # noqa: F401
    baseline = peak_memory(mesh)
    _check_kernels(mesh)
    paths = on_first(mesh, lambda: decide(config, blank, mesh.device, found.folder), patient=True)
    factory: ModelFactory = partial(make_model, config, attention, norm, paths, tp)
    start = None
    if config.init_from and found.folder is None:
        factory = start = start_from(factory, config, mesh, data.tokenizer)
    _seed(config.engine.seed, mesh.dp_rank)
    optimizer = OptimizerFactory(config.optimizer)
    engine = build_engine(factory, mesh, config.engine, optimizer, config.method.seed)
    if start is not None:
        start.close()
    assert_live(engine.optimizer, config.optimizer)
    records = Records(folder, mesh.is_first)
    sharding = mesh.shard_size if config.engine.engine == "fsdp" else mesh.dp_size
    estimate = estimate_memory(config, parameters, sharding, paths, mesh.device.type)
    run = Run(
        config, mesh, data, engine, records, journal, NoTracker(), parameters, estimate, paths, baseline,
        lock=lock, hosts=hosts, losses=LossWatch(config.watch.spike_sigma),
    )  # fmt: skip
    _resume(run, found)
    if mesh.is_first:
        run.tracker = open_tracker(config, folder, run.step)
    journal.event(
        "start", run.step, world_size=mesh.world_size, tensor_parallel=mesh.tp_size, engine=engine.name,
        hosts=list(dict.fromkeys(hosts)), continued_from=found.folder and str(found.folder),
        restarts=journal.restarts, command=config.command, job=os.environ.get("SLURM_JOB_ID"),
    )  # fmt: skip
    records.config(config)
    records.tokenizer(data.tokenizer)
    print_summary(run, attention, norm)
    return run


def make_model(
    config: TrainConfig,
    attention: str,
    norm: str,
    paths: LinearPaths | None = None,
    tp: TensorParallel | None = None,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
) -> nn.Module:
    """The model with uninitialised parameters, cut over tensor-parallel ranks, with chosen paths, compiled where asked."""
    options: dict[str, Any] = {
        "checkpointing": config.activation_checkpointing,
        "device": device,
        "dtype": dtype,
    }
    if config.use_hf_model:
        from sltrain_dist.model.hf import HFLlama

        model: Any = HFLlama(config.model, config.method, **options)
    else:
        options["offload"] = config.offload_activations
        model = Llama(config.model, config.method, attention=attention, norm=norm, **options)
    if tp is not None:
        parallelize(model, tp)
    if paths is not None:
        paths.apply(model)
    if config.compile != "none":
        for block in model.blocks:
            block.compile(mode=config.compile)
    return model  # type: ignore[no-any-return]


def _lock(mesh: Mesh, folder: Path) -> object:
    """Keep other runs out of the folder for as long as this process lives."""
    held: list[object] = []
    on_first(mesh, lambda: held.append(lock_folder(folder)))
    return held


def _check_shared(mesh: Mesh, folder: Path) -> None:
    """Refuse a folder that is another one on another node: no checkpoint there could ever be whole.

    Raises:
        UserError: naming the ranks that do not see what the first one wrote.
    """
    if mesh.world_size == 1:
        return
    marker = folder / ".seen"
    on_first(mesh, marker.touch)
    waited = 0.0
    while not marker.exists() and waited < _SLOWEST_FOLDER:
        time.sleep(0.1)
        waited += 0.1
    blind = [rank for rank, seen in enumerate(gather_objects(mesh, marker.exists())) if not seen]
    on_first(mesh, lambda: marker.unlink(missing_ok=True))
    if blind:
        raise UserError(
            f"--save_dir {folder}: not the same folder on rank {blind[0]}; give one that all nodes share"
        )


def _open_data(config: TrainConfig, mesh: Mesh) -> Data:
    """Prepare on the first rank of every node, open everywhere, and compare: all ranks must have the same."""
    problem = None
    if mesh.local_rank == 0:
        try:
            with interruptible():
                prepare_data(config.data, config.model.vocab_size)
        except (UserError, InterruptError) as error:
            problem = (isinstance(error, InterruptError), str(error))
    problems = [found for found in gather_patiently(mesh, problem) if found]
    if problems:
        interrupted, text = problems[0]
        raise InterruptError(f"{text} while data was prepared") if interrupted else UserError(text)
    data = open_data(
        config.data,
        config.model.vocab_size,
        global_batch=config.total_batch_size,
        micro_batch=config.engine.batch_size,
        gradient_accumulation=config.engine.gradient_accumulation,
        dp_rank=mesh.dp_rank,
        dp_size=mesh.dp_size,
        prepare=False,
    )
    batches = len(data.evaluation(config.engine.batch_size))
    everyone = gather_objects(mesh, (data.state(0)["order"], data.tokenizer.fingerprint, batches))
    other = next((rank for rank, mine in enumerate(everyone) if mine != everyone[0]), None)
    if other is not None:
        raise UserError(
            f"--corpus {config.data.corpus}: rank {other} has other text or another tokenizer than rank 0; give files, "
            "a --cache_dir or (for stdlib) a Python that all nodes share"
        )
    return data


def _check_kernels(mesh: Mesh) -> None:
    """Refuse ranks without the kernels that others have: all would wait for the slow ones.

    Raises:
        UserError: naming the first rank that has others than rank 0.
    """
    everyone = gather_objects(mesh, kernels.loaded())
    for rank, loaded in enumerate(everyone):
        if loaded != everyone[0]:
            raise UserError(
                f"rank {rank} has compiled kernels {'+'.join(loaded) or 'none'}, rank 0 "
                f"{'+'.join(everyone[0]) or 'none'}; build them on all nodes, or set SLT_KERNELS=reference"
            )


def _seed(seed: int, dp_rank: int) -> None:
    """Seed what is left to generators: dropout, which must differ between ranks."""
    torch.manual_seed((seed * 65_537 + dp_rank) % 2**63)
    random.seed(seed)


def _resume(run: Run, found: Found) -> None:
    """Load the checkpoint that was found, if any, and cut the records back to it."""
    for warning in found.warnings:
        say(run.mesh, f"warning: {warning}")
    if found.folder is None:
        if run.config.continue_from == "auto":
            say(run.mesh, "no checkpoint to continue from: starting fresh")
        run.records.rewind({})
        return
    resumed = load(found.folder, run.engine, run.config)
    run.take(resumed.progress)
    run.began -= float(resumed.progress.metrics.get("seconds", 0.0))
    run.data.load_state(resumed.progress.data)
    if Path(found.folder).resolve().parent == run.records.folder.resolve():
        run.records.rewind(resumed.progress.metrics)
        run.kept = run.step
    else:  # its time was another run's
        run.trained = 0.0
    for message in resumed.messages:
        say(run.mesh, message)
    say(run.mesh, f"continuing from {found.folder} at update {run.step}")
