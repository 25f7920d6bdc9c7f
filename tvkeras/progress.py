"""What a long job says of itself: how much is done, and how long the rest takes."""

import datetime
import sys
import time

FIRST = 30.0  # seconds until a log hears of a job, then at twice that, and so on


class Progress:
    """One line of a terminal, rewritten; in a log lines after 30 s, 1 min, 2 min and so on.

    Args:
        title: What is done.
        total: Of how many parts.
        unit: What a part is, such as "batch".
        done: Parts from before, which say nothing of the pace.
        shown: Whether to say anything.
    """

    def __init__(
        self, title: str, total: int, unit: str, *, done: int = 0, shown: bool = True
    ) -> None:
        self._title = title
        self._total = total
        self._unit = unit
        self._before = done
        self._shown = shown
        self._started = time.monotonic()
        self._due = FIRST

    def update(self, done: int) -> None:
        """Says that so many parts are done, if it is time to; always when all are."""
        elapsed = time.monotonic() - self._started
        last, terminal = done >= self._total, sys.stdout.isatty()
        if not self._shown or not (last or terminal or elapsed >= self._due):
            return
        self._due = 2 * elapsed
        text = f"{self._title}  {done}/{self._total} {self._unit}  {_clock(elapsed)}"
        if not last and done > self._before:
            pace = elapsed / (done - self._before)
            text += f", {_clock(pace * (self._total - done))} left"
        line = f"\r{text}\x1b[K" if terminal else text
        sys.stdout.write(line if terminal and not last else line + "\n")
        sys.stdout.flush()


def _clock(seconds: float) -> str:
    """Hours, minutes and seconds, such as 0:02:05."""
    return str(datetime.timedelta(seconds=round(seconds)))
