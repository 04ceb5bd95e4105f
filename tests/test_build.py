"""Building and packing: what SLT_BUILD decides, what an archive holds, that a wheel brings its kernels along."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


def run(*command, cwd=ROOT, timeout=120, **environment):
    return subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def build(tmp_path, **environment):
    """Build into a folder of the test's own."""
    folders = ("--build-lib", tmp_path / "lib", "--build-temp", tmp_path / "temp")
    return run(sys.executable, "setup.py", "-q", "build_ext", *folders, **environment)


@pytest.fixture
def tree(tmp_path):
    """A copy of what a clone holds: building metadata and archives writes into the tree."""
    copy = tmp_path / "tree"
    leave = shutil.ignore_patterns(".*", "*.so", "__pycache__", "*.egg-info", "runs", "build")
    shutil.copytree(ROOT, copy, ignore=leave)
    return copy


def libraries(folder):
    return sorted(path.name for path in Path(folder).rglob("*.so"))


def test_none_builds_nothing(tmp_path):
    done = build(tmp_path, SLT_BUILD="none")
    assert done.returncode == 0, done.stderr
    assert not libraries(tmp_path)


def test_wrong_choice(tmp_path):
    done = build(tmp_path, SLT_BUILD="gpu")
    assert done.returncode != 0
    assert done.stderr.strip() == "SLT_BUILD=gpu: must be one of none, cpu, cuda, or unset"


def test_no_compiler(tmp_path):
    """Pure Python and a line that says so; an error where kernels were asked for."""
    environment = {"PATH": str(tmp_path), "CXX": ""}
    done = build(tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    assert not libraries(tmp_path)
    line = "sltrain_dist: no kernels, no C++ compiler: the Python reference takes their place"
    assert done.stdout.splitlines()[0] == line  # libraries built before are named after it
    for asked in ("cpu", "cuda"):
        done = build(tmp_path, SLT_BUILD=asked, **environment)
        assert done.returncode != 0
        assert done.stderr.strip() == f"SLT_BUILD={asked}: no kernels, no C++ compiler"


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch is a CUDA build")
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_cuda_without_a_cuda_torch(tmp_path):
    done = build(tmp_path, SLT_BUILD="cuda")
    assert done.returncode != 0
    what = f"no CUDA kernels, torch {torch.__version__} is no CUDA build"
    assert done.stderr.strip() == f"SLT_BUILD=cuda: {what}"


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_cuda_without_nvcc(tmp_path):
    """A CUDA build of torch is played: only the version it names is read before nvcc is looked for."""
    play = "import sys, torch; torch.version.cuda = '13.0'; sys.argv = ['setup.py', 'build_ext']"
    block = f"{play}; import runpy; runpy.run_path('setup.py', run_name='__main__')"
    done = run(
        sys.executable, "-c", block, SLT_BUILD="cuda", CUDA_HOME=str(tmp_path), PYTHONPATH=str(ROOT)
    )
    assert done.returncode != 0
    what = f"no CUDA kernels, no nvcc at {tmp_path}/bin/nvcc"
    assert done.stderr.strip() == f"SLT_BUILD=cuda: {what}"


def test_torch_is_required_only_where_none_fits(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "csrc"))
    import build_backend

    monkeypatch.delenv("SLT_BUILD", raising=False)
    monkeypatch.setattr(build_backend, "compiler", lambda: "g++")
    requirement = build_backend.torch_requirement()
    assert requirement in (ROOT / "pyproject.toml").read_text()
    for version, expected in {
        torch.__version__: False,
        "2.11.0": False,
        "2.10.1": True,
        "3.0": True,
        None: True,
    }.items():
        monkeypatch.setattr(build_backend, "torch_version", lambda path, found=version: found)
        assert (requirement in build_backend.missing_requirements()) == expected
    monkeypatch.setattr(build_backend, "compiler", lambda: None)
    assert build_backend.missing_requirements() == []


def test_isolated_build_sees_the_targets_torch():
    """As pip isolates: nothing of the target can be imported, but the interpreter is the target's."""
    block = (
        "import sys; here = sys.path[:]; "
        "sys.path = [p for p in here if 'site-packages' not in p] + ['csrc', *here]; "
        "from build_backend import target_path, torch_version; "
        "print(torch_version(target_path()))"
    )
    done = run(sys.executable, "-c", block, PYTHONPATH="/nowhere", PYTHONNOUSERSITE="1")
    version = done.stdout.strip().split("+")[0]  # the package index leaves "+cu130" out
    assert version == torch.__version__.split("+")[0], done.stderr


def test_source_archive_holds_the_sources(tree, tmp_path):
    done = run(sys.executable, "setup.py", "-q", "sdist", "--dist-dir", tmp_path, cwd=tree)
    assert done.returncode == 0, done.stderr
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        held = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.*")}
    sources = {name for name in sources if not name.endswith(".pyc") and ".gitkeep" not in name}
    assert sources <= held
    assert {"setup.py", "pyproject.toml", "sltrain_dist/ops/kernels.py"} <= held
    assert not [name for name in held if name.endswith(".so")]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_wheel_brings_its_kernels(tree, tmp_path):
    """`python -m build`, then the wheel in an environment that borrows torch and has nothing else of ours."""
    output = tmp_path / "dist"
    done = run(sys.executable, "-m", "build", "-o", output, cwd=tree, timeout=1000, SLT_BUILD="cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    assert not [line for line in done.stdout.splitlines() if "csrc" in line and "warning:" in line]
    wheel = next(output.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        assert [name for name in archive.namelist() if "_kernels_cpu" in name]
        assert "sltrain_dist/tools/report_page/page.html" in archive.namelist()
    python = tmp_path / "venv" / "bin" / "python"
    assert run(sys.executable, "-m", "venv", tmp_path / "venv").returncode == 0
    done = run(python, "-m", "pip", "install", "--no-deps", "--no-index", wheel)
    assert done.returncode == 0, done.stderr
    borrow = f"import sys; sys.path.append({str(Path(torch.__file__).parents[1])!r}); "
    load = "from sltrain_dist.ops import kernels; print(kernels.__file__, *kernels.loaded())"
    done = run(python, "-c", borrow + load, cwd=tmp_path, SLT_KERNELS="compiled", PYTHONPATH="")
    assert str(tmp_path) in done.stdout
    assert done.stdout.split()[-1] == "cpu", done.stderr


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_sanitizers():
    """The operators' tests on CPU kernels with the address and undefined-behaviour sanitizers."""
    done = run("sh", "csrc/sanitize.sh", timeout=1700, PYTHON=sys.executable)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
