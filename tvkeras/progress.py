"""What a long job says of itself: how much is done, and how long the rest takes."""

import datetime
import sys
import time
from collections.abc import Callable

FIRST = 30.0  # seconds until a log hears of a job, then at twice that, and so on
LONGEST = 600.0  # seconds between two lines of a log


class Progress:
    """One line of a terminal, rewritten; in a log lines after 30 s, 1, 2, 4, 8 min, then every ten.

    Args:
        title: What is done.
        total: Of how many parts.
        unit: What a part is, such as "batch".
        done: Parts from before, which say nothing of the pace.
        shown: Whether to say anything.
        clock: Seconds now.
    """

    def __init__(
        self,
        title: str,
        total: int,
        unit: str,
        *,
        done: int = 0,
        shown: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._title = title
        self._total = total
        self._unit = unit
        self._before = done
        self._shown = shown
        self._clock = clock
        self._started = clock()
        self._due = FIRST

    def update(self, done: int) -> None:
        """Says that so many parts are done, if it is time to; always when all are."""
        elapsed = self._clock() - self._started
        last, terminal = done >= self._total, sys.stdout.isatty()
        if not self._shown or not (last or terminal or elapsed >= self._due):
            return
        self._due = elapsed + min(elapsed, LONGEST)
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
