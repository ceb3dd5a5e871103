"""Progress, on the error stream, so that what a command prints can be piped: a bar on a terminal, else lines."""

import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import Progress, ProgressColumn, TaskID

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

    `transient`: the bar is gone at the end.
    """
    console = console or Console(stderr=True, soft_wrap=True)
    if shown and lines and not console.is_terminal:
        return _Lines(console, clock)
    return Progress(*columns, console=console, disable=not (shown and console.is_terminal), transient=transient)


class _Lines(Progress):
    """Progress where nothing can be drawn."""

    def __init__(self, console: Console, clock: Callable[[], float]) -> None:
        super().__init__(console=console, disable=True)
        self._clock = clock
        self._said = clock()
        self._began: dict[TaskID, tuple[float, float]] = {}

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
        now, task = self._clock(), self._tasks[number]
        if now - self._said < EVERY:
            return
        self._said = now
        began, first = self._began[number]
        text = f"{task.description}: {task.completed:,.0f}"
        if task.total is not None:
            text += f" of {task.total:,.0f}"
            if (done := task.completed - first) > 0:
                text += f", {spoken_time((task.total - task.completed) * (now - began) / done)} left"
        self.console.print(text, highlight=False, markup=False)


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
