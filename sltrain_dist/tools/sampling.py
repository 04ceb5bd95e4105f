"""Drawing tokens one after another: which are candidates, the draw, and the text as it grows.

    logits -> / temperature -> the top_k largest -> the fewest of them with top_p of their probability
           -> softmax of what is left -> one draw, by inverse distribution

Draws come from a generator on the CPU that belongs to the text: the same seed gives the same text on
every device, with merged and factored weights, up to rounding in the logits.

Shapes: T tokens, V vocabulary, C candidates.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sltrain_dist.data.tokenizer import Tokenizer
from sltrain_dist.model.cache import KeyValueCache
from sltrain_dist.model.llama import Llama
from sltrain_dist.model.rope import same_angles
from sltrain_dist.utils.errors import UserError

_REPLACEMENT = "\ufffd"  # what a decoder puts for bytes that are no character, or not yet


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen.

    temperature: divides the logits; 0: always the most probable token. top_k: 0 is off; top_p: 1 is off.
    """

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UserError(f"--temperature {self.temperature}: must be 0 (greedy) or positive")
        if self.top_k < 0:
            raise UserError(f"--top_k {self.top_k}: must be positive, or 0 for all tokens")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top_p {self.top_p}: must lie in (0, 1]")


def make_sampling(
    greedy: bool, temperature: float | None, top_k: int | None, top_p: float | None
) -> Sampling:
    """The Sampling of the flags that were given, None those that were not.

    Raises:
        UserError: a value out of its range, or --greedy beside a flag that it makes void.
    """
    flags = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    given = {name: value for name, value in flags.items() if value is not None}
    if greedy and given:
        name, value = next(iter(given.items()))
        raise UserError(f"--{name} {value}: contradicts --greedy; drop one of them")
    return Sampling(temperature=0.0) if greedy else Sampling(**given)  # type: ignore[arg-type]


def candidates(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """The tokens that may follow, most probable first, and their probabilities.

    Args:
        logits: [V], finite.

    Returns:
        (ids int64 [C], probabilities float64 [C] with sum 1), C >= 1, on the CPU. Of equal logits
        the lower id comes first.
    """
    ordered, ids = logits.double().cpu().sort(descending=True, stable=True)
    count = 1 if sampling.temperature == 0 else sampling.top_k or len(ids)
    ordered, ids = ordered[:count], ids[:count]
    if len(ids) == 1:
        return ids, torch.ones(1, dtype=torch.float64)
    # The largest is taken off first, so that no temperature can overflow.
    probabilities = ((ordered - ordered[0]) / sampling.temperature).softmax(0)
    if sampling.top_p < 1:
        before = probabilities.cumsum(0) - probabilities
        kept = int((before < sampling.top_p).sum())  # the first always: nothing is before it
        ids, probabilities = ids[:kept], probabilities[:kept]
    return ids, probabilities / probabilities.sum()


def draw(ids: Tensor, probabilities: Tensor, generator: torch.Generator) -> int:
    """One of ``ids`` with its probability; takes one number from ``generator`` each time."""
    cumulative = probabilities.cumsum(0)
    point = torch.rand((), dtype=torch.float64, generator=generator) * cumulative[-1]
    place = torch.searchsorted(cumulative, point, right=True)  # right: never one of probability 0
    return int(ids[place.clamp(max=len(ids) - 1)])


@torch.inference_mode()
def continuation(
    model: Llama, prompt: list[int], sampling: Sampling, *, count: int, seed: int
) -> Iterator[int]:
    """Up to ``count`` tokens that follow ``prompt``, each as soon as it is drawn.

    The prompt goes through the model at once, then every token alone: keys and values are kept.

    Args:
        prompt: 1 .. max_position_embeddings tokens; with what follows they never become more.

    Raises:
        UserError: logits are not finite.
    """
    room = model.config.max_position_embeddings - len(prompt)
    generator = torch.Generator().manual_seed(seed)
    cache = KeyValueCache(len(model.blocks), len(prompt) + max(0, min(count, room)))
    device = model.lm_head.weight.device
    tokens = list(prompt)
    for _ in range(min(count, room)):
        if not same_angles(model.config, max(1, cache.length), len(tokens)):
            cache.cut(0)  # a rope scaling that changes with the length: all keys anew
        new = torch.tensor([tokens[cache.length :]], device=device)
        hidden = model.model(new, cache)
        logits = model.lm_head(hidden[:, -1:])[0, -1]
        if not bool(logits.isfinite().all()):
            raise UserError(
                "the model's logits are not finite: its training diverged, or --dtype is too narrow for it"
            )
        token = draw(*candidates(logits, sampling), generator)
        yield token
        tokens.append(token)


class TextStream:
    """The text of tokens as they come, in whole characters that no later token can change.

    Many tokens end inside a character (a byte-level vocabulary) or mean something else at the start of
    a text (a leading blank), so what is new is the difference of two decodings that begin some tokens
    earlier.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: list[int]) -> None:
        """``prompt``: tokens before the text; they are not part of it."""
        self._tokenizer = tokenizer
        self._tokens = list(prompt)
        self._begin = 0  # decoding starts here
        self._done = len(prompt)  # tokens whose text was given out

    def push(self, token: int) -> str:
        """The characters that ``token`` completes, often a word, sometimes none."""
        self._tokens.append(token)
        new = self._new()
        if not new or new.endswith(_REPLACEMENT):
            return ""
        self._begin, self._done = self._done, len(self._tokens)
        return new

    def rest(self) -> str:
        """What was held back: the beginning of a character that never came to its end."""
        new = self._new()
        self._begin = self._done = len(self._tokens)
        return new

    def _new(self) -> str:
        before = self._tokenizer.decode(self._tokens[self._begin : self._done])
        return self._tokenizer.decode(self._tokens[self._begin :])[len(before) :]
