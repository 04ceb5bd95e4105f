"""PEP 517 backend: setuptools, plus torch as a build requirement where the target has none that fits.

The kernels must be compiled against the torch they will run with. pip builds in an isolated
environment where the target's torch cannot be imported but is on the same disk and belongs to the
same interpreter, so setup.py looks for it there. Only where there is none (``python -m build``, an
empty environment) is torch asked for, in the range of the package's own dependencies. A constant
``requires`` in pyproject.toml would download torch for every install and could compile against another.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import distributions
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import (
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

CHOICES = ("none", "cpu", "cuda")


def choice() -> str:
    """SLT_BUILD, or "" where it is unset: whatever this machine can build. A wrong value ends the build."""
    value = os.environ.get("SLT_BUILD", "")
    if value not in ("", *CHOICES):
        sys.exit(f"SLT_BUILD={value}: must be one of {', '.join(CHOICES)}, or unset")
    return value


def compiler() -> str | None:
    """The C++ compiler: CXX where it is set, else the first of g++, c++ and clang++; None if absent."""
    asked = os.environ.get("CXX")
    for name in [asked] if asked else ["g++", "c++", "clang++"]:
        if shutil.which(shlex.split(name)[0]):
            return name
    return None


def target_path() -> list[str]:
    """Where the interpreter that will run the package looks for modules, isolated build or not."""
    hidden = ("PYTHONPATH", "PYTHONNOUSERSITE", "PYTHONHOME")  # how pip isolates a build
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    show = "import json, sys; print(json.dumps(sys.path[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", show], env=environment, capture_output=True, text=True, check=True
    )
    return [path for path in json.loads(done.stdout.splitlines()[-1]) if path]


def torch_requirement() -> str:
    """The line about torch in the dependencies of pyproject.toml, such as ``torch>=2.11,<=2.13.0``."""
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    found = re.search(r'"(torch[<>=][^"]*)"', text)
    if found is None:
        sys.exit("pyproject.toml: no line about torch in its dependencies")
    return found[1]


def torch_version(path: Iterable[str]) -> str | None:
    """The version of the torch installed somewhere along ``path``; nothing is imported."""
    return next((found.version for found in distributions(name="torch", path=list(path))), None)


def fits(version: str, requirement: str) -> bool:
    """Whether a version of torch, its local part apart, is in the range of the requirement."""
    from packaging.requirements import Requirement

    return Requirement(requirement).specifier.contains(version, prereleases=True)


def missing_requirements() -> list[str]:
    """What compiling the kernels needs and the target lacks; nothing where no kernels are built."""
    if choice() == "none" or compiler() is None:
        return []
    needed = [] if shutil.which("ninja") else ["ninja"]
    requirement = torch_requirement()
    version = torch_version([*sys.path, *target_path()])
    return needed if version and fits(version, requirement) else [*needed, requirement]


def get_requires_for_build_wheel(config_settings: dict[str, str] | None = None) -> list[str]:
    """setuptools' requirements and the missing ones."""
    return [*build_meta.get_requires_for_build_wheel(config_settings), *missing_requirements()]


def get_requires_for_build_editable(config_settings: dict[str, str] | None = None) -> list[str]:
    """setuptools' requirements and the missing ones."""
    return [*build_meta.get_requires_for_build_editable(config_settings), *missing_requirements()]
