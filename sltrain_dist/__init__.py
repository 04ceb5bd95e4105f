"""sltrain_dist: distributed pre-training of LLaMA models with sparse-plus-low-rank linears."""

__version__ = "0.1.0"
