"""The doctor's checks of machines and what is installed on them: the same everywhere, and able to talk."""

import hashlib
import importlib.metadata
import platform
import re
import shutil
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import sltrain_dist
from sltrain_dist.ops import kernels
from sltrain_dist.parallel import mesh as meshes
from sltrain_dist.parallel.links import Speeds, measure_links
from sltrain_dist.parallel.reach import clock_skew
from sltrain_dist.tools.doctor_visit import Outcome, Visit, failed, passed, skipped
from sltrain_dist.train.summary import human_bytes

OLDEST = {"python": (3, 10), "torch": (2, 11), "deepspeed": (0, 19), "transformers": (4, 56)}
_ABSENT = "absent"
_SKEW = 1.0  # seconds between clocks: above, times in logs and heartbeats of two nodes cannot be compared
_SLOW = 0.1  # of the median of links of its kind, below which one is sick
_FEW = 4  # links of a kind, below which a median says nothing


def meet(visit: Visit) -> Outcome:
    """All ranks have met: the visit has the meeting already."""
    size, hosts = visit.meeting.world_size, sorted(set(visit.meeting.hosts))
    return passed(
        f"{size} rank{'s' * (size > 1)} on {', '.join(hosts[:8])}{' ...' * (len(hosts) > 8)}"
    )


def source_digest() -> str:
    """Of the package's Python sources: two checkouts of one version may differ."""
    summary, root = hashlib.sha256(), Path(sltrain_dist.__file__).parent
    for path in sorted(root.rglob("*.py")):
        summary.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return summary.hexdigest()[:12]


def versions(visit: Visit) -> Outcome:
    """Equal on all ranks, and new enough."""
    own = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("deepspeed", "transformers"):
        try:
            own[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            own[name] = _ABSENT
    own["sltrain_dist"] = f"{sltrain_dist.__version__} (sources {source_digest()})"
    everyone: list[dict[str, str]] = visit.meeting.gather(own)
    place = visit.meeting.place
    if (rank := visit.first_other(everyone)) is not None:
        name = next(name for name in own if everyone[rank][name] != everyone[0][name])
        return failed(
            f"{place(rank)} has {name} {everyone[rank][name]}, {place(0)} {everyone[0][name]}",
            "give all nodes one environment and one checkout, on a folder that they share or installed alike",
        )
    needed = {
        "deepspeed": visit.config.engine.engine == "zero",
        "transformers": visit.config.use_hf_model,
    }
    for name, oldest in OLDEST.items():
        if own[name] == _ABSENT and not needed.get(name):
            continue
        if _numbers(own[name]) < oldest:
            text = ".".join(map(str, oldest))
            return failed(
                f"{name} {own[name]}: {text} or newer is needed", f"pip install '{name}>={text}'"
            )
    return passed(", ".join(f"{name} {version}" for name, version in own.items()))


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def settings(visit: Visit) -> Outcome:
    """Every rank makes the same configuration of its flags."""
    own = _flat(asdict(visit.config))
    own.pop("command", None)
    everyone: list[dict[str, Any]] = visit.meeting.gather(own)
    if (rank := visit.first_other(everyone)) is None:
        config = visit.config
        stage = f"zero-{config.engine.stage}" if config.engine.engine == "zero" else "fsdp"
        return passed(
            f"{config.model.name}, {config.method.method}, {stage}, the same on all ranks"
        )
    mine, first = everyone[rank], everyone[0]
    name = next(name for name in [*first, *mine] if mine.get(name) != first.get(name))
    return failed(
        f"{visit.meeting.place(rank)} has {name} {mine.get(name)}, rank 0 {first.get(name)}",
        "start all ranks with the same flags and the same ds JSON",
    )


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves of nested dictionaries by dotted names; sequences as text, as JSON has no tuples."""
    if not isinstance(tree, dict):
        return {prefix: str(tree)}
    return {
        name: leaf
        for key, value in tree.items()
        for name, leaf in _flat(value, f"{prefix}.{key}" if prefix else str(key)).items()
    }


def devices(visit: Visit) -> Outcome:
    """A GPU for each rank, alike, with a driver; or none at all."""
    own: dict[str, Any] = {"gpus": torch.cuda.device_count() if torch.cuda.is_available() else 0}
    if own["gpus"]:
        place = min(meshes.launched_local_rank(), own["gpus"] - 1)
        gpu = torch.cuda.get_device_properties(place)
        own |= {"name": gpu.name, "memory": gpu.total_memory, "driver": _driver()}
        own |= {"cuda": torch.version.cuda, "nccl": ".".join(map(str, torch.cuda.nccl.version()))}
    everyone: list[dict[str, Any]] = visit.meeting.gather(
        own | {"local": meshes.launched_local_rank()}
    )
    for rank, found in enumerate(everyone):
        place_, gpus = visit.meeting.place(rank), found["gpus"]
        if bool(gpus) != bool(everyone[0]["gpus"]):
            return failed(
                f"{place_} sees {gpus} GPUs, rank 0 {everyone[0]['gpus']}",
                "see nvidia-smi there, CUDA_VISIBLE_DEVICES and the job's --gres",
            )
        if gpus and found["local"] >= gpus:
            return failed(
                f"{place_} is process {found['local']} of a machine with {gpus} GPUs",
                "start at most as many processes on a machine as it has GPUs (--nproc_per_node, --num_gpus)",
            )
    if not own["gpus"]:
        built = (
            f", though torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else ""
        )
        return skipped(f"no GPU on any rank{built}: the run will use CPUs")
    for name in ("name", "memory", "driver", "cuda"):
        values = [found[name] for found in everyone]
        if (rank_ := visit.first_other(values)) is not None:
            return failed(
                f"{visit.meeting.place(rank_)} has {name} {values[rank_]}, rank 0 {values[0]}",
                "use nodes of one kind (#SBATCH --constraint), with one driver",
            )
    memory = human_bytes(own["memory"])
    return passed(
        f"{own['name']}, {memory}, driver {own['driver']}, CUDA {own['cuda']}, NCCL {own['nccl']} on all"
    )


def _driver() -> str:
    """The release of NVIDIA's driver; "unknown" where nvidia-smi is not there."""
    if shutil.which("nvidia-smi") is None:
        return "unknown"
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return (done.stdout.split() or ["unknown"])[0]


def clock(visit: Visit) -> Outcome:
    """Clocks agree with rank 0's."""
    if visit.meeting.world_size == 1:
        return skipped("one rank: no other clock")
    skews = visit.meeting.gather(clock_skew(visit.meeting))
    worst = max(range(1, len(skews)), key=lambda rank: abs(skews[rank][0]) - skews[rank][1])
    ahead, error = skews[worst]
    text = f"{visit.meeting.place(worst)} is {1e3 * ahead:+.1f} ms from rank 0 (within {1e3 * error:.1f} ms)"
    if abs(ahead) - error > _SKEW:
        return failed(text, "let chrony or another NTP client set that node's clock")
    return passed(text)


def kernels_loaded(visit: Visit) -> Outcome:
    """What SLT_KERNELS asks for is there, and the same on all ranks; raises UserError where it is not."""
    own = [list(kernels.loaded()), kernels.cpu_capability()]
    everyone = visit.meeting.gather(own)
    names = ["+".join(loaded) or "none" for loaded, _ in everyone]
    if (rank := visit.first_other(names)) is not None:
        return failed(
            f"{visit.meeting.place(rank)} has compiled kernels {names[rank]}, rank 0 {names[0]}",
            "build them on all nodes (pip install -e .), or set SLT_KERNELS=reference",
        )
    if own[0]:
        return passed(f"{names[0]} ({own[1]})")
    return passed(
        "none: plain torch, which is slower; pip install -e . builds them where there is a compiler"
    )


def links(visit: Visit) -> Outcome:
    """Collectives work, and no connection is far slower than the others; leaves the mesh in the visit."""
    engine, meeting = visit.config.engine, visit.meeting
    tensor_parallel, replicate = meeting.gather([engine.tensor_parallel, engine.replicate])[0]
    store = meeting.part("links")
    axes = (None, tensor_parallel, replicate)
    try:
        mesh = meshes.initialise(visit.options.meet_timeout, *axes, store=store)
        speeds = measure_links(mesh) if mesh.world_size > 1 else None
        meshes.close()
    except (RuntimeError, ValueError) as error:
        reason = (str(error).strip().splitlines() or ["no answer"])[0][:200]
        return failed(
            f"ranks met, but cannot send to each other: {reason}",
            "set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the interface that joins the nodes, open the firewall "
            "between them, and see NCCL_DEBUG=INFO",
        )
    # Once more, with the run's own time limit: what follows may take longer.
    store = meeting.part("checks")
    visit.mesh = meshes.initialise(visit.config.timeout, *axes, store=store)
    return passed("one rank: nothing to send") if speeds is None else judge(speeds, meeting.hosts)


def judge(speeds: Speeds, hosts: list[str]) -> Outcome:
    """The slowest link by name, and whether it is far below the others of its kind (inside a host, or between two)."""

    def name(link: Any) -> str:
        return f"ranks {link.first} and {link.second} ({hosts[link.first]}, {hosts[link.second]})"

    for inside in (True, False):
        kind = [one for one in speeds.links if (hosts[one.first] == hosts[one.second]) is inside]
        median = kind[len(kind) // 2].rate if kind else 0.0
        if len(kind) >= _FEW and kind[0].rate < _SLOW * median:
            return failed(
                f"{name(kind[0])} exchange {_rate(kind[0].rate)}, the median of such links is {_rate(median)}",
                "leave that node out (#SBATCH --exclude) and have its cable or card looked at",
            )
    slowest = speeds.links[0]
    return passed(
        f"all-reduce {_rate(speeds.all_reduce)}, slowest link {name(slowest)} {_rate(slowest.rate)}"
    )


def _rate(rate: float) -> str:
    return f"{rate / 1e9:.2f} GB/s"
