"""The releases that SAELens knows by name, such as `gpt2-small-res-jb`: where they lie, and what is in them.

`saelens_releases.json.xz` is made from SAELens' registry by `benchmarks/interop/saelens_releases.py`:

    {"saelens": VERSION, "releases": {RELEASE: {
        "repo": …, "model": …, "conversion": how SAELens reads other formats, "settings": what replaces its files',
        "dictionaries": [[ID, FOLDER if another, L0, factor of the activations], …]}}}
"""

import json
import lzma
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from transcoders.errors import FileFormatError
from transcoders.formats.hooks import hook_in, site_of_hook
from transcoders.formats.offers import Choice, Offer, choose, width_of

_TABLE = Path(__file__).with_name("saelens_releases.json.xz")


@dataclass(frozen=True, kw_only=True)
class Listed:
    """One dictionary of a release."""

    id: str
    folder: str
    l0: float | None
    stated: Mapping[str, Any] = field(hash=False)
    """Settings in the place of those of its files."""

    def offer(self) -> Offer:
        """What its names tell."""
        hook = hook_in(self.id) or hook_in(self.folder)
        place = None if hook is None else site_of_hook(hook)
        stream = re.search(r"resid_(pre|mid|post)", f"{self.id} {self.folder}")
        layer = re.search(r"layer_?(\d{1,3})(?!\d)|^l(\d{1,3})[amr]_", self.id)
        width = re.search(r"width_(\d{1,4}[km])(?![a-z0-9])", self.id)
        l0 = re.search(r"average_l0_(\d{1,6})$", self.folder)
        return Offer(
            id=self.id,
            files=(),
            layer=place.layer if place is not None else None if layer is None else int(layer[1] or layer[2]),
            site=place.kind if place is not None else None if stream is None else stream[0],
            width=None if width is None else width_of(width[1]),
            l0=float(l0[1]) if self.l0 is None and l0 is not None else self.l0,
        )


@dataclass(frozen=True, kw_only=True)
class Release:
    """What SAELens gives one name."""

    name: str
    repo: str
    model: str
    conversion: str | None
    """How SAELens reads it, where it is not in SAELens' own format."""
    dictionaries: tuple[Listed, ...]

    def offers(self) -> list[Offer]:
        """What there is, as far as the names tell: nothing is asked of the hub."""
        return [listed.offer() for listed in self.dictionaries]

    def only(self, id: str) -> "Release":
        """One dictionary of the release, by its id or its folder."""
        wanted = id.strip("/")
        found = tuple(listed for listed in self.dictionaries if wanted in (listed.id, listed.folder))
        if not found:
            near = get_close_matches(wanted, [listed.id for listed in self.dictionaries], n=4, cutoff=0.3)
            near = near or [listed.id for listed in self.dictionaries[:4]]
            raise FileFormatError(
                f"The release {self.name} has no {wanted[:100]!r}; its {len(self.dictionaries)} dictionaries are named "
                f"such as {', '.join(near)}."
            )
        return replace(self, dictionaries=found[:1])

    def holds(self, name: str) -> bool:
        """Whether a file of the repository can belong to it: it lies at the root, or in one of its folders."""
        return "/" not in name or any(name[:i] in self._folders for i in _ends(name))

    @cached_property
    def _folders(self) -> frozenset[str]:
        return frozenset(listed.folder for listed in self.dictionaries)

    def choose(self, offers: Sequence[Offer], choice: Choice, label: str) -> list[Offer]:
        """Those of a format's offers that are meant, under the ids and with the settings of the release."""
        at = {place: offer for offer in offers for place in _places(offer)}
        named = {listed.id: (listed, at[listed.folder]) for listed in self.dictionaries if listed.folder in at}
        if not named:
            if choice.id is not None:
                raise FileFormatError(f"{label} holds all layers in one set; load it without sae_id={choice.id!r}.")
            return choose(offers, choice, label)
        choices = [
            replace(offer, id=id, l0=listed.offer().l0 if offer.l0 is None else offer.l0)
            for id, (listed, offer) in named.items()
        ]
        chosen = choose(choices, replace(choice, id=None) if len(named) == 1 else choice, label)
        return [replace(named[offer.id][1], stated=named[offer.id][0].stated) for offer in chosen]


def release_named(name: str) -> Release | None:
    """The release of this name, if SAELens knows it."""
    entry = _table().get(name)
    if entry is None:
        return None
    settings, rows = entry.get("settings", {}), [[*row, *[None] * (4 - len(row))] for row in entry["dictionaries"]]
    return Release(
        name=name,
        repo=entry["repo"],
        model=entry["model"],
        conversion=entry.get("conversion"),
        dictionaries=tuple(
            Listed(
                id=id,
                folder=folder or id,
                l0=None if l0 is None else float(l0),
                stated=settings if factor is None else settings | {"norm_scaling_factor": float(factor)},
            )
            for id, folder, l0, factor in rows
        ),
    )


def release_names() -> list[str]:
    return list(_table())


def near_releases(name: str) -> list[str]:
    """Releases with a name like this one."""
    return get_close_matches(name, _table(), n=4, cutoff=0.5)


@cache
def _table() -> dict[str, Any]:
    return json.loads(lzma.decompress(_TABLE.read_bytes()))["releases"]


def _ends(name: str) -> Iterable[int]:
    """Where the folders of a path end, and the path."""
    return [*(found.start() for found in re.finditer("/", name)), len(name)]


def _places(offer: Offer) -> set[str]:
    """The folders and files by which a registry may speak of an offer."""
    folders = {name.rpartition("/")[0] for name in offer.files}
    return ({offer.id.strip("/")} | folders | set(offer.files)) - {""}
