"""Tests of sltrain_dist.data."""
