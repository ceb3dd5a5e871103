"""What a picture of a circuit shows, before anything has a place: boxes, arrows, sentences. Plain text and numbers."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from transcoders.errors import InputError

BoxKind = Literal["answer", "group", "feature", "error", "token"]
Columns = Literal[1, 2]
"""Of a two-column page: as wide as one, 3.4 inches, or as both, 7 inches."""


@dataclass(frozen=True, slots=True)
class Box:
    """A node of the picture."""

    id: str
    title: str
    kind: BoxKind
    order: float
    """Layer, or the mean of its members': what comes before what."""
    detail: str = ""
    """A second, smaller text."""
    column: int | None = None
    """Boxes with the same number stand below one another, numbers go from left to right; None: wherever it fits. Of
    tokens their order."""


@dataclass(frozen=True, slots=True)
class Arrow:
    """A sum of edges from one box to another."""

    source: str
    target: str
    weight: float
    strength: float
    """0 to 1, how wide it is drawn."""
    note: str = ""
    """What stands beside the weight: a verdict mark, the input that it enters by."""
    number: str = "{:+.2f}"
    """How the weight is written."""
    looks: bool = False
    """Whether it says where a head looks, and not what raises or lowers what."""

    @property
    def label(self) -> str:
        return f"{self.number.format(self.weight)} {self.note}".replace("-", "−").strip()


@dataclass(frozen=True)
class Diagram:
    """A picture's content.

    Raises `InputError` for two boxes of one id, an arrow whose ends are not among the boxes, or no box.
    """

    boxes: tuple[Box, ...]
    arrows: tuple[Arrow, ...]
    sentences: tuple[str, ...] = ()
    """What the picture shows, in words, below it."""
    legend: str = ""
    """What numbers and marks mean."""
    title: str = ""
    shown: float = field(default=float("nan"), compare=False)
    """The share of the whole that the arrows hold."""

    def __post_init__(self) -> None:
        ids = [box.id for box in self.boxes]
        if not ids:
            raise InputError("The picture has no box; a circuit needs at least one answer and what leads to it.")
        if len(set(ids)) < len(ids):
            raise InputError(f"Two boxes of the picture are {max(ids, key=ids.count)!a:.80}; give each its own id.")
        for arrow in self.arrows:
            for end in (arrow.source, arrow.target):
                if end not in ids:
                    raise InputError(f"An arrow of the picture ends at {end!a:.80}, which is none of its boxes.")

    def box(self, name: str) -> Box:
        """The box of this id."""
        return next(box for box in self.boxes if box.id == name)

    def titles(self, ids: Sequence[str]) -> list[str]:
        """What these boxes are called."""
        named = {box.id: box.title for box in self.boxes}
        return [named[name] for name in ids]


def check_columns(columns: int) -> None:
    """Raises `InputError` for a width that there is not."""
    if columns not in get_args(Columns):
        raise InputError(f"columns={columns!r} is no width of a picture; use 1 (3.4 inches) or 2 (7 inches).")
