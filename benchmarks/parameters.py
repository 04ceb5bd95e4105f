#!/usr/bin/env python
"""Trained parameters of the paper's sizes, full rank and SLTrain, counted on the meta device."""

import argparse

from sltrain_dist.config import MethodConfig, ModelConfig
from sltrain_dist.model.llama import Llama
from sltrain_dist.params import count_parameters

SIZES = {
    "60m": (128, 0.03),
    "130m": (256, 0.03),
    "350m": (256, 0.03),
    "1b": (512, 0.03),
    "7b": (1024, 0.05),
}


def main() -> None:
    """Count and print one line per size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--support", choices=("fan_in", "uniform", "block"), default="uniform")
    support = parser.parse_args().support
    print(
        f"{'size':>5} {'full rank':>10} {'sltrain':>10} {'low rank':>10} {'sparse':>10} {'indices':>12}"
    )
    for size, (rank, density) in SIZES.items():
        config = ModelConfig.load(size)
        full = count_parameters(Llama(config, MethodConfig(method="full")))
        method = MethodConfig(rank=rank, density=density, support=support)
        ours = count_parameters(Llama(config, method))
        millions = [full["total"], ours["total"], ours["low_rank"], ours["sparse"]]
        row = " ".join(f"{count / 1e6:9.1f}M" for count in millions)
        print(f"{size:>5} {row} {ours['indices_bytes'] / 1e6:9.1f} MB")


if __name__ == "__main__":
    main()
