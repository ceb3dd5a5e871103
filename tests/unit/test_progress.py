"""Progress without a terminal."""

import io

from rich.console import Console

from transcoders.progress import progress_bar


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
        "collecting: 500 of 1,200, 70 s left",
        "collecting: 800 of 1,200, 40 s left",
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
    assert out.getvalue().splitlines() == ["loading: 3", "fitting: 5 of 10, 40 s left", "fitting: 5 of 10, 80 s left"]


def test_nothing_is_said_where_nothing_is_to_be_shown_or_the_caller_has_lines_of_its_own():
    out, clock = io.StringIO(), Clock()
    for settings in ({"shown": False}, {"shown": True, "lines": False}):
        with progress_bar(**settings, console=Console(file=out), clock=clock) as bar:
            task = bar.add_task("evaluating", total=10)
            clock.now += 100
            bar.advance(task)
    assert out.getvalue() == ""
