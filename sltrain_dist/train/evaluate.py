"""Evaluation on the held-out split, and a sample of what the model writes.

Both run on all ranks: a sharded model can only be called by everyone together.
"""

import math
import time
from collections.abc import Callable, Iterable
from typing import Protocol

import torch
from torch import Tensor, nn

from sltrain_dist.parallel.engine import Engine
from sltrain_dist.parallel.mesh import Mesh, max_over_ranks, sum_over_ranks
from sltrain_dist.utils import counter_random

Batch = dict[str, Tensor]


class Standing(Protocol):
    """What evaluation needs: an engine has it, and so has a whole model on every rank."""

    @property
    def mesh(self) -> Mesh:
        """The ranks that share the batches."""
        ...

    @property
    def module(self) -> nn.Module:
        """Called as ``module(tokens, labels)``."""
        ...


def evaluate(
    engine: Standing,
    batches: Iterable[Batch],
    mode: str = "exact",
    between: Callable[[int], None] = lambda number: None,
) -> tuple[float, int]:
    """Mean loss (nats per token) over held-out batches, and the tokens it was taken over.

    Args:
        batches: this rank's; the same number on every rank.
        mode: "exact": the mean over all tokens. "reference": the published implementation's sum of
            batch means over n + 1, for comparison with its numbers only (perplexity 1.5-2% too low).
        between: called with the number of batches done, before each; may raise.
    """
    module, device = engine.module, engine.mesh.device
    training = module.training
    module.eval()
    total = torch.zeros(3, dtype=torch.float64, device=device)  # losses, tokens, sum of batch means
    count = 0
    with torch.no_grad():
        for batch in batches:
            between(count)
            labels = batch["labels"].to(device)
            loss = module(batch["tokens"].to(device), labels).double()
            valid = (labels >= 0).sum()
            total += torch.stack([loss, valid.double(), loss / valid.clamp(min=1)])
            count += 1
    module.train(training)
    losses, tokens, means = sum_over_ranks(engine.mesh, total).tolist()
    if mode == "reference":
        return means / ((count + 1) * engine.mesh.dp_size), int(tokens)
    return losses / max(tokens, 1), int(tokens)


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


def write_text(
    engine: Engine,
    prompt: list[int],
    *,
    count: int,
    window: int,
    stop: int | None,
    temperature: float = 0.8,
    seed: int = 0,
    seconds: float = math.inf,
) -> list[int]:
    """Continue ``prompt`` by up to ``count`` tokens, or as many as the first one's time lets expect in ``seconds``.

    Every rank gets the same ones.

    Tokens are drawn from softmax(logits / temperature) by counter-based numbers, so no rank's
    generator is touched. There is no cache: this is for a glance after training.

    Args:
        window: positions the model is called with at most.
        stop: token that ends the text.
    """
    module, device = engine.module, engine.mesh.device
    training = module.training
    module.eval()
    tokens = list(prompt)
    key = counter_random.key(seed, "sample")
    number, began = 0, time.perf_counter()
    with torch.no_grad():
        while number < count:
            context = tokens[-window:]
            # Sequence parallelism wants a multiple of its ranks; nothing looks at what follows it.
            padding = [0] * (-len(context) % engine.mesh.tp_size)
            logits = module(torch.tensor([context + padding], device=device))
            logits = logits[0, len(context) - 1].double().cpu()
            cumulative = torch.softmax(logits / temperature, 0).cumsum(0)
            draw = counter_random.uniform(key, torch.tensor([number])) * cumulative[-1]
            token = int(torch.searchsorted(cumulative, draw).clamp(max=len(cumulative) - 1))
            if token == stop:
                break
            tokens.append(token)
            number += 1
            if number == 1:
                taken = torch.tensor(time.perf_counter() - began)
                slowest = max_over_ranks(engine.mesh, taken).item()
                count = min(count, max(1, int(min(seconds / slowest, count))))
    module.train(training)
    return tokens
