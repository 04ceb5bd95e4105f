"""Processes and engines: the mesh, the engine protocol, and its FSDP2 and DeepSpeed ZeRO back ends."""
