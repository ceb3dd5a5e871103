"""Progress without a terminal."""

import io
import time

from rich.console import Console

from transcoders import progress
from transcoders.progress import _Lines, progress_bar, spoken_rate


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_without_a_terminal_a_line_comes_every_half_minute():
    out, clock = io.StringIO(), Clock()
    with progress_bar(shown=True, console=Console(file=out), clock=clock) as bar:
        task = bar.add_task("collecting", total=1200, completed=200)
        for _ in range(70):
            clock.now += 1
            bar.advance(task, 10)
    assert out.getvalue().splitlines() == [
        "collecting: 500 of 1,200, 10/s, 70 s left",
        "collecting: 800 of 1,200, 10/s, 40 s left",
    ]


def test_a_task_that_begins_anew_is_timed_anew_and_one_of_unknown_length_is_counted():
    out, clock = io.StringIO(), Clock()
    with progress_bar(shown=True, console=Console(file=out), clock=clock) as bar:
        task = bar.add_task("loading", total=None)
        clock.now += 40
        bar.advance(task, 3)
        bar.reset(task, description="fitting", total=10)
        clock.now += 20
        bar.update(task, advance=4)
        clock.now += 20
        bar.update(task, completed=5)
        clock.now += 40
        bar.update(task)
    assert out.getvalue().splitlines() == [
        "loading: 3, 4.5/min",
        "fitting: 5 of 10, 7.5/min, 40 s left",
        "fitting: 5 of 10, 3.8/min, 80 s left",
    ]


def test_a_step_that_takes_minutes_is_told_of_meanwhile():
    out, clock = io.StringIO(), Clock()
    with progress_bar(shown=True, console=Console(file=out), clock=clock) as bar:
        assert isinstance(bar, _Lines)
        task = bar.add_task("pruning", total=None)
        for _ in range(7):
            clock.now += 10
            bar.say()  # as the clock's thread does
        bar.reset(task, description="measuring", total=20)
        clock.now += 10
        bar.say()
        clock.now += 20
        bar.say()
        bar.update(task, completed=20)
        clock.now += 100
        bar.say()  # nothing is under way
    assert out.getvalue().splitlines() == [
        "pruning, 30 s so far",
        "pruning, 60 s so far",
        "measuring: 0 of 20, 30 s so far",
    ]


def test_lines_come_by_themselves(monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 0.05)
    out = io.StringIO()
    with progress_bar(shown=True, console=Console(file=out)) as bar:
        bar.add_task("pruning", total=None)
        time.sleep(0.3)
    said = len(out.getvalue().splitlines())
    assert said >= 2
    time.sleep(0.1)
    assert len(out.getvalue().splitlines()) == said


def test_rates_are_in_the_unit_that_can_be_read():
    assert [spoken_rate(x) for x in (1234.0, 12.0, 3.44, 0.5, 0.02, 0.0001)] == [
        "1,234/s", "12/s", "3.4/s", "30/min", "1.2/min", "0.4/h",
    ]  # fmt: skip


def test_nothing_is_said_where_nothing_is_to_be_shown_or_the_caller_has_lines_of_its_own():
    out, clock = io.StringIO(), Clock()
    for settings in ({"shown": False}, {"shown": True, "lines": False}):
        with progress_bar(**settings, console=Console(file=out), clock=clock) as bar:
            task = bar.add_task("evaluating", total=10)
            clock.now += 100
            bar.advance(task)
    assert out.getvalue() == ""
