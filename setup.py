"""Builds the compiled kernels of csrc/; everything else about the package stands in pyproject.toml.

CPU kernels are built wherever there is a C++ compiler, CUDA kernels where nvcc and a CUDA build of
torch are: never because a GPU happens to be visible, so a login node builds what a GPU node runs.
SLT_BUILD=none|cpu|cuda overrides (cuda: both); what was asked for and cannot be built is an error.

The libraries hold no Python, only registrations with torch's dispatcher, so one serves every Python;
but torch's C++ interface changes between minor releases, so the file's name carries torch's.
"""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT / "csrc"))
from build_backend import choice, compiler, target_path, torch_version  # noqa: E402

# setuptools runs this file for metadata and source archives too: there torch may be out of reach.
COMPILING = {"build", "build_ext", "bdist_wheel", "editable_wheel", "develop", "install"}
# PTX of 8.0 lets later GPUs compile what they need; that of 9.0a runs on 9.0 alone.
ARCHITECTURES = "8.0+PTX;9.0a"
# torch forbids the arithmetic of half and bfloat16 in .cu files by default; ours are free of its headers.
HALF = ["HALF_OPERATORS", "HALF_CONVERSIONS", "HALF2_OPERATORS", "BFLOAT16_CONVERSIONS"]


def missing(asked: str, what: str) -> list:
    """End the build if these kernels were asked for, else say why there are none."""
    if asked:
        sys.exit(f"SLT_BUILD={asked}: {what}")
    print(f"sltrain_dist: {what}: the Python reference takes their place", flush=True)
    return []


def find_torch() -> bool:
    """Whether torch can be imported, from the target's own folders if the build is isolated."""
    if importlib.util.find_spec("torch") is None:
        target = target_path()
        if torch_version(target) is None:
            return False
        sys.path.extend(path for path in target if path not in sys.path)
    return True


def host_flags() -> list[str]:
    """For every C++ file: torch's headers count as the system's, so that only ours give warnings."""
    from torch.utils.cpp_extension import include_paths

    headers = [flag for path in include_paths() for flag in ("-isystem", path)]
    return ["-O3", "-std=c++20", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi", *headers]


def cxx_flags(cxx: str) -> list[str]:
    """Optimised, portable between machines (no -march), threaded through the OpenMP of torch itself."""
    # The interpreter's own flags ask for debug information, ten times the size of the library.
    keep = "-g" in os.environ.get("CFLAGS", "").split()
    flags = [*host_flags(), *([] if keep else ["-g0"])]
    version = subprocess.run([*shlex.split(cxx), "--version"], capture_output=True, text=True)
    if sys.platform != "linux" or "clang" in version.stdout.lower():
        # Clang's code wants a runtime of its own, which knows nothing of torch.set_num_threads.
        print(f"sltrain_dist: {cxx} is not GCC: CPU kernels on one thread", flush=True)
        return [*flags, "-Wno-unknown-pragmas"]
    # Compiled but not linked with OpenMP: its symbols are found in the one that libtorch_cpu brings,
    # whatever its name. A second libgomp in the process would start threads of its own.
    return [*flags, "-fopenmp"]


def cuda_home(nvcc: str) -> str:
    """The toolkit's folder, asked of nvcc itself: the one on PATH may be a wrapper or a link."""
    done = subprocess.run([nvcc, "--dryrun", "x.cu"], capture_output=True, text=True)
    found = re.search(r"^#\$ TOP=(.+)$", done.stderr, re.MULTILINE)
    return os.path.realpath(found[1].strip() if found else Path(nvcc).resolve().parents[1])


def sources(folder: str) -> dict:
    """Sources of csrc/folder, and the headers they depend on."""
    files = [path for path in Path("csrc", folder).iterdir() if path.is_file()]
    return {
        "sources": sorted(str(path) for path in files if path.suffix in (".cpp", ".cu")),
        "depends": sorted(str(path) for path in files if path.suffix in (".h", ".inl", ".cuh")),
    }


def cpu_extensions(cxx: str) -> list:
    """The CPU kernels."""
    from torch.utils.cpp_extension import CppExtension

    name = "sltrain_dist._kernels_cpu"
    flags = {"cxx": cxx_flags(cxx)}
    # py_limited_api leaves out libtorch_python: there is no Python in these libraries.
    return [CppExtension(name, **sources("cpu"), extra_compile_args=flags, py_limited_api=True)]


def cuda_extensions(asked: str) -> list:
    """The CUDA kernels, or none where there is no nvcc, no CUDA build of torch, or the two do not match."""
    import torch

    asked = asked if asked == "cuda" else ""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = str(Path(home, "bin", "nvcc")) if home else shutil.which("nvcc")
    nvcc = nvcc or shutil.which("/usr/local/cuda/bin/nvcc")
    if torch.version.cuda is None:
        return missing(asked, f"no CUDA kernels, torch {torch.__version__} is no CUDA build")
    if nvcc is None or not shutil.which(nvcc):
        return missing(asked, f"no CUDA kernels, no nvcc {f'at {nvcc}' if nvcc else 'on PATH'}")
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)\.", version)
    if release is None or release[1] != torch.version.cuda.split(".")[0]:
        what = f"nvcc {release[1] if release else '?'}.x, but torch is built for CUDA"
        return missing(asked, f"no CUDA kernels, {what} {torch.version.cuda}")
    os.environ["CUDA_HOME"] = cuda_home(nvcc)
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ARCHITECTURES)
    from torch.utils.cpp_extension import CUDAExtension

    flags = {
        "cxx": [*host_flags(), "-g0"],
        "nvcc": ["-O3", "-std=c++20", "-Xcompiler=-fvisibility=hidden"]
        + [f"-U__CUDA_NO_{name}__" for name in HALF],
    }
    name = "sltrain_dist._kernels_cuda"
    return [CUDAExtension(name, **sources("cuda"), extra_compile_args=flags, py_limited_api=True)]


def extensions(asked: str) -> list:
    """What is compiled here; ends the build where that is less than was asked for."""
    found = chosen(asked)
    if not found:
        for path in sorted(ROOT.glob("sltrain_dist/_kernels_*.so")):
            print(
                f"sltrain_dist: {path.name} of an earlier build stays in use here; delete it if that is not meant"
            )
    return found


def chosen(asked: str) -> list:
    """The extensions that can be built and are wanted."""
    if asked == "none":
        return []
    cxx = compiler()
    if cxx is None:
        name = f" ({os.environ['CXX']})" if os.environ.get("CXX") else ""
        return missing(asked, f"no kernels, no C++ compiler{name}")
    if not find_torch():
        return missing(asked, "no kernels, torch is not installed")
    # The interpreter may have been built by a compiler that is not on this machine.
    os.environ["CXX"] = cxx
    os.environ.setdefault("CC", cxx)
    cuda = [] if asked == "cpu" else cuda_extensions(asked)
    return [one for one in [*cpu_extensions(cxx), *cuda] if one.sources]


def build_command() -> type:
    """torch's build_ext, with torch's minor release in the name of the file."""
    import torch
    from torch.utils.cpp_extension import BuildExtension, is_ninja_available

    minor = ".".join(torch.__version__.split(".")[:2])

    class BuildKernels(BuildExtension.with_options(use_ninja=is_ninja_available())):
        def get_ext_filename(self, name: str) -> str:
            return os.path.join(*name.split(".")) + f".torch{minor}.so"

    return BuildKernels


asked = choice()
found = extensions(asked) if COMPILING & set(sys.argv) else []
if found:
    # One wheel for every Python >= 3.10; free-threaded builds do not know that tag.
    tag = {} if sysconfig.get_config_var("Py_GIL_DISABLED") else {"py_limited_api": "cp310"}
    setup(ext_modules=found, cmdclass={"build_ext": build_command()}, options={"bdist_wheel": tag})
else:
    setup()
