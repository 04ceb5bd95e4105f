"""Foundations without a subject of their own: the user-facing error and counter-based random numbers."""
