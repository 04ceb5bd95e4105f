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
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check -e '.[dev]'
