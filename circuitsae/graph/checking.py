"""Files are untrusted: sizes are checked before anything is allocated, and every value before it is used.

Arrays in npz files of strangers: what the headers say is checked before anything is unpacked.

What the nodes and edges of any file must satisfy: names that tell nodes apart, places inside of prompt and layers,
and edges that lead upwards.
"""

import hashlib
import json
import math
import tokenize
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.lib import format as npy
from scipy import sparse

from circuitsae.graph.nodes import Node, NodeKind

LARGEST_NUMBER = 1e30
"""No larger number is taken for a weight or an activation; sums of squares stay finite."""
LARGEST_INDEX = 2**53 - 1
_DEEPEST = 24
_ROUNDING = 1e-6


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


class ArrayHeader(NamedTuple):
    """What a member of an archive says of its array, before it is unpacked."""

    shape: tuple[int, ...]
    dtype: np.dtype
    start: int
    """Bytes of the header."""
    size: int
    """Bytes of the member, unpacked."""

    def check_size(self, name: str) -> None:
        """Raises `MalformedError` unless the member has the bytes that its shape and type take."""
        if min(self.shape, default=0) < 0 or self.size != self.start + math.prod(self.shape) * self.dtype.itemsize:
            raise MalformedError(f"{name} has {self.size:,} bytes, which do not fit {shown(str(self.shape))} numbers")


@contextmanager
def opened_archive(path: Path, largest: int, digest: str | None = None) -> Iterator[zipfile.ZipFile]:
    """The archive in a file of at most `largest` bytes; whatever is wrong with it raises `MalformedError`.

    digest: the SHA-256 that the file must have.
    """
    try:
        if (size := path.stat().st_size) > largest:
            raise MalformedError(f"{path.name} has {size:,} bytes, more than the {largest:,} that it can need")
        with path.open("rb") as file:
            if digest is not None and hashlib.file_digest(file, "sha256").hexdigest() != digest:
                raise MalformedError(f"{path.name} was changed, or not written together with graph.json")
            with zipfile.ZipFile(file) as archive:
                yield archive
    except MalformedError:
        raise
    except (
        *(OSError, EOFError, KeyError, ValueError, SyntaxError, RuntimeError, tokenize.TokenError),
        *(zipfile.BadZipFile, zlib.error),
    ) as error:
        said = " ".join((str(error) or type(error).__name__).split())
        raise MalformedError(f"{path.name} cannot be read ({said[:200]})") from error


def array_names(archive: zipfile.ZipFile) -> list[str]:
    """The names of the arrays, each once."""
    return list(dict.fromkeys(name.removesuffix(".npy") for name in archive.namelist()))


def array_header(archive: zipfile.ZipFile, name: str) -> ArrayHeader:
    """The header of an array, read without unpacking more than that."""
    member = archive.getinfo(f"{name}.npy")
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise MalformedError(f"{shown(name)} is packed in a way that NumPy does not write")
    with archive.open(member) as file, warnings.catch_warnings(action="ignore"):
        version = npy.read_magic(file)
        if version != (1, 0):
            raise MalformedError(f"{shown(name)} is an array of version {version}; expected (1, 0)")
        shape, _, dtype = npy.read_array_header_1_0(file)
        return ArrayHeader(shape, dtype, file.tell(), member.file_size)


def unpacked(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """An array whose header was found fit. Never unpickles."""
    with archive.open(f"{name}.npy") as file:
        return npy.read_array(file, allow_pickle=False)


def check_place(node: Node, name: str, n_tokens: int, n_layers: int) -> None:
    """Raises `MalformedError` for a node outside of the prompt's positions or of the layers that its kind may have."""
    bias = node.kind is NodeKind.BIAS
    least = -1 if bias else 0
    if not least <= node.pos < n_tokens:
        raise MalformedError(f"node {shown(name)} is at position {node.pos}, but there are {n_tokens} tokens")
    inside = {NodeKind.TOKEN: node.layer == -1, NodeKind.LOGIT: node.layer == n_layers}
    if node.vector:
        inside[NodeKind.LOGIT] = 0 <= node.layer <= n_layers
    # The bias of the unembedding stands beside the logits.
    if not inside.get(node.kind, least <= node.layer < n_layers + bias):
        raise MalformedError(f"node {shown(name)} is in layer {node.layer}, but there are {n_layers} layers")


def refuse_twice(names: Sequence[str], what: str) -> None:
    """Raises `MalformedError` where a name occurs more than once."""
    if len(set(names)) < len(names):
        seen: set[str] = set()
        twice = next(name for name in names if name in seen or seen.add(name))
        raise MalformedError(f"{what} {shown(twice)} occurs twice, so its edges cannot be told apart")


def check_edges(nodes: Sequence[Node], names: Sequence[str], weights: sparse.csr_array) -> None:
    """Raises `MalformedError` for a weight that no network has, and for an edge that no network can have.

    An edge leads to a feature or a logit, from a lower layer and from no later position. What is the same whatever the
    prompt may come from the target's own layer: a bias of attention is added before the MLP reads.
    """
    if weights.nnz and not np.abs(weights.data).max() <= LARGEST_NUMBER:
        raise MalformedError(f"an edge has a weight that is not a finite number below {LARGEST_NUMBER:g}")
    target, source = np.repeat(np.arange(len(nodes)), np.diff(weights.indptr)), weights.indices
    layer, pos = (np.array([getattr(node, name) for node in nodes], dtype=np.int64) for name in ("layer", "pos"))
    bias = np.array([node.kind is NodeKind.BIAS for node in nodes], dtype=bool)
    read = np.array([node.is_target for node in nodes], dtype=bool)
    wrong = [
        (~read[target], "but only features and logits have inputs"),
        (layer[source] >= layer[target] + bias[source], "but the source is not in a lower layer"),
        (pos[source] > pos[target], "but the source is at a later position"),
    ]
    for places, what in wrong:
        if places.any():
            edge = int(np.argmax(places))
            ends = [shown(names[i]) for i in (int(source[edge]), int(target[edge]))]
            raise MalformedError(f"an edge leads from {ends[0]} to {ends[1]}, {what}")
