"""Activations on disk: a folder of shards that is written once (`write_activations`) and read by any number of runs.

`store.json` says of what model, text and sites they are, and names each shard with its tokens, its size and its
SHA-256. It is written last, so a folder with it is complete. A shard is checked when it is first read.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any, get_args

import torch
from jaxtyping import Float32
from jsonschema import Draft202012Validator
from torch import Tensor

from transcoders.data.shards import Shard, StoreDtype, damaged
from transcoders.data.tokens import Boundaries
from transcoders.errors import DictionaryError, FileFormatError, InputError
from transcoders.files import file_hash, short_hash
from transcoders.language_model import LanguageModel
from transcoders.sites import Frame, Site

STORE, FORMAT, VERSION = "store.json", "circuitsae activations", 1
_OPEN_SHARDS = 2

_COUNT = {"type": "integer", "minimum": 1}
_TEXT = {"type": ["string", "null"]}
SHARD_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["file", "tokens", "bytes", "sha256", "rows"],
    "properties": {
        "file": {"type": "string", "pattern": r"^shard-\d{5,}\.safetensors$"},
        "tokens": _COUNT,
        "bytes": _COUNT,
        "sha256": {"type": "string", "pattern": "^[0-9a-f]{64}$"},
        "rows": {"type": "string"},
    },
}
_SETTINGS: dict[str, Any] = {
    "format": {"const": FORMAT},
    "version": {"const": VERSION},
    "model": {"type": "string"},
    "origin": {"type": "object", "additionalProperties": {"type": "string"}},
    "fingerprint": {"type": "string"},
    "frame": {"enum": ["raw", "folded"]},
    "n_layers": _COUNT,
    "d_model": _COUNT,
    "d_vocab": _COUNT,
    "corpus": {"type": "string"},
    "bos": {"type": "boolean"},
    "context": _COUNT,
    "documents": {"enum": list(get_args(Boundaries))},
    "separator": _TEXT,
    "first": {"type": "integer", "minimum": 0},
    "outliers": {"type": "number", "minimum": 0},
    "limits": {"type": "object", "additionalProperties": {"type": "number", "minimum": 0}},
    "sites": {"type": "array", "minItems": 1, "uniqueItems": True, "items": {"type": "string"}},
    "dtype": {"enum": list(get_args(StoreDtype))},
    "seed": {"type": "integer"},
    "most_tokens": {"type": ["integer", "null"], "minimum": 1},
    "shard_tokens": _COUNT,
    "block": _COUNT,
}
SETTINGS_SCHEMA: dict[str, Any] = {"type": "object", "required": list(_SETTINGS), "properties": _SETTINGS}
_SCHEMA = {
    "type": "object",
    "required": [*_SETTINGS, "shards"],
    "properties": {**_SETTINGS, "shards": {"type": "array", "minItems": 1, "items": SHARD_SCHEMA}},
}


@dataclass(frozen=True)
class StoredShard:
    """What is known of a shard once it is written."""

    file: str
    tokens: int
    bytes: int
    sha256: str
    rows: str
    """Hash of the rows of tokens that were read."""

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "StoredShard":
        return cls(**{name: record[name] for name in SHARD_SCHEMA["required"]})

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class StoreSettings:
    """What a store holds: the tensors in it are a function of the model, the text and these."""

    model: str
    origin: Mapping[str, str]
    """`LanguageModel.origin`."""
    fingerprint: str
    """`LanguageModel.fingerprint()` of its weights."""
    frame: Frame
    n_layers: int
    d_model: int
    d_vocab: int
    corpus: str
    bos: bool
    """Whether the rows begin with BOS."""
    context: int
    """Tokens of a row of text."""
    documents: Boundaries
    """What became of the ends of documents."""
    separator: str | None
    """Text between documents; None for the model's end-of-text token."""
    first: int
    """The first position of a row that is there; those before it were left out."""
    outliers: float
    """How many times the median norm of a site was too much; 0 where no token was left out for that."""
    limits: Mapping[Site, float]
    """The norms above which a token was left out, at all sites."""
    sites: tuple[Site, ...]
    dtype: StoreDtype
    seed: int
    """Of the order in each shard."""
    most_tokens: int | None
    """Tokens that were asked for; None for all of the text."""
    shard_tokens: int
    """At most so many tokens are in a shard."""
    block: int
    """Tokens of a shard that are read, and in int8 compressed, together."""

    @classmethod
    def from_json(cls, path: Path, record: Mapping[str, Any]) -> "StoreSettings":
        told = ("format", "version", "frame", "sites", "limits")
        names = {name: record[name] for name in _SETTINGS if name not in told}
        try:
            sites = tuple(Site.parse(text) for text in record["sites"])
            limits = {Site.parse(text): limit for text, limit in record["limits"].items()}
        except InputError as error:
            raise FileFormatError(f"{path} names a site that is none: {error}") from error
        return cls(**names, frame=Frame(record["frame"]), sites=sites, limits=limits)

    def to_json(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in _SETTINGS if name not in ("format", "version")}
        own |= {"origin": dict(self.origin), "frame": self.frame.name, "sites": [str(site) for site in self.sites]}
        own |= {"limits": {str(site): limit for site, limit in self.limits.items()}}
        return {"format": FORMAT, "version": VERSION, **own}


class ActivationStore:
    """A store that is open for reading.

    Raises `FileFormatError` for a folder without `store.json`, and for one whose shards are not all there in full. A
    shard that was changed raises it when it is first read.
    """

    settings: StoreSettings
    shards: tuple[StoredShard, ...]

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder).expanduser()
        path = self.folder / STORE
        record = read_record(path, _SCHEMA)
        self.settings = StoreSettings.from_json(path, record)
        self.shards = tuple(StoredShard.from_json(shard) for shard in record["shards"])
        self._checked: set[int] = set()
        self._open: dict[tuple[int, tuple[Site, ...]], Shard] = {}
        self._lock = Lock()
        for shard in self.shards:
            self._require_whole(shard)

    @staticmethod
    def is_store(folder: object) -> bool:
        """Whether this is the path of a folder with a `store.json`."""
        return isinstance(folder, str | Path) and (Path(folder).expanduser() / STORE).is_file()

    @property
    def sites(self) -> tuple[Site, ...]:
        return self.settings.sites

    @property
    def d_model(self) -> int:
        return self.settings.d_model

    @cached_property
    def tokens(self) -> int:
        """Tokens with activations."""
        return sum(shard.tokens for shard in self.shards)

    @cached_property
    def bytes(self) -> int:
        """Size of the shards on disk."""
        return sum(shard.bytes for shard in self.shards)

    @cached_property
    def digest(self) -> str:
        """A short hash of all shards: two stores have the same one where they hold the same bytes."""
        return short_hash(shard.sha256 for shard in self.shards)

    @property
    def smaller(self) -> float:
        """How many times smaller the shards are than the same activations in float32."""
        return 4 * self.tokens * len(self.sites) * self.d_model / self.bytes

    def __repr__(self) -> str:
        kept = self.settings
        return (
            f"ActivationStore({str(self.folder)!r}: {self.tokens:,} tokens of {kept.corpus!r}, {len(self.sites)} sites "
            f"of {kept.model!r}, {kept.dtype}, {self.bytes / 1e6:,.1f} MB)"
        )

    def require_model(self, model: LanguageModel) -> None:
        """Raises `DictionaryError` unless the activations are of these weights, in this frame."""
        kept = self.settings
        if kept.frame != model.frame:
            raise DictionaryError(
                f"{self.folder} holds activations of {kept.model} with {kept.frame.name} weights; the model given has "
                f"{model.frame.name} ones. Load it as it was, or write another store."
            )
        if kept.fingerprint != model.fingerprint():
            raise DictionaryError(
                f"{self.folder} holds activations of {kept.model} with the fingerprint {kept.fingerprint}; "
                f"{model.name} has {model.fingerprint()}. Give the model that the store was written with, "
                "or write another store."
            )

    def require_sites(self, sites: Sequence[Site]) -> None:
        """Raises `InputError` where the store lacks one of them."""
        if missing := sorted(set(sites) - set(self.sites)):
            raise InputError(
                f"{self.folder} lacks the activations at {_listed(missing)}; it has {_listed(self.sites)}. Train on "
                "those, or write a store with the others."
            )

    def blocks(self, shard: int) -> int:
        """How many blocks a shard is read in."""
        return -(-self.shards[shard].tokens // self.settings.block)

    def block_tokens(self, shard: int, block: int) -> int:
        return min(self.settings.block, self.shards[shard].tokens - block * self.settings.block)

    def read(self, shard: int, block: int, sites: Sequence[Site]) -> Float32[Tensor, "token site d_model"]:
        """The activations of one block, in the order in which they were written.

        Raises `FileFormatError` where the shard is not what was written.
        """
        size = self.settings.block
        start = block * size
        opened = self._shard(shard, tuple(sites))
        end = start + self.block_tokens(shard, block)
        found = torch.empty(end - start, len(sites), self.d_model)
        for place, site in enumerate(sites):
            found[:, place] = opened.read(site, start, end, size)
        return found

    def _shard(self, number: int, sites: tuple[Site, ...]) -> Shard:
        with self._lock:
            if (number, sites) not in self._open:
                stored = self.shards[number]
                path = self.folder / stored.file
                if number not in self._checked:
                    self._require_whole(stored)
                    if file_hash(path) != stored.sha256:
                        raise damaged(path, f"its SHA-256 is not the one in {STORE}")
                    self._checked.add(number)
                shard = Shard(path, sites, dtype=self.settings.dtype, tokens=stored.tokens, d_model=self.d_model)
                while len(self._open) >= _OPEN_SHARDS:
                    del self._open[next(iter(self._open))]
                self._open[number, sites] = shard
            return self._open[number, sites]

    def _require_whole(self, shard: StoredShard) -> None:
        path = self.folder / shard.file
        if not path.is_file():
            raise FileFormatError(f"There is no shard {path}, which {STORE} names; copy it there, or write it again.")
        if (found := path.stat().st_size) != shard.bytes:
            raise damaged(path, f"it has {found:,} bytes instead of {shard.bytes:,}")


def read_record(path: Path, schema: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON file of a store; `FileFormatError` for one that is not there, or not what the schema says."""
    if not path.is_file():
        raise FileFormatError(
            f"There is no {path}, so {path.parent} is no activation store, or one that is not complete; write it with "
            "`circuitsae activations`, and let every job end."
        )
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FileFormatError(f"Cannot read {path} ({str(error)[:200]}); copy it anew, or write it again.") from error
    errors = sorted(Draft202012Validator(schema).iter_errors(record), key=lambda e: (len(e.absolute_path), e.message))
    if errors:
        where = ".".join(map(str, errors[0].absolute_path))
        raise FileFormatError(
            f"{path} does not describe activations ({where + ': ' if where else ''}{errors[0].message[:200]}); copy it "
            "anew, or write it again."
        )
    return record


def _listed(sites: Sequence[Site]) -> str:
    return ", ".join(map(str, sites[:8])) + (f" and {len(sites) - 8} more" if len(sites) > 8 else "")
