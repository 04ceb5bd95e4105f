"""Keys and values of the positions a model has already seen, so that a new token costs one position.

A cache is made for one text (or B texts of the same length) and passed to every forward:

    cache = KeyValueCache(len(model.blocks), capacity=256)
    model(prompt, cache=cache)        # positions 0 .. T-1
    model(next_token, cache=cache)    # position T; any number of tokens may follow at once

It is for inference: call under ``torch.no_grad``. Keys are kept rotated, so angles must not depend on
what comes later: see `model.rope.same_angles`.

Shapes: B batch, T new tokens, S positions held with the new ones, K key/value heads, Dh head width.
"""

from torch import Tensor


class LayerCache:
    """One layer's keys and values, [B, capacity, K, Dh] each, allocated by the first ``append``."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add ``keys`` and ``values`` [B, T, K, Dh]; returns all of both, views [B, S, K, Dh].

        Raises:
            ValueError: more positions than the capacity, or another batch than before.
        """
        start, stop = self.length, self.length + keys.shape[1]
        if stop > self.capacity:
            raise ValueError(f"{stop} positions do not fit a cache of {self.capacity}")
        if self._keys is None or self._values is None:
            shape = (keys.shape[0], self.capacity, *keys.shape[2:])
            self._keys, self._values = keys.new_empty(shape), values.new_empty(shape)
        if keys.shape[0] != self._keys.shape[0]:
            raise ValueError(f"{keys.shape[0]} texts, the cache is of {self._keys.shape[0]}")
        self._keys[:, start:stop] = keys
        self._values[:, start:stop] = values
        self.length = stop
        return self._keys[:, :stop], self._values[:, :stop]


class KeyValueCache:
    """The caches of all layers of a model, at most ``capacity`` positions each.

    Memory: 2 * layers * B * capacity * K * Dh elements in the model's dtype.
    """

    def __init__(self, layers: int, capacity: int) -> None:
        self.layers = [LayerCache(capacity) for _ in range(layers)]

    @property
    def length(self) -> int:
        """Positions held."""
        return self.layers[0].length

    def cut(self, length: int) -> None:
        """Forget all positions from ``length`` on; the memory stays."""
        for layer in self.layers:
            layer.length = min(layer.length, length)
