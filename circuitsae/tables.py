"""Tables that fit the terminal: no cell is broken; columns that matter least are left out, and named."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

_WIDE = 100_000
_SHORTEST = 8
"""Cells that may be cut keep so many characters."""
_NAMED = 6
"""So many of the columns that are left out are named."""


@dataclass(frozen=True)
class Column:
    """`keep`: where there is no room, columns are left out from the lowest on; 0: never. `text`: to the left, and cut
    in the end; `wraps`: between words, the longest of which fits.
    """

    name: str
    keep: int = 0
    text: bool = False
    wraps: bool = False


class _Terminal(Console):
    """A console whose command goes on, unheard, once nobody reads it: what it writes to files is wanted still."""

    def on_broken_pipe(self) -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def open_console(wide: bool = False) -> Console:
    """Where a command prints; `wide`: tables keep all of their columns."""
    return _Terminal(width=_WIDE if wide else None)


def show_table(
    console: Console, title: str, columns: Sequence[Column], rows: Sequence[Sequence[str | Text] | None]
) -> None:
    """Print a table; None among the rows is a line across. Cells are plain text, whatever brackets they hold."""
    cells = [None if row is None else [_cell(value) for value in row] for row in rows]
    chosen = _chosen(columns, cells, console.width)
    widths = _fitted([columns[i] for i in chosen], [_widths(columns[i], i, cells) for i in chosen], console.width)
    # Its own width: numbers are whole even where that is more than the terminal has.
    table = Table(show_header=any(column.name for column in columns), width=_total(widths))
    for number, width in zip(chosen, widths, strict=True):
        column = columns[number]
        table.add_column(
            Text(column.name),
            justify="left" if column.text or column.wraps else "right",
            width=width,
            no_wrap=not column.wraps,
            overflow="ellipsis",
        )
    for row in cells:
        if row is None:
            table.add_section()
        else:
            table.add_row(*(row[number] for number in chosen))
    if title:
        console.print(Text(title, style="italic"), soft_wrap=True)
    console.print(table, soft_wrap=True)
    if left_out := [column.name for number, column in enumerate(columns) if number not in chosen]:
        more = f" and {len(left_out) - _NAMED} more" if len(left_out) > _NAMED else ""
        said = f"No room for: {', '.join(left_out[:_NAMED])}{more}; --wide shows everything."
        console.print(Text(said, style="dim"), soft_wrap=True)


def _cell(value: str | Text) -> Text:
    return value if isinstance(value, Text) else Text(value)


def _widths(column: Column, number: int, rows: Sequence[Sequence[Text] | None]) -> tuple[int, int]:
    """The least width at which nothing is broken, and that at which everything is on one line."""
    texts = [column.name, *(row[number].plain for row in rows if row is not None)]
    most = max(map(cell_len, texts))
    words = [word for text in texts for word in text.split()] if column.wraps else texts
    return max(map(cell_len, words), default=0), most


def _total(widths: Sequence[int]) -> int:
    """Of a table, its borders included."""
    return sum(widths) + 3 * len(widths) + 1


def _chosen(columns: Sequence[Column], rows: Sequence[Sequence[Text] | None], width: int) -> list[int]:
    """Numbers of the columns that there is room for."""
    chosen = list(range(len(columns)))
    least = [_widths(column, number, rows)[0] for number, column in enumerate(columns)]
    while _total([least[i] for i in chosen]) > width and (loose := [i for i in chosen if columns[i].keep]):
        chosen.remove(min(loose, key=lambda i: (columns[i].keep, -i)))
    return chosen


def _fitted(columns: Sequence[Column], widths: Sequence[tuple[int, int]], width: int) -> list[int]:
    """A width for each column: as wide as its cells, less where it may wrap, and where it must be cut."""
    made = [most for _, most in widths]
    floors = [least if column.wraps else most for column, (least, most) in zip(columns, widths, strict=True)]
    cut = [min(least, _SHORTEST) if c.text else low for c, low, (least, _) in zip(columns, floors, widths, strict=True)]
    for lowest in (floors, cut):
        while _total(made) > width and (room := [i for i, low in enumerate(lowest) if made[i] > low]):
            made[max(room, key=lambda i: made[i])] -= 1
    return made
