#!/bin/sh
# Compile every CUDA source for Ampere and Hopper with nvcc, without a GPU and without a CUDA build of torch.
set -eu
cd "$(dirname "$0")"
found=$(find cuda -name '*.cu' | sort)
if [ -z "$found" ]; then
    echo "no CUDA sources yet"
    exit 0
fi
nvcc=$(command -v nvcc || command -v /usr/local/cuda/bin/nvcc) || {
    echo "nvcc is not installed: the compile check of csrc/cuda is skipped"
    exit 0
}
for source in $found; do
    echo "nvcc $source"
    "$nvcc" -std=c++17 -O3 -gencode arch=compute_80,code=sm_80 -gencode arch=compute_90a,code=sm_90a \
        -c "$source" -o /dev/null
done
