"""The end of a run that was trained to its end: a sample of its writing, the summary, the picture."""

from typing import Any

from sltrain_dist.train.evaluate import perplexity, write_text
from sltrain_dist.train.run import Run
from sltrain_dist.train.summary import human_bytes, peak_memory, say

SAMPLE_TOKENS = 80
SAMPLE_SECONDS = 30.0  # a 7B on a CPU takes as long for two tokens


def finish(run: Run, rates: list[float]) -> dict[str, Any]:
    """Write the sample, the summary and the picture; returns the summary. ``rates``: tokens a second of the updates."""
    assert run.evaluated is not None
    loss, tokens = run.evaluated
    tokenizer = run.data.tokenizer
    prompt = tokenizer.encode_batch(["def "])[0] or [tokenizer.eos_id]
    written = write_text(
        run.engine,
        prompt,
        count=SAMPLE_TOKENS,
        window=run.config.data.sequence_length,
        stop=tokenizer.eos_id,
        seconds=SAMPLE_SECONDS,
    )
    text = tokenizer.decode(written)
    run.records.sample(text)
    settled = sorted(rates[len(rates) // 10 :])
    peak, seconds = peak_memory(run.mesh), run.seconds()
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
        "goodput": run.journal.goodput(run.trained),
        "restarts": run.journal.restarts,
    }
    if (
        rates or not run.records.summarised
    ):  # else a run that had ended before: the figures of its training stand
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
