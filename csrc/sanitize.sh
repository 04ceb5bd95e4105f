#!/bin/sh
# The CPU kernels under the address and undefined-behaviour sanitizers, built into a scratch folder.
# Usage: csrc/sanitize.sh [pytest arguments]; without any, the tests of the operators that have kernels.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
# Compilation runs compilers of its own, under the preloaded sanitizer, and opcheck traces Python: neither is about kernels.
[ $# -gt 0 ] || set -- -k "not compile and not opcheck" \
    $(ls tests/ops/test_linear.py tests/ops/test_sparse*.py tests/ops/test_support*.py 2>/dev/null)

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
trap 'exit 1' INT TERM
# vptr needs type information that torch hides; an error ends the process, so that no test can pass over it.
flags="-g -fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=all -fno-omit-frame-pointer"
SLT_BUILD=cpu CC=g++ CXX=g++ CFLAGS="$flags" CXXFLAGS="$flags" LDFLAGS="-fsanitize=address,undefined" \
    "$python" setup.py -q build_ext --build-lib "$scratch" --build-temp "$scratch/objects" \
    >"$scratch/build.log" 2>&1 || { cat "$scratch/build.log"; exit 1; }

# The report goes to a file: pytest has the streams.
status=0
LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so)" \
    ASAN_OPTIONS="detect_leaks=0:quarantine_size_mb=32:alloc_dealloc_mismatch=0:log_path=$scratch/report" \
    UBSAN_OPTIONS="print_stacktrace=1:log_path=$scratch/report" \
    SLT_KERNELS=compiled SLT_KERNELS_DIR="$scratch/sltrain_dist" \
    "$python" -m pytest -q -p no:xdist -p no:cacheprovider "$@" || status=$?
if ls "$scratch"/report* >/dev/null 2>&1; then
    cat "$scratch"/report*
    exit 1
fi
exit $status
