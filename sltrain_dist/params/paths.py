"""Which of its two paths (ops.linear) an SLTrain linear takes: what it depends on, a cost model, timing.

A path is chosen per key, once, before the engine exists: never inside a step, where ranks that decide
differently, or at different times, would wait for each other for ever. The cost model (``predict``)
settles what is clear; keys whose two paths it puts within ``CLOSE`` of each other are timed
(``measure``). Whoever chose (a flag, a checkpoint, an earlier run, this file), ``assign`` writes it
into the modules, and ``assigned`` reads it back for the checkpoint.

Shapes: n tokens of a micro-batch, out and in features, r rank, e entries of S.
"""

import functools
import platform
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from sltrain_dist.ops import kernels
from sltrain_dist.ops.block_triton import BLOCKS
from sltrain_dist.ops.linear import Path, sltrain_linear
from sltrain_dist.params.linears import SLTrain
from sltrain_dist.params.support import Support

CLOSE = 1.5  # paths whose predicted times differ by less are timed
TURN_SECONDS = 2.0  # of one turn (both paths once), at most, about
TOTAL_SECONDS = 20.0  # of all timing together, at most, about
_KEY_SECONDS = 5.0  # of timing of one key, at most, about
_PROBE_TOKENS = 256  # the first, untrusted measurement, from which the size of the others follows
_TURNS = (3, 15)  # fewest and most paired turns of a key


@dataclass(frozen=True)
class LinearKey:
    """What the time of a linear depends on, apart from machine and batch.

    rank: r, or 0 where dropout keeps the low-rank product out of the operator.
    """

    support: Support
    rank: int

    @property
    def text(self) -> str:
        """Unique among keys of different cost, e.g. "1376x512 rank 128 fan_in 8 of 256"."""
        support, tiles = self.support, self.support.tiles
        out, in_ = support.shape
        text = f"{out}x{in_} rank {self.rank} {support.kind} {support.k} of {support.positions}"
        if tiles.block > 1:
            text += f" blocks of {tiles.block}"
            text += " transposed" if tiles.tile_out > tiles.block else ""
        return text

    @property
    def entries(self) -> int:
        """Elements of S: e."""
        return torch.Size(self.support.values_shape).numel()


@dataclass(frozen=True)
class Situation:
    """Where linears run: the machine, the kernels loaded, and the micro-batch.

    keep_hidden: of factorized linears, see ops.linear.sltrain_linear; None: as the device decides.
    """

    device: torch.device
    dtype: torch.dtype
    tokens: int
    keep_hidden: bool | None = None

    @property
    def keeps(self) -> bool:
        """Whether h = x A^T of a factorized linear is kept for backward."""
        return self.device.type == "cpu" if self.keep_hidden is None else self.keep_hidden

    @property
    def text(self) -> str:
        """E.g. "AMD EPYC AVX2, 2 threads, kernels cpu, float32, 4096 tokens"."""
        where = device_name(self.device)
        if self.device.type == "cpu":
            where += f", {torch.get_num_threads()} threads"
        loaded = "+".join(kernels.loaded()) or "reference"
        if self.device.type == "cpu" and "cpu" in kernels.loaded():
            loaded += f" {kernels.cpu_capability()}"
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{where}, kernels {loaded}, {dtype}, {self.tokens} tokens, h {'kept' if self.keeps else 'again'}"


@dataclass(frozen=True)
class Rates:
    """What a class of devices reaches on the shapes of a model, not what its data sheet says.

    dense, sparse: floating-point operations a second of matrix products and of products with S;
    sparse None: only the reference is there, which makes S dense. bandwidth: bytes a second.
    launch: seconds that every operator costs at least.
    """

    dense: float
    sparse: float | None
    bandwidth: float
    launch: float


# Per thread, fp32, and by what torch calls the CPU's capability. bfloat16 is widened to the same.
_CPU_DENSE = {"AVX512": 90e9, "AVX2": 45e9}
_CPU_SPARSE = {"AVX512": 50e9, "AVX2": 25e9}
_CPU_BANDWIDTH = 8e9
# bf16 tensor cores at 60% of the data sheet, by major compute capability.
_CUDA_DENSE = {8: 190e12, 9: 590e12, 10: 1200e12}
_CUDA_BANDWIDTH = {8: 1.5e12, 9: 3.0e12, 10: 6.0e12}
_CUDA_FLOAT32 = 15  # times slower than bf16 (TF32 stays off)
_BLOCK_SHARE = 0.4  # of the dense rate, for blocks in a matrix-product kernel


@functools.cache
def device_name(device: torch.device) -> str:
    """The model of the processor or GPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device) if torch.cuda.is_available() else "a GPU"
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            models = (line.split(":", 1)[1] for line in file if line.startswith("model name"))
            name = next(models, name)
    except OSError:
        pass  # not Linux
    return f"{' '.join(name.split())} {torch.backends.cpu.get_cpu_capability()}"


def _is_hopeless(key: LinearKey, situation: Situation) -> bool:
    """Whether S must be composed: on a GPU all but blocks that the kernels of ops.block_triton multiply.

    Products with single entries stay off the tensor cores and cannot pay at training sizes (FACTS).
    """
    if situation.device.type != "cuda":
        return False
    if kernels.reference_only():
        return True
    support = key.support
    blocks = support.kind == "block" and support.tiles.block in BLOCKS
    return not blocks or find_spec("triton") is None


def device_rates(situation: Situation, key: LinearKey) -> Rates:
    """The rates of the device's class for a linear of this kind of support."""
    if situation.device.type == "cuda":
        here = torch.cuda.is_available()  # planning needs no GPU
        major = torch.cuda.get_device_capability(situation.device)[0] if here else 9
        major = max(8, min(major, 10))
        dense = _CUDA_DENSE[major] / (1 if situation.dtype == torch.bfloat16 else _CUDA_FLOAT32)
        sparse = None if _is_hopeless(key, situation) else dense * _BLOCK_SHARE
        return Rates(dense, sparse, _CUDA_BANDWIDTH[major], 6e-6)
    capability, threads = torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
    compiled = "cpu" in kernels.loaded()
    return Rates(
        _CPU_DENSE.get(capability, 10e9) * threads,
        _CPU_SPARSE.get(capability, 6e9) * threads if compiled else None,
        _CPU_BANDWIDTH * min(threads, 8),
        10e-6,
    )


def predict(key: LinearKey, situation: Situation, tokens: int | None = None) -> dict[Path, float]:
    """Seconds of forward and backward by either path, for ``tokens`` (else the situation's).

        composed    (6 n out in + 8 r out in) / dense  +  (10 out in z + 3 e 32) / bandwidth
        factorized  (6 n r (out + in) [+ 2 n r in]) / dense  +  6 n e / sparse
                    + 6 n (out + in) z / bandwidth

    each with 20 launches; z is the bytes of an element as computed. W is written and read twice and
    dW once, and an entry of S costs half a cache line wherever it is scattered or gathered. The term
    in brackets is h computed again. The factorized path moves activations in and out of every
    product. Without a sparse kernel S is a dense matrix: 6 n out in in place of 6 n e. With r = 0
    (dropout) both lose their factors.
    """
    n = situation.tokens if tokens is None else tokens
    rates = device_rates(situation, key)
    (out, in_), r, e = key.support.shape, key.rank, key.entries
    z = 2 if situation.device.type == "cuda" and situation.dtype == torch.bfloat16 else 4
    composed = (6.0 * n + 8 * r) * out * in_ / rates.dense
    composed += (10.0 * out * in_ * z + 3 * e * 32) / rates.bandwidth
    again = 0 if situation.keeps else 2 * in_
    factorized = (6.0 * (out + in_) + again) * n * r / rates.dense
    factorized += 6.0 * n * (out + in_) * z / rates.bandwidth
    if rates.sparse is None:
        factorized += 6.0 * n * out * in_ / rates.dense + 10.0 * out * in_ * z / rates.bandwidth
    else:
        factorized += 6.0 * n * e / rates.sparse
    overhead = 20 * rates.launch
    return {"composed": composed + overhead, "factorized": factorized + overhead}


def faster(seconds: Mapping[Path, float]) -> Path:
    """The path that takes less time; composed where it is a draw."""
    return "factorized" if seconds["factorized"] < seconds["composed"] else "composed"


def is_close(key: LinearKey, situation: Situation) -> bool:
    """Whether the cost model leaves the choice to timing."""
    if _is_hopeless(key, situation):
        return False
    seconds = predict(key, situation).values()
    return max(seconds) < CLOSE * min(seconds)


def settled(key: LinearKey, situation: Situation) -> Path:
    """What the cost model alone chooses."""
    return "composed" if _is_hopeless(key, situation) else faster(predict(key, situation))


def budget(count: int) -> float:
    """Seconds for each of ``count`` keys to be timed: a small model must not wait for all of them."""
    return min(_KEY_SECONDS, TOTAL_SECONDS / max(1, count))


def measure(key: LinearKey, situation: Situation, limit: float) -> dict[Path, float]:
    """Seconds of forward and backward by either path, timed on random data of the key's shape.

    The paths take turns, in alternating order, so that what else the machine does meets both; what
    counts is the median of the turns' ratios. On a large model fewer tokens are timed, so that a
    turn takes at most about TURN_SECONDS and the key about ``limit`` seconds; each path's time is
    then scaled to the situation's tokens by the cost model. Nothing stays allocated.
    """
    began = time.perf_counter()
    least = min(situation.tokens, _PROBE_TOKENS)
    trial = _Trial(key, situation)
    trial.batch(least)
    trial.turn()  # starts threads, compiles, fills caches
    probe = trial.turn()

    def expected(tokens: int) -> float:
        return sum(_scaled(key, situation, probe, least, tokens).values())

    tokens = situation.tokens
    while tokens > least and expected(tokens) > min(TURN_SECONDS, limit / (_TURNS[0] + 1)):
        tokens = max(least, tokens // 2)
    if tokens > least:
        trial.batch(tokens)
        trial.turn()
    left = limit - (time.perf_counter() - began)
    turns = max(1, min(_TURNS[1], int(left / expected(tokens))))
    taken = [trial.turn(reverse=turn % 2 == 1) for turn in range(turns)]
    composed = statistics.median(turn["composed"] for turn in taken)
    ratio = statistics.median(turn["factorized"] / turn["composed"] for turn in taken)
    seconds: dict[Path, float] = {"composed": composed, "factorized": composed * ratio}
    del trial
    if situation.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(situation.device)
    return _scaled(key, situation, seconds, tokens, situation.tokens)


def _scaled(
    key: LinearKey, situation: Situation, seconds: Mapping[Path, float], timed: int, wanted: int
) -> dict[Path, float]:
    """Times measured with ``timed`` tokens as the cost model extends them to ``wanted``."""
    before, after = predict(key, situation, timed), predict(key, situation, wanted)
    return {path: seconds[path] * after[path] / before[path] for path in seconds}


class _Trial:
    """One linear of random parameters on the device, and the clock around its two paths."""

    def __init__(self, key: LinearKey, situation: Situation) -> None:
        self.key, self.situation = key, situation
        self.generator = torch.Generator(situation.device).manual_seed(0)  # not the run's
        support, device = key.support, situation.device
        count = torch.Size(support.offsets_shape).numel()
        self.offsets = support.offsets(0, "timing", 0, count, device).view(support.offsets_shape)
        self.values = self._random(*support.values_shape)
        (out, in_), rank = support.shape, key.rank
        factors = (self._random(out, rank), self._random(rank, in_))
        self.factors = factors if rank else None
        self.leaves = [self.values, *(self.factors or ())]

    def _random(self, *shape: int) -> Tensor:
        device, dtype = self.situation.device, self.situation.dtype
        random = torch.randn(shape, generator=self.generator, device=device, dtype=dtype)
        return random.mul_(0.02).requires_grad_()

    def batch(self, tokens: int) -> None:
        """Make an input and a gradient of so many tokens."""
        out, in_ = self.key.support.shape
        self.x, self.dy = self._random(tokens, in_), self._random(tokens, out).detach()

    def turn(self, reverse: bool = False) -> dict[Path, float]:
        """Seconds of one forward and backward by each path, one after the other."""
        order: tuple[Path, Path] = ("composed", "factorized")
        return {path: self._once(path) for path in (order[::-1] if reverse else order)}

    def _once(self, path: Path) -> float:
        self._wait()
        began = time.perf_counter()
        with torch.enable_grad():
            y = sltrain_linear(
                self.x, self.factors, self.values, self.offsets, None, None, 0.25,
                self.key.support.tiles, path, self.situation.keep_hidden,
            )  # fmt: skip
            torch.autograd.grad(y, [self.x, *self.leaves], self.dy)
        self._wait()
        return time.perf_counter() - began

    def _wait(self) -> None:
        if self.situation.device.type == "cuda":
            torch.cuda.synchronize(self.situation.device)


def key_of(linear: SLTrain) -> LinearKey:
    """The key of a module; on the meta device too."""
    apart = linear.method.dropout > 0
    return LinearKey(linear.held_support, 0 if apart else linear.method.rank)


def linears(model: nn.Module) -> list[SLTrain]:
    """The modules of a model that have a path, in order."""
    return [module for module in model.modules() if isinstance(module, SLTrain)]


def assign(
    model: nn.Module, situation: str, paths: Mapping[str, Path], keep_hidden: bool | None = None
) -> None:
    """Give every SLTrain linear the path that ``paths`` has for its key's text, and ``keep_hidden``."""
    for linear in linears(model):
        text = key_of(linear).text
        linear.keep_hidden = keep_hidden
        linear.path, linear.path_key = paths[text], f"{situation}, {text}"


def assigned(model: nn.Module) -> dict[str, Path]:
    """What ``assign`` did, by situation and key: what a checkpoint stores."""
    return {linear.path_key: linear.path for linear in linears(model) if linear.path_key}
