"""Text from a trained model: prompts in, their continuations out, speed and reasons on the side.

Weights stay factored unless merged is asked for. Factored needs less memory and no time to merge; once
merged, a token takes 70% to 77% of the time on a CPU, because scattered entries of S cost more than
the dense row they stand in. Both give the same text, up to rounding.
"""

import select
import time
from dataclasses import dataclass
from typing import Any, TextIO

import torch

from sltrain_dist.data.tokenizer import Tokenizer
from sltrain_dist.model.llama import Llama
from sltrain_dist.tools.inference import (
    check_merged,
    choose_device,
    choose_dtype,
    choose_paths,
    choose_tokenizer,
)
from sltrain_dist.tools.sampling import Sampling, TextStream, continuation
from sltrain_dist.tools.weights import load_model, open_pretrained
from sltrain_dist.utils.errors import UserError

_SEEDS = 2**31


@dataclass(frozen=True)
class Request:
    """What is asked for. None stands for what the model and the machine suggest.

    model: a folder that `open_pretrained` knows. merged: dense W, or None and False: as stored.
    stream: write every word as it comes, or each text at its end. seed: of the first prompt, the next
    one has seed + 1.
    """

    model: str
    prompts: tuple[str, ...]
    sampling: Sampling
    max_new_tokens: int = 128
    seed: int = 0
    merged: bool | None = None
    dtype: str | None = None
    device: str | None = None
    tokenizer: str | None = None
    stream: bool = False


def generate(request: Request, out: TextIO, notes: TextIO) -> None:
    """Write every prompt with its continuation to ``out``, a blank line between two, and notes to ``notes``.

    Raises:
        UserError: model, tokenizer, a prompt or a setting that cannot be used; before any text is written.
    """
    if request.max_new_tokens < 1:
        raise UserError(f"--max_new_tokens {request.max_new_tokens}: must be positive")
    if not 0 <= request.seed < _SEEDS:
        raise UserError(f"--seed {request.seed}: must lie in [0, {_SEEDS})")
    device = choose_device(request.device)
    dtype = choose_dtype(request.dtype, device)
    pretrained = open_pretrained(request.model, "MODEL")
    merged = check_merged(request.merged, pretrained)
    tokenizer = choose_tokenizer(request.tokenizer, pretrained)
    limit = pretrained.model.max_position_embeddings
    prompts = [(text, _encode(text, tokenizer, limit)) for text in request.prompts]
    try:
        model = load_model(pretrained, device, dtype, merged)
        choose_paths(model, 1)
        for number, (text, tokens) in enumerate(prompts):
            if number:
                out.write("\n")
            _continue(request, model, tokenizer, text, tokens, request.seed + number, out, notes)
    except torch.OutOfMemoryError:
        raise UserError(
            f"--device {device}: the model does not fit its memory; take --dtype bfloat16, --factored or --device cpu"
        ) from None


def _encode(text: str, tokenizer: Tokenizer, limit: int) -> list[int]:
    """Tokens of a prompt; an empty one begins as a document does, after the end of another."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError("--prompt: is not UTF-8 text; convert it") from None
    tokens = tokenizer.encode_batch([text])[0] or [tokenizer.eos_id]
    if len(tokens) >= limit:
        raise UserError(
            f"--prompt: has {len(tokens)} tokens, and the model {limit} positions for prompt and text; shorten it"
        )
    return tokens


def _continue(
    request: Request,
    model: Llama,
    tokenizer: Tokenizer,
    text: str,
    prompt: list[int],
    seed: int,
    out: TextIO,
    notes: TextIO,
) -> None:
    """One prompt: its text, what follows, and the notes."""
    written = _Writer(out, request.stream)
    written.add(text)
    stream = TextStream(tokenizer, prompt)
    began = time.perf_counter()
    first = began
    count, ended = 0, False
    tokens = continuation(model, prompt, request.sampling, count=request.max_new_tokens, seed=seed)
    for token in tokens:
        count += 1
        first = time.perf_counter() if count == 1 else first
        if ended := token == tokenizer.eos_id:
            break
        written.add(stream.push(token))
    seconds = time.perf_counter() - first
    written.add(stream.rest() + "\n")
    written.close()
    if ended:
        notes.write(f"end of text after {count} tokens\n")
    elif count < request.max_new_tokens:
        limit = model.config.max_position_embeddings
        notes.write(f"stopped after {count} tokens: the model has {limit} positions\n")
    speed = f", {(count - 1) / seconds:.1f} tokens/s" if count > 1 else ""
    notes.write(f"{len(prompt)} tokens read in {first - began:.2f} s, {count} written{speed}\n")
    notes.flush()


class _Writer:
    """Writes text at once, or all of it at the end."""

    def __init__(self, out: TextIO, stream: bool) -> None:
        self._out, self._stream = out, stream
        self._held: list[str] = []

    def add(self, text: str) -> None:
        if self._stream:
            self._out.write(text)
            self._out.flush()
        else:
            self._held.append(text)

    def close(self) -> None:
        self._out.write("".join(self._held))
        self._out.flush()


def piped_text(stream: Any, given: bool) -> str | None:
    """The text piped into standard input, without the line end that ``echo`` adds; None where there is none.

    Args:
        stream: standard input, or None where the process has none.
        given: a prompt was given as a flag, so that piped text would be a second one.

    Raises:
        UserError: both, or bytes that are no UTF-8 text.
    """
    if stream is None or stream.closed or stream.isatty():
        return None
    if given:
        if _has_input(stream):
            raise UserError(
                "--prompt: text is piped in as well; give one of the two, or redirect standard input from /dev/null"
            )
        return None
    try:
        text: str = stream.buffer.read().decode()
    except UnicodeDecodeError:
        raise UserError("standard input: is not UTF-8 text; convert it") from None
    return text.removesuffix("\n").removesuffix("\r")


def _has_input(stream: Any) -> bool:
    """Whether bytes wait to be read; never waits for a writer that may not write."""
    try:
        readable, _, _ = select.select([stream], [], [], 0)
        return bool(readable) and bool(stream.buffer.peek(1))
    except (OSError, ValueError):  # no descriptor behind it
        return False
