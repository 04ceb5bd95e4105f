"""Builds the compiled kernels of csrc/; everything else about the package stands in pyproject.toml.

SLT_BUILD=none|cpu|cuda overrides what is built. There are no kernels in csrc/ yet, so every choice
builds the pure Python package; the reference implementations in sltrain_dist/ops run everywhere.
"""

import os
import sys
from pathlib import Path

from setuptools import setup

CHOICES = ("none", "cpu", "cuda")
choice = os.environ.get("SLT_BUILD", "cpu")
if choice not in CHOICES:
    sys.exit(f"SLT_BUILD={choice}: must be one of {', '.join(CHOICES)}")
sources = sorted(str(path) for path in Path("csrc").glob("*/*.c*"))
if choice != "none" and sources:
    sys.exit(f"csrc holds {sources}, but this setup.py builds none: it is older than the sources")

setup()
