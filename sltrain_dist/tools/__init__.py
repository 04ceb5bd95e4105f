"""Offline tools behind the launchers. None yet: planning, export and reports come with later versions."""
