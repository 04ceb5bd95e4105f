"""Memory for a model that was made on the meta device, one parameter after the other."""

from collections.abc import Iterator

import torch
from torch import nn


class OneByOne(nn.Module):
    """A view of a meta model whose parameters() makes them real one at a time, in place.

    Handed to deepspeed.zero.Init, which walks that iterator and cuts each parameter before it asks for
    the next. Its usual form, a context around the constructor, would cast every float tensor made in
    there to the training dtype and replace torch's constructors for the whole process.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.__dict__["source"] = (
            model  # not a child: its parameters must not be seen before they are real
        )
        self.device = device

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Replace each meta parameter by an uninitialised real one and yield it; tied ones once."""
        made: dict[int, nn.Parameter] = {}
        for module in self.__dict__["source"].modules():
            for name, meta in list(module.named_parameters(recurse=False, remove_duplicate=False)):
                fresh = id(meta) not in made
                if fresh:
                    empty = torch.empty_like(meta, device=self.device)
                    made[id(meta)] = nn.Parameter(empty, requires_grad=meta.requires_grad)
                setattr(module, name, made[id(meta)])
                if fresh:
                    yield made[id(meta)]
