import contextlib
import io

from tvkeras.progress import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def said(stream, **settings):
    with contextlib.redirect_stdout(stream):
        progress = Progress("attack", 4, "batches", **settings)
        for done in (1, 2, 3, 4):
            progress.update(done)
    return stream.getvalue()


def test_a_log_hears_of_a_short_job_once():
    (line,) = said(io.StringIO()).splitlines()
    assert line.startswith("attack  4/4 batches  0:00:0")


def test_a_log_of_a_long_job_goes_silent_for_ten_minutes_at_most():
    minutes = iter(range(61))
    stream = io.StringIO()
    with contextlib.redirect_stdout(stream):
        progress = Progress("epoch", 60, "steps", clock=lambda: 60.0 * next(minutes))
        for done in range(1, 61):
            progress.update(done)
    said_at = [int(line.split()[1].partition("/")[0]) for line in stream.getvalue().splitlines()]
    assert said_at == [1, 2, 4, 8, 16, 26, 36, 46, 56, 60]


def test_a_terminal_shows_one_line_with_the_time_left():
    text = said(Terminal())
    assert text.count("\n") == 1
    assert text.endswith("\n")
    *earlier, last = text.split("\r")[1:]
    assert len(earlier) == 3
    assert all("left" in line for line in earlier)
    assert "left" not in last


def test_parts_from_before_say_nothing_of_the_pace():
    first, second, *_ = said(Terminal(), done=1).split("\r")[1:]
    assert "left" not in first
    assert "left" in second


def test_who_asks_for_silence_gets_it():
    assert said(Terminal(), shown=False) == ""
