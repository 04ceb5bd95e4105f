"""Tests of the whole package; they mirror its folders."""
