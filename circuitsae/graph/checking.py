"""Files are untrusted: sizes are checked before anything is allocated, and every value before it is used."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LARGEST_NUMBER = 1e30
"""No larger number is taken for a weight or an activation; sums of squares stay finite."""
LARGEST_INDEX = 2**53 - 1
_DEEPEST = 24
_ROUNDING = 1e-6
MEASUREMENTS = ("predicted", "frozen", "replacement", "measured", "control")
"""The columns of `edge_notes` that hold numbers."""


class MalformedError(ValueError):
    """What is wrong with a file, as a clause without its name; readers turn it into a `FileFormatError`."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The largest file that is read. For larger ones that you trust: `read_graph(path, limits=Limits(nodes=…))`."""

    file_bytes: int = 512 * 2**20
    values: int = 20_000_000
    """Values of a JSON document, or tags of an XML one; bounds the memory that parsing takes."""
    nodes: int = 1_000_000
    edges: int = 5_000_000
    tokens: int = 100_000
    layers: int = 10_000

    def check(self, name: str, count: int) -> None:
        """Raises `MalformedError` where there are more `name` than allowed."""
        if count > (most := getattr(self, name)):
            raise MalformedError(
                f"it has {count:,} {name.replace('_', ' ')}, more than the {most:,} that are read; "
                f"if you trust it, read it with a limit of your own: limits=Limits({name}={count})"
            )


def read_bytes(path: Path, limits: Limits) -> bytes:
    """The content of a regular file no larger than the limit."""
    if not path.is_file():
        raise MalformedError("there is no such file; give the file of one graph")
    try:
        size = path.stat().st_size
        limits.check("file_bytes", size)
        with path.open("rb") as file:
            content = file.read(size + 1)  # `read` takes memory for all it is asked for
    except OSError as error:
        raise MalformedError(f"it cannot be read ({error.strerror})") from error
    if len(content) > size:
        raise MalformedError("it grew while it was read; try again once it is written")
    return content


def parse_json(content: bytes, limits: Limits) -> dict[str, Any]:
    """A JSON object; NaN and infinities in it count as missing."""
    limits.check("values", sum(map(content.count, (b",", b"{", b"["))))
    try:
        document = json.loads(content.decode("utf-8-sig"), parse_constant=lambda _: None)
    except json.JSONDecodeError as error:
        written = error.doc.rstrip()
        cut = "; the file seems to be cut off" if error.pos >= len(written) - 1 or written[-1] not in "}]" else ""
        raise MalformedError(
            f"it is not JSON ({error.msg} at line {error.lineno}, column {error.colno}){cut}"
        ) from error
    except UnicodeDecodeError as error:
        raise MalformedError(f"it is not text in UTF-8 (byte {error.start})") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets in brackets
        raise MalformedError("its JSON has a number or a nesting beyond all measure") from error
    return mapping(document, "the document")


# single values


def mapping(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise MalformedError(f"{what} is {shown(value)}; expected an object")
    return value


def sequence(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise MalformedError(f"{what} is {shown(value)}; expected a list")
    return value


def text(value: Any, what: str) -> str:
    """A string; halves of characters, which no file can be written with, become U+FFFD."""
    if not isinstance(value, str):
        raise MalformedError(f"{what} is {shown(value)}; expected text")
    return value if value.isascii() else value.encode("utf-8", "surrogatepass").decode("utf-8", "replace")


def number(value: Any, what: str) -> float:
    """A finite number; NaN where it is missing."""
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise MalformedError(f"{what} is {shown(value)}; expected a number")
    if abs(value) > LARGEST_NUMBER:
        raise MalformedError(f"{what} is {shown(value)}; expected a number below {LARGEST_NUMBER:g}")
    return float(value)


def present(value: Any, what: str) -> float:
    """A finite number that must not be missing."""
    found = number(value, what)
    if math.isnan(found):
        raise MalformedError(f"{what} is missing; expected a number")
    return found


def share(value: Any, what: str, *, optional: bool = False) -> float:
    """A number from 0 to 1, but for rounding; NaN where it may be missing and is."""
    found = number(value, what) if optional else present(value, what)
    if found < -_ROUNDING or found > 1 + _ROUNDING:
        raise MalformedError(f"{what} is {shown(value)}; expected a number from 0 to 1")
    return found


def whole(value: Any, what: str, least: int = 0, most: int = LARGEST_INDEX) -> int:
    """A whole number, also as text ("7") or as 7.0."""
    found = value
    if isinstance(value, str) and len(value) < 20 and value.lstrip("-").isascii() and value.lstrip("-").isdigit():
        found = int(value) if value.count("-") == value.startswith("-") else value
    elif isinstance(value, float) and value.is_integer():
        found = int(value)
    if isinstance(found, bool) or not isinstance(found, int) or not least <= found <= most:
        raise MalformedError(f"{what} is {shown(value)}; expected a whole number from {least} to {most:,}")
    return found


def plain(value: Any, depth: int = 0) -> Any:
    """JSON that can be written again: nothing infinite, nothing too deep, no halves of characters."""
    if depth > _DEEPEST:
        raise MalformedError(f"it nests objects more than {_DEEPEST} deep")
    match value:
        case dict():
            return {text(key, "a key"): plain(item, depth + 1) for key, item in value.items()}
        case list():
            return [plain(item, depth + 1) for item in value]
        case str():
            return text(value, "a text")
        case float():
            return value if math.isfinite(value) else None
        case int():
            if abs(value) > LARGEST_NUMBER:
                return str(value)
            return value if abs(value) <= LARGEST_INDEX else float(value)
    return value


def shown(value: Any) -> str:
    """A value inside an error message: short, on one line."""
    if isinstance(value, Mapping):
        return "an object"
    if isinstance(value, list):
        return "a list"
    if value is None:
        return "missing"
    found = ascii(value) if not isinstance(value, int) or abs(value) <= LARGEST_INDEX else "a huge number"
    return found if len(found) <= 40 else found[:39] + "…"
