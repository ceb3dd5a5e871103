"""Progress bars: on the error stream of a terminal, and nowhere else, so that what a command prints can be piped."""

from rich.console import Console
from rich.progress import Progress, ProgressColumn


def progress_bar(
    *columns: ProgressColumn, shown: bool, transient: bool = True, console: Console | None = None
) -> Progress:
    """A bar, drawn where it is to be `shown` and a terminal is there; `transient`: gone at the end."""
    console = console or Console(stderr=True)
    return Progress(*columns, console=console, disable=not (shown and console.is_terminal), transient=transient)


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
