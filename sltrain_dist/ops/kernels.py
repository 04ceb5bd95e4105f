"""Loads the compiled kernels (csrc/), which register themselves for the operators declared in this folder.

They are shared libraries without any Python, beside this package or in SLT_KERNELS_DIR, each named
after the torch it was compiled against: sltrain_dist/_kernels_cpu.torch2.13.so. What does not fit is
an error, never a silent fallback to code many times slower. SLT_KERNELS=
    auto        (default) whatever was built
    reference   nothing: the plain torch implementations
    compiled    as auto, but missing kernels for a device this torch was built for are an error
"""

import functools
import os
import sys
from pathlib import Path

import torch

from sltrain_dist.utils.errors import UserError

MODES = ("auto", "reference", "compiled")
INTERFACE = (
    2  # of the operators: csrc/*/binding.cpp have the same number; count up when a schema changes
)
ISAS = ("portable", "avx2", "avx512")
BUILD = {"cpu": "SLT_BUILD=cpu pip install -e .", "cuda": "SLT_BUILD=cuda pip install -e ."}


@functools.cache
def load() -> frozenset[str]:
    """Load, once a process, what SLT_KERNELS asks for; the devices ("cpu", "cuda") that have kernels now.

    Raises UserError, one line, where a library exists but does not load or was built for another
    torch, and where SLT_KERNELS=compiled finds none.
    """
    mode = os.environ.get("SLT_KERNELS") or "auto"
    if mode not in MODES:
        raise UserError(f"SLT_KERNELS={mode}: must be one of {', '.join(MODES)}")
    if mode == "reference":
        return frozenset()
    paths = {device: library(device) for device in BUILD}
    if mode == "compiled":
        for device in ("cpu", "cuda") if torch.version.cuda else ("cpu",):
            if paths[device] is None:
                raise UserError(
                    f"SLT_KERNELS=compiled: there are no {device} kernels in {folder()}; "
                    f"build them with {BUILD[device]}"
                )
    return frozenset(device for device, path in paths.items() if _loads(device, path))


def reference_only() -> bool:
    """Whether SLT_KERNELS=reference forbids everything but the plain torch implementations."""
    return os.environ.get("SLT_KERNELS") == "reference"


def loaded() -> tuple[str, ...]:
    """The devices that have compiled kernels in this process, sorted; see ``load``."""
    return tuple(sorted(load()))


def folder() -> Path:
    """Where the libraries are looked for: SLT_KERNELS_DIR (a sanitizer's build) or the package."""
    return Path(os.environ.get("SLT_KERNELS_DIR") or Path(__file__).parents[1])


def library(device: str) -> Path | None:
    """The library for a device, or None where none was built; UserError where only other torches have one."""
    minor = ".".join(torch.__version__.split(".")[:2])
    path = folder() / f"_kernels_{device}.torch{minor}.so"
    others = sorted(folder().glob(f"_kernels_{device}*.so"))
    if path in others or not others:
        return path if others else None
    raise UserError(
        f"{others[-1]}: built for another torch than {torch.__version__}; "
        f"rebuild it with {BUILD[device]}, or set SLT_KERNELS=reference"
    )


def cpu_capability() -> str:
    """The instruction set the CPU kernels chose, such as "avx2"; "reference" where none are loaded."""
    if "cpu" not in load():
        return "reference"
    return str(torch.ops.sltrain_dist.cpu_capability())


def _loads(device: str, path: Path | None) -> bool:
    """Load one library; False where there is none. UserError where it is damaged or not what it should be."""
    if path is None:
        return False
    mend = f"rebuild it with {BUILD[device]}, or set SLT_KERNELS=reference"
    if not _is_whole(path):
        raise UserError(f"{path}: damaged, no whole shared library; {mend}")
    try:
        torch.ops.load_library(path)
    except OSError as error:
        cause = str(error.__cause__ or error).splitlines()[0].removeprefix(f"{path}: ")
        raise UserError(
            f"{path}: does not load into torch {torch.__version__} ({cause}); {mend}"
        ) from error
    interface = getattr(torch.ops.sltrain_dist, f"{device}_interface", None)
    if interface is None or interface() != INTERFACE:
        raise UserError(f"{path}: built from other sources than this package; {mend}")
    if device == "cpu":
        _check_instruction_set()
    return True


def _is_whole(path: Path) -> bool:
    """Whether an ELF file has all its sections: mapping a truncated one kills the process."""
    try:
        content = path.read_bytes()
    except OSError:
        return False
    if not content.startswith(b"\x7fELF"):
        return sys.platform != "linux" and bool(content)
    start, size, count = (
        int.from_bytes(content[a:b], "little") for a, b in ((40, 48), (58, 60), (60, 62))
    )
    return len(content) >= 64 and start + size * count <= len(content)


def _check_instruction_set() -> None:
    asked = os.environ.get("SLT_CPU_ISA", "")
    if asked and asked not in ISAS:
        raise UserError(f"SLT_CPU_ISA={asked}: must be one of {', '.join(ISAS)}")
    try:
        torch.ops.sltrain_dist.cpu_capability()
    except ValueError:
        raise UserError(f"SLT_CPU_ISA={asked}: this CPU does not have it; unset it") from None


if __name__ == "__main__":
    try:
        print(f"kernels: {' '.join(loaded()) or 'none'} (CPU: {cpu_capability()})")
    except UserError as error:
        sys.exit(f"error: {error}")
