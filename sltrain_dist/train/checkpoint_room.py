"""How much host memory this process may still take: what the machine has free, and what its control groups allow.

SLURM (``--mem``) and containers limit a job below the memory of its machine; psutil sees only the machine, and
a process that goes beyond the limit is killed without a word. A group's limit holds for all groups in it, so
every group from the process's own up to the root has its say.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class _Version:
    """Where a version of control groups keeps its numbers."""

    mounts: tuple[str, ...]  # below /sys/fs/cgroup; the first that is there
    limit: str
    usage: str
    reclaimable: str  # the field of memory.stat: pages of files, dropped where memory is wanted


_VERSIONS = {
    1: _Version(
        ("memory",), "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
    ),
    2: _Version(("unified", "."), "memory.max", "memory.current", "inactive_file"),
}


def available_memory() -> int | None:
    """Bytes that can be taken without swapping or being killed; None where psutil is not installed."""
    try:
        import psutil
    except ImportError:
        return None
    free = int(psutil.virtual_memory().available)
    allowed = allowed_memory(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))
    return free if allowed is None else min(free, allowed)


def allowed_memory(membership: Path, root: Path) -> int | None:
    """Bytes below the nearest limit of this process's control groups, at least 0; None where none is set.

    Args:
        membership: the file with the groups of the process, /proc/self/cgroup.
        root: where control groups are mounted, /sys/fs/cgroup.
    """
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except OSError:  # no Linux
        return None
    rests = [
        rest
        for version, group in _groups(lines)
        for folder in _folders(root, version, group)
        if (rest := _rest(folder, version)) is not None
    ]
    return max(0, min(rests)) if rests else None


def _groups(lines: list[str]) -> Iterator[tuple[_Version, str]]:
    """The groups that may limit memory, of lines "number:controllers:path"."""
    for line in lines:
        number, controllers, group = ([*line.split(":", 2), "", ""])[:3]
        if "memory" in controllers.split(","):
            yield _VERSIONS[1], group
        elif number == "0" and not controllers:
            yield _VERSIONS[2], group


def _folders(root: Path, version: _Version, group: str) -> Iterator[Path]:
    """The group's folder and all above it. In a container the path may be the host's: then the mount itself is it."""
    mount = next((root / name for name in version.mounts if (root / name).is_dir()), root)
    own = mount / group.strip("/")
    yield from (own, *(folder for folder in own.parents if folder.is_relative_to(mount)))


def _rest(folder: Path, version: _Version) -> int | None:
    """Limit less usage of one group; None without a limit, and where the files are not there."""
    try:
        limit = int((folder / version.limit).read_text())  # "max" is none
        usage = int((folder / version.usage).read_text())
    except (OSError, ValueError):
        return None
    return limit - usage + _reclaimable(folder, version)


def _reclaimable(folder: Path, version: _Version) -> int:
    try:
        fields = dict(
            line.split(" ", 1) for line in (folder / "memory.stat").read_text().splitlines()
        )
        return int(fields[version.reclaimable])
    except (OSError, ValueError, KeyError):
        return 0
