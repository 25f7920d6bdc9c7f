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
