"""torch.distributed's own parts that a run on fake tensors needs, and that are its affair to change.

Importing this file makes torch's functional collectives work on fake tensors.
"""

import torch.distributed._tools.fake_collectives  # noqa: F401
from torch.distributed.fsdp._fully_shard import _fsdp_param as fsdp_param
from torch.distributed.tensor import DTensor

__all__ = ["DTensor", "fsdp_param"]
