"""One thread a process: the suite runs on few cores, often with two ranks beside it."""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import torch

torch.set_num_threads(1)
