"""Which bytes are alive at every moment of a run on fake tensors, and what they are for.

A dispatch mode sees every operator. Each new storage becomes an entry, its end is noticed through a weak
reference, and all of it goes to one list of (entry, bytes more or less) from which the peak follows
afterwards, when it is known what every entry was. What an operator of our own uses inside itself cannot be
seen; it declares it (``workspace_bytes``), and `WORKSPACES` adds it at the moment of the call.
"""

import contextlib
import math
import sys
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._guards import active_fake_mode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sltrain_dist.parallel.fake import DTensor
from sltrain_dist.tools.plan_workspace import workspace
from sltrain_dist.train.memory import KINDS

# What these operators of torch read and write is memory of a collective.
_GATHERED = ("fsdp::all_gather_copy_in", "fsdp::split_with_sizes_copy")
_REDUCED = ("fsdp::chunk_cat",)
_COLLECTIVES = (
    "c10d::_allgather_base_",
    "c10d::_reduce_scatter_base_",
    "c10d::allgather_into_tensor_coalesced_",
)


class Live(TorchDispatchMode):
    """Enter it inside a FakeTensorMode, run, leave, and ask for `peak` or `history`.

    phase: the kind that new storages get. device: "cpu" or "cuda", for which workspaces count.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device
        self.phase = "workspaces"
        self.events: list[tuple[int, int]] = []
        self.kinds: list[str] = []
        self._sizes: list[int] = []
        self._entries: dict[int, int] = {}  # id of a storage that lives -> its entry
        self._after_copy_in = False
        self._fake_mode: Any = None

    def __enter__(self) -> "Live":
        self._fake_mode = active_fake_mode()
        self._resize = torch.UntypedStorage.resize_
        live, resize = self, self._resize

        def resized(storage: torch.UntypedStorage, size: int) -> Any:
            # FSDP2 frees and allocates gathered weights so, model.recompute activations; no mode sees it
            result = resize(storage, size)
            entry = live._entry(storage)
            live._add(entry, storage.nbytes() - live._sizes[entry])
            if sys._getframe(1).f_globals["__name__"].startswith("torch.distributed.fsdp"):
                live.kinds[entry] = "communication"
            return result

        torch.UntypedStorage.resize_ = resized  # type: ignore[method-assign, assignment]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*error)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if any(kind is DTensor for kind in types):
            return NotImplemented  # its local tensors come here on their own
        if func is torch.ops.aten._local_scalar_dense.default:
            return 0.0 if args[0].is_floating_point() else 0  # norms are finite, no loss is not
        result = func(*args, **(kwargs or {}))
        if active_fake_mode() is not self._fake_mode:
            return result  # DTensor works out shapes
        outputs = [leaf for leaf in tree_leaves(result) if _has_memory(leaf)]
        for tensor in outputs:
            self._entry(_storage(tensor))
        self._label(func, args, kwargs or {}, outputs)
        if size := workspace(func, args, self.device):
            self.add_transient(size, "loss" if self.phase == "loss" else "workspaces")
        return result

    @contextlib.contextmanager
    def during(self, kind: str) -> Iterator[None]:
        """New storages are of ``kind``."""
        before, self.phase = self.phase, kind
        try:
            yield
        finally:
            self.phase = before

    def follow(self, module: nn.Module, kind: str) -> None:
        """New storages are of ``kind`` while ``module`` runs forward, recomputation in backward included."""
        before: list[str] = []

        def enter(*_: Any) -> None:
            before.append(self.phase)
            self.phase = kind

        def leave(*_: Any) -> None:
            self.phase = before.pop()

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave, always_call=True)

    def label(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Call the storages of ``tensors`` ``kind``, for all of their lives."""
        for tensor in tensors:
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            if _has_memory(local):
                self.kinds[self._entry(_storage(local))] = kind

    def add_transient(self, size: int, kind: str = "workspaces") -> None:
        """``size`` bytes were alive for a moment, beside all that is now."""
        entry = self._new(kind)
        self._add(entry, size)
        self._add(entry, -size)

    def correct(self, kind: str, change: int) -> None:
        """From now on ``change`` bytes more (or, negative, less) of ``kind`` than tensors tell."""
        self.events.append((self._new(kind), change))

    def history(self) -> Iterator[dict[str, int]]:
        """Bytes by kind after every change; the same dictionary every time."""
        now = dict.fromkeys(KINDS, 0)
        for entry, change in self.events:
            now[self.kinds[entry]] += change
            yield now

    def peak(self) -> dict[str, int]:
        """Bytes by kind at the moment when their sum was largest, the first of such."""
        most, found, total = -1, dict.fromkeys(KINDS, 0), 0
        now = dict.fromkeys(KINDS, 0)
        for entry, change in self.events:
            now[self.kinds[entry]] += change
            total += change
            if total > most:
                most, found = total, dict(now)
        return found

    def _label(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: list[Tensor]
    ) -> None:
        """What collectives read and write, as far as the operator tells."""
        name = func._schema.name
        if name in _REDUCED:
            self.label((t for t in tree_leaves(args) if isinstance(t, Tensor)), "gradients")
            self.label([kwargs["out"]], "communication")
            self._after_copy_in = True
        elif name in _GATHERED:
            self.label(outputs, "communication")
        elif name in _COLLECTIVES:
            gathered = name != "c10d::_reduce_scatter_base_"
            buffer = args[0] if gathered else args[1]
            tensors = [t for t in tree_leaves(buffer) if isinstance(t, Tensor)]
            self.label(tensors, "communication")
            if self.device == "cpu":  # gloo copies the larger side of both
                self.add_transient(sum(map(_bytes, tensors)), "communication")
        elif self._after_copy_in and name == "aten::empty":
            self.label(outputs, "gradients")  # the shard that FSDP2 reduces into
            self._after_copy_in = False

    def _entry(self, storage: torch.UntypedStorage) -> int:
        key = storage._cdata
        if key not in self._entries:
            entry = self._new(self.phase)
            self._entries[key] = entry
            weakref.finalize(storage, self._end, key, entry)
            self._add(entry, storage.nbytes())
        return self._entries[key]

    def _new(self, kind: str) -> int:
        self.kinds.append(kind)
        self._sizes.append(0)
        return len(self.kinds) - 1

    def _add(self, entry: int, change: int) -> None:
        if self.device == "cuda":  # the caching allocator gives whole blocks of 512 bytes
            before = self._sizes[entry]
            self._sizes[entry] = before + change
            change = math.ceil((before + change) / 512) * 512 - math.ceil(before / 512) * 512
        else:
            self._sizes[entry] += change
        if change:
            self.events.append((entry, change))

    def _end(self, key: int, entry: int) -> None:
        self._entries.pop(key, None)
        self._add(entry, -self._sizes[entry])


def _has_memory(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.device.type != "meta"


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    return tensor.untyped_storage()
