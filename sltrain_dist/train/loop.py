"""The training loop: updates, evaluations, checkpoints, and the end of a run.

What a rank alone would decide (a signal reached it, its part of a save failed) goes round in one collective an
update, together with the figures that are recorded, so that all ranks do the same.
"""

import contextlib
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from tqdm import tqdm

from sltrain_dist.data.samples import Batch
from sltrain_dist.optim.schedule import learning_rate
from sltrain_dist.parallel.mesh import gather_numbers, gather_patiently
from sltrain_dist.train.checkpoint import find, load
from sltrain_dist.train.evaluate import evaluate, perplexity
from sltrain_dist.train.finish import finish
from sltrain_dist.train.liveness import Liveness
from sltrain_dist.train.run import Run, signal_number
from sltrain_dist.train.saves import FINAL_TRIES, LAST_WORDS, Saves, describe
from sltrain_dist.train.summary import human_bytes, own_peak, say, throughput
from sltrain_dist.train.timing import Stopwatch, Wire, listening, slowest
from sltrain_dist.train.trace import Trace
from sltrain_dist.train.update import choose_masks, update
from sltrain_dist.utils.errors import UserError
from sltrain_dist.utils.interrupt import InterruptError, ignore, signal_name

_ASK_EVERY = 8  # batches of an evaluation between two questions whether to end


@dataclass
class Parts:
    """What lives as long as the loop."""

    saves: Saves
    liveness: Liveness
    trace: Trace
    clock: Stopwatch
    bar: "tqdm[Any]"
    updates: Iterator[list[Batch]]
    rates: list[float] = field(default_factory=list)  # tokens a second of this segment's updates


def train(run: Run) -> dict[str, Any]:
    """Train from where ``run`` stands to the last update, evaluate, save; returns the summary.

    Raises:
        InterruptError: a signal asked for the end, and everything is saved.
        UserError: gradients that are not finite, a final checkpoint that could not be saved.
        FaultError: another rank is gone.
    """
    config, mesh, folder = run.config, run.mesh, run.records.folder
    steps = config.optimizer.total_steps
    with contextlib.ExitStack() as stack:
        stack.enter_context(run.journal.telling(lambda: run.step))
        saves = Saves(run)
        stack.enter_context(saves.saver)
        bar = stack.enter_context(_bar(run, steps))
        trace = Trace(config.watch.profile, folder, mesh.rank)
        with trace, Liveness(mesh, folder, config.timeout) as liveness:
            clock, updates = Stopwatch(mesh.device), run.data.updates(run.position)
            parts = Parts(saves, liveness, trace, clock, bar, updates)
            if _samples(run):
                with listening(mesh.device):  # the profiler's first start may take seconds
                    pass
            asked = run.asked()
            while True:
                _end_if(asked, run, parts)
                if run.evaluation_due:
                    _evaluate(run, parts)
                if saves.due():
                    _save(run, parts)
                if run.step >= steps:
                    break
                asked = _step(run, parts)
            trace.close()
            saves.finish(FINAL_TRIES)
            if not saves.stands:
                _end_if(run.asked(), run, parts)
        summary = finish(run, parts.rates)
        if not saves.stands:
            raise UserError(
                f"--save_dir {config.save_dir}: the final checkpoint could not be saved (see above); make room and"
                " continue with --continue_from auto"
            )
        run.journal.event("finished", run.step)
        run.journal.beat("finished")
    return summary


def _step(run: Run, parts: Parts) -> int:
    """One update with all that is recorded of it; returns the number of a signal that some rank was sent, or 0."""
    config, mesh, number = run.config, run.mesh, run.step + 1
    lr, blocks = learning_rate(config.optimizer, run.step), run.engine.skipped_blocks
    began = time.perf_counter()
    parts.clock.begin("data")
    parts.liveness.at("data", run.step)
    batches = next(parts.updates)
    parts.liveness.at("training", run.step)
    refuses = run.losses.stands_out if config.watch.spike_action == "skip" else None
    every = config.watch.sample_every
    traced = parts.trace.begin(number)
    sampled = (
        _samples(run) and (number - run.started_at) % every == min(2, every - 1) and not traced
    )
    with listening(mesh.device) if sampled else contextlib.nullcontext(Wire()) as wire:
        loss, tokens, norm = update(run, batches, lr, clock=parts.clock, refuses=refuses)
        choose_masks(run.engine, config.method, number)
    phases = parts.clock.end()
    parts.trace.end(number)
    parts.saves.poll()
    own = (own_peak(mesh), signal_number(), parts.saves.unplanned, wire.seconds)
    everyone = gather_numbers(mesh, own)
    seconds = time.perf_counter() - began
    if everyone[:, 2].all():
        parts.saves.plan()
    run.count(tokens, seconds if math.isfinite(norm) else 0.0)
    parts.rates.append(tokens / seconds)
    line = {
        "step": number, "loss": loss, "lr": lr, "grad_norm": norm, "tokens_seen": run.tokens_seen,
        "tokens_per_second": parts.rates[-1], "peak_memory_bytes": int(everyone[:, 0].max()),
        "time": round(time.time(), 3), "seconds": seconds, "goodput": run.journal.goodput(run.trained),
    }  # fmt: skip
    line |= {f"seconds_{phase}": taken for phase, taken in phases.items()}
    if parts.saves.seconds:
        line["seconds_save"], parts.saves.seconds = parts.saves.seconds, 0.0
    if sampled:
        line |= _waits(run, everyone[:, 3], seconds)
    if (utilisation := throughput(run, parts.rates[-1])) is not None:
        line["mfu"] = utilisation
    if config.engine.per_layer:
        line["skipped_blocks"] = run.engine.skipped_blocks
    _record(run, line)
    _advance(parts.bar, line)
    _watch(run, parts, loss, norm, run.engine.skipped_blocks - blocks)
    return int(everyone[:, 1].max())


def _samples(run: Run) -> bool:
    """Whether what collectives take is sampled now and then."""
    return run.mesh.world_size > 1 and run.config.watch.sample_every > 0


def _waits(run: Run, waited: Tensor, seconds: float) -> dict[str, Any]:
    """What a sampled update tells: seconds in collectives, and the rank that the others waited for."""
    fields: dict[str, Any] = {"seconds_communication": float(waited.median())}
    found = slowest(run.mesh, waited, seconds)
    if found is None:
        run.journal.alarm("straggler", None)
        return fields
    rank, behind = found
    text = f"rank {rank} ({run.hosts[rank]}) kept the others waiting {behind:.2f} s of an update of {seconds:.2f} s"
    run.journal.event("straggler", run.step, rank=rank, host=run.hosts[rank], seconds=behind)
    run.journal.alarm("straggler", text)
    return fields | {"slowest_rank": rank, "slowest_seconds": behind}


def _watch(run: Run, parts: Parts, loss: float, norm: float, blocks: int) -> None:
    """Say when an update, or ``blocks`` of it, was skipped or its loss stands out; go back after many in a row."""
    watch, step = run.config.watch, run.step
    skipped, spike = not math.isfinite(norm), run.losses.stands_out(loss)
    reason = "its gradient is not finite" if blocks else "its gradient or its loss is not finite"
    if spike:
        mean, sigma = run.losses.deviations(loss)
        reason = (
            f"its loss {loss:.3f} stands {sigma:.1f} deviations above the last ones' {mean:.3f}"
        )
        run.journal.event("spike", step, loss=loss, mean=mean, sigma=sigma, skipped=skipped)
        say(run.mesh, f"warning: update {step}{' skipped' * skipped}: {reason}")
    if not skipped:
        run.losses.add(loss)
    if not skipped and not blocks:
        run.skipped = 0
        return
    run.skipped += 1
    run.journal.event("skipped", step, reason=reason, loss=loss, blocks=blocks)
    if run.skipped == 1 and not spike:
        what = f"{blocks} blocks of update {step}" if blocks else f"update {step}"
        say(run.mesh, f"warning: {what} skipped: {reason}")
    if run.skipped >= watch.max_skips:
        _rewind(run, parts)


def _rewind(run: Run, parts: Parts) -> None:
    """Back to the last checkpoint, and on with the data that follows what was read so far.

    Raises:
        UserError: there is no checkpoint, or the run has gone back too often.
    """
    config = run.config
    trouble = f"--lr {config.optimizer.lr:g}: {run.skipped} updates in a row were skipped, up to {run.step}"
    mend = "continue from a checkpoint with a lower --lr or with --grad_clipping 1"
    if run.rewinds >= config.watch.max_rewinds:
        raise UserError(f"{trouble}, after going back {run.rewinds} times (--max_rewinds); {mend}")
    parts.saves.finish()
    found = find("auto", run.records.folder, run.mesh)
    if found.folder is None:
        raise UserError(f"{trouble}, and there is no checkpoint to go back to; {mend}")
    resumed = load(found.folder, run.engine, config)
    run.rewinds += 1
    run.take(resumed.progress, position=run.position)
    run.records.rewind(resumed.progress.metrics)
    run.skipped, parts.bar.n = 0, run.step
    run.journal.event("rewind", run.step, to=run.step, reason=trouble, position=run.position)
    say(
        run.mesh,
        f"warning: {trouble}: back to {found.folder.name}, on with batch {run.position + 1}",
    )
    _save(
        run, parts
    )  # once more, with this position: a restart must not meet the bad batches again


def _end_if(asked: int, run: Run, parts: Parts) -> None:
    """Save and raise InterruptError, where a signal has asked for it."""
    if not asked:
        return
    if run.step and (run.step != parts.saves.begun or not parts.saves.stands):
        _save(run, parts)
    parts.saves.finish(LAST_WORDS)
    name = signal_name(asked)
    run.journal.event("interrupted", run.step, signal=name, saved=parts.saves.stands)
    run.journal.beat("interrupted")
    run.tracker.close()
    parts.trace.close()
    # Launchers end all ranks when one ends, and their signal is no second request: the first has written all.
    with contextlib.suppress(RuntimeError):  # the launcher that kept the store may be what is gone
        gather_patiently(run.mesh, None)
    ignore()
    kept = describe(run.step, parts.saves, run.records.folder)
    raise InterruptError(
        f"{name} after update {run.step}: {kept}; continue with --continue_from auto"
    )


def _evaluate(run: Run, parts: Parts) -> None:
    """Evaluate and record; a signal in the middle ends the run, which makes up for it when it is continued."""
    run.journal.beat("evaluating")
    began, step = time.perf_counter(), run.step

    def between(batch: int) -> None:
        parts.liveness.at("evaluation", step)
        run.journal.beat()
        if batch % _ASK_EVERY == 0:
            _end_if(run.asked(), run, parts)

    batches = run.data.evaluation(run.config.engine.batch_size)
    loss, tokens = evaluate(run.engine, batches, run.config.eval_mode, between)
    run.evaluated = (loss, tokens)
    line = {
        "step": step, "eval_loss": loss, "eval_perplexity": perplexity(loss), "eval_tokens": tokens,
        "time": round(time.time(), 3), "seconds": time.perf_counter() - began,
    }  # fmt: skip
    _record(run, line)
    held_out = f"held-out loss {loss:.4f}, perplexity {perplexity(loss):.2f} ({tokens:,} tokens)"
    say(run.mesh, f"step {step}: {held_out}")


def _save(run: Run, parts: Parts) -> None:
    run.journal.beat("saving")
    parts.liveness.at("a save", run.step)
    parts.saves.save()


def _record(run: Run, line: dict[str, Any]) -> None:
    run.records.metrics(line)
    run.tracker.log(line)
    if "loss" in line:
        left = run.config.optimizer.total_steps - run.step
        same = ("step", "loss", "tokens_seen", "tokens_per_second", "goodput")
        figures = {key: line[key] for key in same}
        run.journal.beat("training", eta_seconds=left * run.trained / run.step, **figures)


@contextlib.contextmanager
def _bar(run: Run, steps: int) -> "Iterator[tqdm[Any]]":
    terminal = sys.stderr.isatty()
    bar = tqdm(
        total=steps,
        initial=run.step,
        disable=not run.mesh.is_first,
        unit="update",
        mininterval=0.2 if terminal else 10.0,
        dynamic_ncols=terminal,
        ncols=None if terminal else 130,
    )
    try:
        yield bar
    finally:
        with contextlib.suppress(OSError):  # nobody reads any more
            bar.close()


def _advance(bar: "tqdm[Any]", line: dict[str, Any]) -> None:
    fields = {
        "loss": f"{line['loss']:.3f}",
        "lr": f"{line['lr']:.1e}",
        "tok/s": f"{line['tokens_per_second']:,.0f}",
        "peak": human_bytes(line["peak_memory_bytes"]),
    }
    if "mfu" in line:
        fields["MFU"] = f"{line['mfu']:.1%}"
    with contextlib.suppress(OSError):  # nobody reads any more
        bar.set_postfix(fields, refresh=False)
        bar.update()
