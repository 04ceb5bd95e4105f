#!/bin/sh
# Format of every source; every CUDA source compiled for Ampere and Hopper with nvcc, and its binding parsed against torch's
# headers: all without a GPU and without a CUDA build of torch. What is not installed is named and skipped.
set -eu
cd "$(dirname "$0")"

if command -v clang-format >/dev/null; then
    for source in $(find cpu cuda -name '*.cpp' -o -name '*.h' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh' | sort); do
        clang-format --dry-run --Werror --ferror-limit=1 "$source" || unformatted="${unformatted:-} csrc/$source"
    done
    [ -z "${unformatted:-}" ] || {
        echo "error: mend the format with: clang-format -i$unformatted" >&2
        exit 1
    }
else
    echo "clang-format is not installed: the format of csrc is not checked"
fi

nvcc=$(command -v nvcc || command -v /usr/local/cuda/bin/nvcc) || {
    echo "nvcc is not installed: the compile check of csrc/cuda is skipped"
    exit 0
}
for source in cuda/*.cu; do
    echo "nvcc $source"
    "$nvcc" -std=c++20 -O3 -Werror all-warnings \
        -gencode arch=compute_80,code=sm_80 -gencode arch=compute_90a,code=sm_90a -c "$source" -o /dev/null
done

# The folder that holds the toolkit, asked of nvcc: the one on PATH may be a wrapper.
toolkit=$("$nvcc" --dryrun x.cu 2>&1 | sed -n 's/^#\$ TOP=//p')
torch=$(python -c 'from torch.utils.cpp_extension import include_paths; print(*include_paths())' 2>/dev/null) || {
    echo "torch is not installed: csrc/cuda/*.cpp are not parsed"
    exit 0
}
system=$(for path in $torch "$toolkit/include"; do printf ' -isystem %s' "$path"; done)
for source in cuda/*.cpp; do
    echo "${CXX:-g++} -fsyntax-only $source"
    # A CPU build of torch lacks the one generated header of c10/cuda; it only says how torch was linked.
    # shellcheck disable=SC2086
    ${CXX:-g++} -std=c++20 -Wall -Wextra -Werror -fsyntax-only -DC10_CUDA_NO_CMAKE_CONFIGURE_FILE $system "$source"
done
