"""Offline tools behind the launchers: weights in and out."""
