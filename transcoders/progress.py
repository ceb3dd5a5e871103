"""Progress bars: on the error stream of a terminal, and nowhere else, so that what a command prints can be piped."""

from rich.console import Console
from rich.progress import Progress, ProgressColumn


def progress_bar(
    *columns: ProgressColumn, shown: bool, transient: bool = True, console: Console | None = None
) -> Progress:
    """A bar, drawn where it is to be `shown` and a terminal is there; `transient`: gone at the end."""
    console = console or Console(stderr=True)
    return Progress(*columns, console=console, disable=not (shown and console.is_terminal), transient=transient)
