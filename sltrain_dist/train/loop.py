"""The training loop: updates, records, evaluations, checkpoints, and the end of a run.

The loss of an update is the sum of token losses over all valid tokens of all ranks and
micro-batches, divided by their number: it does not depend on how the batch was cut.
"""

import math
import sys
import time
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from sltrain_dist.optim.schedule import learning_rate
from sltrain_dist.parallel.mesh import sum_over_ranks
from sltrain_dist.train.build import Run
from sltrain_dist.train.checkpoint import Progress
from sltrain_dist.train.checkpoint_async import Saver
from sltrain_dist.train.evaluate import Batch, evaluate, perplexity, write_text
from sltrain_dist.train.summary import human_bytes, peak_memory, say, throughput
from sltrain_dist.utils.errors import UserError

SAMPLE_TOKENS = 80
SAMPLE_SECONDS = 30.0  # a 7B on a CPU takes as long for two tokens
SKIPS_IN_A_ROW = 20  # updates without a finite gradient before a run gives up


def train(run: Run) -> dict[str, Any]:
    """Train from where ``run`` stands to the last update, evaluate, save; returns the summary."""
    config, started = run.config, time.perf_counter()
    steps = config.optimizer.total_steps
    updates = run.data.updates(run.step)
    evaluated, rates = None, []
    started -= run.seconds  # of the segments before a resume
    with Saver(run.mesh, config) as saver, _bar(run, steps) as bar:
        while run.step < steps:
            began = time.perf_counter()
            lr = learning_rate(config.optimizer, run.step)
            skipped = run.engine.skipped_blocks
            loss, tokens, norm = update(run, next(updates), lr)
            _watch(run, norm, run.engine.skipped_blocks - skipped)
            run.step += 1
            run.tokens_seen += tokens
            rates.append(tokens / (time.perf_counter() - began))
            line = {
                "step": run.step,
                "loss": loss,
                "lr": lr,
                "grad_norm": norm,
                "tokens_seen": run.tokens_seen,
                "tokens_per_second": rates[-1],
                "peak_memory_bytes": peak_memory(run.mesh),
            }
            if config.engine.per_layer:
                line["skipped_blocks"] = run.engine.skipped_blocks
            _record(run, line)
            _advance(bar, run, line)
            _tell(run, saver.poll())
            last = run.step == steps
            if last or (config.eval_every and run.step % config.eval_every == 0):
                evaluated = _evaluate(run)
            if last or (config.save_every and run.step % config.save_every == 0):
                _save(run, saver, time.perf_counter() - started)
        _tell(run, saver.wait())
    summary = _finish(run, evaluated or _evaluate(run), rates, time.perf_counter() - started)
    if not saver.stands:
        raise UserError(
            f"--save_dir {config.save_dir}: the final checkpoint could not be saved (see above); make room and "
            "continue with --continue_from auto"
        )
    return summary


def update(run: Run, micro_batches: list[Batch], lr: float) -> tuple[float, int, float]:
    """One update of the weights.

    Args:
        micro_batches: this rank's share of the global batch.

    Returns:
        (mean loss in nats per token, valid tokens over all ranks, global gradient norm).
    """
    engine, mesh = run.engine, run.mesh
    counts = torch.stack([(batch["labels"] >= 0).sum() for batch in micro_batches])
    valid = sum_over_ranks(mesh, counts.sum())
    if run.config.loss_average == "micro_batches":  # the reference's mean of means
        weights = (counts.clamp(min=1) * len(micro_batches) * mesh.dp_size).to(mesh.device)
    else:
        weights = valid.clamp(min=1).expand(len(micro_batches))
    engine.begin_update(lr)
    total: Tensor = torch.zeros((), device=mesh.device)
    for number, (tokens, labels) in enumerate(on_device(micro_batches, mesh.device)):
        share = engine.module(tokens, labels) / weights[number]
        engine.accumulate(share, last=number == len(micro_batches) - 1)
        total += share.detach()
    norm = engine.step(lr)
    return float(sum_over_ranks(mesh, total)), int(valid), norm


def on_device(micro_batches: list[Batch], device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """(tokens, labels) of every micro-batch on the device, moved in two copies that block nobody."""
    moved = []
    for key in ("tokens", "labels"):
        together = torch.stack([batch[key] for batch in micro_batches])
        if device.type == "cuda":
            together = together.pin_memory()
        moved.append(together.to(device, non_blocking=True).unbind())
    return list(zip(*moved, strict=True))


def _watch(run: Run, norm: float, blocks: int = 0) -> None:
    """Say when an update, or ``blocks`` of it, was skipped because its gradient was not finite; give up after many in a row."""
    if math.isfinite(norm) and not blocks:
        run.skipped = 0
        return
    run.skipped += 1
    if run.skipped == 1:
        what = (
            f"update {run.step + 1}" if not blocks else f"{blocks} blocks of update {run.step + 1}"
        )
        say(
            run.mesh,
            f"warning: {what} skipped: its gradient{' or its loss' * (not blocks)} is not finite",
        )
    if run.skipped == SKIPS_IN_A_ROW:
        raise UserError(
            f"--lr {run.config.optimizer.lr:g}: gradients {'of blocks ' * bool(blocks)}were not finite in {SKIPS_IN_A_ROW} updates in a "
            f"row, up to {run.step + 1}; continue from a checkpoint with a lower --lr or with --grad_clipping 1"
        )


def _record(run: Run, line: dict[str, Any]) -> None:
    run.records.metrics(line)
    run.tracker.log(line)


def _evaluate(run: Run) -> tuple[float, int]:
    """Evaluate and record; returns (loss, tokens)."""
    batches = run.data.evaluation(run.config.engine.batch_size)
    loss, tokens = evaluate(run.engine, batches, run.config.eval_mode)
    line = {
        "step": run.step,
        "eval_loss": loss,
        "eval_perplexity": perplexity(loss),
        "eval_tokens": tokens,
    }
    _record(run, line)
    say(
        run.mesh,
        f"step {run.step}: held-out loss {loss:.4f}, perplexity {perplexity(loss):.2f} ({tokens:,} tokens)",
    )
    return loss, tokens


def _save(run: Run, saver: Saver, seconds: float) -> None:
    """Save a checkpoint, or begin to, of this moment."""
    position = run.records.position() | {"seconds": seconds}
    progress = Progress(run.step, run.tokens_seen, run.data.state(run.step), position)
    _tell(run, saver.save(run.engine, progress))


def _tell(run: Run, lines: list[str]) -> None:
    for line in lines:
        say(run.mesh, line)


def _bar(run: Run, steps: int) -> "tqdm[Any]":
    terminal = sys.stderr.isatty()
    return tqdm(
        total=steps,
        initial=run.step,
        disable=not run.mesh.is_first,
        unit="update",
        mininterval=0.2 if terminal else 10.0,
        dynamic_ncols=terminal,
        ncols=None if terminal else 130,
    )


def _advance(bar: "tqdm[Any]", run: Run, line: dict[str, Any]) -> None:
    fields = {
        "loss": f"{line['loss']:.3f}",
        "lr": f"{line['lr']:.1e}",
        "tok/s": f"{line['tokens_per_second']:,.0f}",
        "peak": human_bytes(line["peak_memory_bytes"]),
    }
    utilisation = throughput(run, line["tokens_per_second"])
    if utilisation is not None:
        fields["MFU"] = f"{utilisation:.1%}"
    bar.set_postfix(fields, refresh=False)
    bar.update()


def _finish(
    run: Run, evaluated: tuple[float, int], rates: list[float], seconds: float
) -> dict[str, Any]:
    """Write the sample, the summary and the picture; returns the summary."""
    loss, tokens = evaluated
    tokenizer = run.data.tokenizer
    prompt = tokenizer.encode_batch(["def "])[0] or [tokenizer.eos_id]
    window = run.config.data.sequence_length
    written = write_text(
        run.engine,
        prompt,
        count=SAMPLE_TOKENS,
        window=window,
        stop=tokenizer.eos_id,
        seconds=SAMPLE_SECONDS,
    )
    text = tokenizer.decode(written)
    run.records.sample(text)
    settled = sorted(rates[len(rates) // 10 :])
    peak = peak_memory(run.mesh)
    summary = {
        "final_eval_loss": loss,
        "final_eval_perplexity": perplexity(loss),
        "eval_tokens": tokens,
        "eval_mode": run.config.eval_mode,
        "step": run.step,
        "tokens_seen": run.tokens_seen,
        "parameters": run.parameters,
        "tokens_per_second": settled[len(settled) // 2] if settled else run.tokens_seen / seconds,
        "peak_memory_bytes": peak,
        "baseline_memory_bytes": run.baseline,
        "estimated_memory_bytes": run.estimate["total"],
        "wall_seconds": seconds,
    }
    run.records.summary(summary)
    problem = run.records.picture()
    run.tracker.close()
    say(run.mesh, f"\nsample:\n{text}\n")
    say(
        run.mesh,
        f"memory: {human_bytes(peak)} at most on a rank, {human_bytes(run.baseline)} of it before the model; "
        f"the estimate was {human_bytes(run.estimate['total'])}",
    )
    say(run.mesh, f"final perplexity {perplexity(loss):.2f} after {run.tokens_seen:,} tokens, {seconds:.0f} s; "
                  f"results in {run.records.folder}")  # fmt: skip
    if problem:
        say(run.mesh, f"warning: {problem}")
    return summary
