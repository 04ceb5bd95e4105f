#!/bin/sh
# Usage: install.sh PYTHON VENV. Makes a virtual environment and installs the project with its tests and checks into it.
# A machine without an NVIDIA driver gets torch 2.13.0 in the build its package index offers; set PIP_INDEX_URL,
# PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS to point pip at CPU-only builds where you have them.
set -eu
python=$1
venv=$2

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
    echo "error: $python is $("$python" --version 2>&1); Python 3.10 or newer is needed: make PYTHON=python3.11" >&2
    exit 2
}
"$python" -m venv "$venv" 2>/dev/null || {
    # Debian and Ubuntu split venv's pip into a package of its own.
    echo "no venv module: trying virtualenv" >&2
    "$python" -m pip install --user virtualenv && "$python" -m virtualenv "$venv"
}

# Kernels are compiled on this machine. Without a compiler the package works too, on its Python reference.
compiler() {
    for name in ${CXX:-g++ c++ clang++}; do command -v "$name" >/dev/null && return; done
    return 1
}
if [ "${SLT_BUILD:-}" != none ] && ! compiler; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        echo "no C++ compiler: trying apt-get install g++" >&2
        { apt-get install -y -qq g++ || { apt-get update -qq && apt-get install -y -qq g++; }; } >/dev/null 2>&1 || true
    fi
    compiler || echo "no C++ compiler: going on without compiled kernels (later: install g++, then make -B setup)" >&2
fi
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check -e '.[dev]'
"$venv/bin/python" -m sltrain_dist.ops.kernels
