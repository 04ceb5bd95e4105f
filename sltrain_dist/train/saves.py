"""When a run saves, and what it does about a save that failed.

A disk that is full, read-only or gone does not end the training: the alarm stands in the heartbeat, and the save is
tried again after ten updates, then twenty, and so on. The last save of a run is tried for as long as --timeout.
"""

import time
from pathlib import Path

from sltrain_dist.train.checkpoint_async import Saver
from sltrain_dist.train.checkpoint_write import Saved
from sltrain_dist.train.run import Run
from sltrain_dist.train.summary import say

_FIRST_RETRY = 10  # updates until a failed save is tried again; each failure in a row doubles it
FINAL_TRIES = 20  # of the last save, spread over --timeout
LAST_WORDS = 2  # tries more that an interrupted run makes: it may be killed soon


class Saves:
    """The saves of a run; ``saver``, which carries them out, is a context. All methods but `poll` are collective."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self.saver = Saver(run.mesh, run.config, self._ended)
        self._retry_at: int | None = None  # a save failed: try again after this update
        self._failures = 0  # in a row
        self.begun = run.kept  # step of the last save in the run's folder, -1: none
        self.unplanned = False  # a save failed, and no rank has planned another yet
        self.seconds = 0.0  # that the training stood still for saves since these were last taken

    @property
    def stands(self) -> bool:
        """Whether the last save that ended is on the disk."""
        return self.saver.stands

    def due(self) -> bool:
        """Whether to save now."""
        run, every = self._run, self._run.config.save_every
        if not run.step or (run.step == self.begun and self._retry_at is None):
            return False
        last = run.step == run.config.optimizer.total_steps
        retry = self._retry_at is not None and run.step >= self._retry_at
        # Not in a row of skipped updates: going back to such a checkpoint would lead nowhere.
        regular = every and run.step % every == 0 and not run.skipped
        return last or retry or bool(regular)

    def save(self) -> None:
        """Save a checkpoint of this moment, or begin to."""
        run, began = self._run, time.perf_counter()
        self.begun, self._retry_at = run.step, None
        self._say(self.saver.save(run.engine, run.progress()))
        self.seconds += time.perf_counter() - began
        if self.unplanned and not self.saver.flying:
            self.plan()

    def poll(self) -> None:
        """Take note of a save that has ended since; not collective."""
        self._say(self.saver.poll())

    def plan(self) -> None:
        """All ranks know that a save failed: settle when the next one is tried."""
        self._retry_at = self._run.step + _FIRST_RETRY * 2**self._failures
        self._failures += 1
        self.unplanned = False

    def finish(self, tries: int = 0) -> None:
        """Wait until the save in flight has ended, and where it failed try again so often, over --timeout at most.

        A signal that comes meanwhile ends the trying.
        """
        before = self._run.asked()
        self._say(self.saver.wait())
        while not self.stands and tries and self._run.asked() == before:
            tries -= 1
            time.sleep(self._run.config.timeout / FINAL_TRIES)
            self._run.journal.beat()
            self.save()
            self._say(self.saver.wait())

    def _ended(self, step: int, saved: Saved, seconds: float) -> None:
        """Called by the saver for every save that has ended."""
        journal, self.unplanned = self._run.journal, saved.folder is None
        if saved.folder is not None:
            self._failures = 0
            journal.event("saved", step, folder=str(saved.folder), seconds=seconds)
            journal.alarm("save", None)
            journal.beat(last_checkpoint=step)
        else:
            reason = saved.warnings[0] if saved.warnings else "unknown"
            journal.event("save_failed", step, reason=reason)
            journal.alarm("save", reason)

    def _say(self, lines: list[str]) -> None:
        for line in lines:
            say(self._run.mesh, line)


def describe(step: int, saves: Saves, folder: Path) -> str:
    """What an interrupted run has saved, for its last line."""
    if not step:
        return "nothing was trained yet"
    kept = saves.stands and saves.begun == step
    return f"saved {folder / f'step_{step}'}" if kept else "its last updates could not be saved"
