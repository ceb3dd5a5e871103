"""Progress, on the error stream, so that what a command prints can be piped: a bar on a terminal, else lines."""

import threading
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

EVERY = 30.0
"""Seconds between lines where there is no terminal."""


def progress_bar(
    *columns: ProgressColumn,
    shown: bool,
    transient: bool = True,
    lines: bool = True,
    console: Console | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Progress:
    """A bar where it is to be `shown`, and without a terminal a line every half minute, if `lines`.

    Both say what is done, how fast that goes and how much time is left. `transient`: the bar is gone at the end.
    """
    console = console or Console(stderr=True, soft_wrap=True)
    if shown and lines and not console.is_terminal:
        return _Lines(console, clock)
    columns = columns or (
        TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), RateColumn(),
        TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    return Progress(*columns, console=console, disable=not (shown and console.is_terminal), transient=transient)


class RateColumn(ProgressColumn):
    """How fast a task goes."""

    def render(self, task: Task) -> Text:
        return Text("" if task.speed is None else spoken_rate(task.speed), style="progress.data.speed")


class _Lines(Progress):
    """Progress where nothing can be drawn: a line when half a minute has passed, whether something was done or not."""

    def __init__(self, console: Console, clock: Callable[[], float]) -> None:
        super().__init__(console=console, disable=True)
        self._clock = clock
        self._said = clock()
        self._began: dict[TaskID, tuple[float, float]] = {}
        self._ended = threading.Event()

    def start(self) -> None:
        super().start()
        threading.Thread(target=self._beat, daemon=True).start()

    def stop(self) -> None:
        self._ended.set()
        super().stop()

    def _beat(self) -> None:
        while not self._ended.wait(EVERY / 10):
            self.say()

    def say(self) -> None:
        """A line for the latest task that is not done, if half a minute has passed since the last."""
        with self._lock:
            if under_way := [number for number, task in self._tasks.items() if not task.finished]:
                self._say(under_way[-1])

    def add_task(self, description: str, *arguments: Any, **named: Any) -> TaskID:
        task = super().add_task(description, *arguments, **named)
        self._begin(task)
        return task

    def reset(self, task_id: TaskID, **named: Any) -> None:
        super().reset(task_id, **named)
        self._begin(task_id)

    def update(self, task_id: TaskID, **named: Any) -> None:
        super().update(task_id, **named)
        self._say(task_id)

    def advance(self, task_id: TaskID, advance: float | int = 1) -> None:
        super().advance(task_id, advance)
        self._say(task_id)

    def _begin(self, task: TaskID) -> None:
        self._began[task] = self._clock(), self._tasks[task].completed

    def _say(self, number: TaskID) -> None:
        with self._lock:
            now, task = self._clock(), self._tasks[number]
            if now - self._said < EVERY or number not in self._began:
                return
            self._said = now
            began, first = self._began[number]
            text, done, passed = task.description, task.completed - first, now - began
            if task.total is not None or done > 0:
                text += f": {task.completed:,.0f}"
            if task.total is not None:
                text += f" of {task.total:,.0f}"
            text += f", {spoken_rate(done / passed)}" if done > 0 and passed > 0 else f", {spoken_time(passed)} so far"
            if task.total is not None and done > 0:
                text += f", {spoken_time((task.total - task.completed) * passed / done)} left"
            self.console.print(text, highlight=False, markup=False)


def spoken_rate(per_second: float) -> str:
    """`1,200/s`, `3.4/s`, `12/min`, `5.1/h`."""
    for name, seconds in (("s", 1.0), ("min", 60.0), ("h", 3600.0)):
        if (rate := per_second * seconds) >= 1 or name == "h":
            return f"{rate:,.0f}/{name}" if rate >= 10 else f"{rate:.1f}/{name}"
    raise AssertionError("unreachable")


def spoken_time(seconds: float) -> str:
    """`40 s`, `12 min`, `3.4 h`, `5.1 days`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes, hours = seconds / 60, seconds / 3600
    if minutes < 100:
        return f"{minutes:.0f} min"
    return f"{hours:.1f} h" if hours < 48 else f"{hours / 24:.1f} days"


def spoken_size(n: int) -> str:
    """Bytes: `12 MB`, `3.4 GB`."""
    return f"{n / 2**30:,.1f} GB" if n >= 2**30 else f"{n / 2**20:,.0f} MB"
