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
from pathlib import Path

import torch

from sltrain_dist.utils.errors import UserError

MODES = ("auto", "reference", "compiled")
BUILD = {"cpu": "SLT_BUILD=cpu pip install -e .", "cuda": "SLT_BUILD=cuda pip install -e ."}


@functools.cache
def load() -> frozenset[str]:
    """Load, once a process, what SLT_KERNELS asks for; the devices ("cpu", "cuda") that have kernels now.

    Raises UserError, one line, where a library exists but does not load or was built for another
    torch, and where SLT_KERNELS=compiled finds none.
    """
    mode = os.environ.get("SLT_KERNELS", "auto")
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
    """The instruction set the CPU kernels chose, such as "AVX2"; "reference" where none are loaded."""
    if "cpu" not in load():
        return "reference"
    return str(torch.ops.sltrain_dist.cpu_capability())


def _loads(device: str, path: Path | None) -> bool:
    """Load one library; False where there is none."""
    if path is None:
        return False
    try:
        torch.ops.load_library(path)
    except OSError as error:
        cause = str(error.__cause__ or error).splitlines()[0]
        raise UserError(
            f"{path}: does not load into torch {torch.__version__} ({cause}); "
            f"rebuild it with {BUILD[device]}, or set SLT_KERNELS=reference"
        ) from error
    return True


if __name__ == "__main__":
    print(f"kernels: {' '.join(loaded()) or 'none'} (CPU: {cpu_capability()})")
