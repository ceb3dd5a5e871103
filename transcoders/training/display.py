"""What a run shows of itself: one line, drawn again and again on a terminal, every half minute where there is none."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

from transcoders.progress import EVERY, progress_bar, spoken_time


class Display:
    """Tokens a second, FVU, L0, dead latents and the time left of a run, on the error stream; for a `with`."""

    def __init__(
        self,
        names: Sequence[str],
        *,
        steps: int,
        done: int,
        batch: int,
        shown: bool,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._names, self._steps, self._batch, self._clock = list(names), steps, batch, clock
        self._console = Console(stderr=True, soft_wrap=True) if console is None else console
        self._lines = shown and not self._console.is_terminal
        self._first, self._done = done, done
        self._figures = ""
        columns = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
        )  # fmt: skip
        self._bar = progress_bar(*columns, shown=shown, transient=False, lines=False, console=self._console)
        self._task = self._bar.add_task(f"training {', '.join(self._names)}", total=steps, completed=done, figures="")
        self._stack = ExitStack()

    def __enter__(self) -> "Display":
        self._stack.enter_context(self._bar)
        self._started = self._shown = self._clock()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def measured(self, metrics: Sequence[Mapping[str, Any]]) -> str:
        """Take in the metrics of all dictionaries; returns them as text."""
        texts = [f"FVU {m['fvu']:.3f}, L0 {m['l0']:.1f}, dead {m['dead']:.1%}" for m in metrics]
        if len(texts) > 1:
            texts = [f"{name}: {text}" for name, text in zip(self._names, texts, strict=True)]
        return self.noted("; ".join(texts))

    def noted(self, figures: str) -> str:
        """Take in figures as they are to be shown."""
        self._figures = figures
        return figures

    def advance(self) -> None:
        """One step is done."""
        self._done += 1
        now = self._clock()
        self._bar.update(self._task, advance=1, figures=f"{self._rate(now)}, {self._figures}")
        if self._lines and (now - self._shown >= EVERY or self._done == self._steps):
            self._shown = now
            left = (self._steps - self._done) * (now - self._started) / (self._done - self._first)
            figures = f", {self._figures}" if self._figures else ""
            self._console.print(
                f"step {self._done:,} of {self._steps:,}: {self._rate(now)}{figures}, {spoken_time(left)} left",
                highlight=False, markup=False,
            )  # fmt: skip

    def _rate(self, now: float) -> str:
        """Of this session, since its start."""
        return f"{(self._done - self._first) * self._batch / max(now - self._started, 1e-9):,.0f} tokens/s"
