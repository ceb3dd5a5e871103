"""What a source offers, and which of it is meant: one dictionary for each layer, or one set for all of them."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from itertools import groupby
from numbers import Integral, Real
from typing import Any, Literal, get_args

from transcoders.errors import FileFormatError, InputError
from transcoders.sites import Site, SiteKind

_ARGUMENTS = {"id": "sae_id"}
"""What users call a choice, where it has another name here."""
_NO_VARIANT = "none"


@dataclass(frozen=True, kw_only=True)
class Offer:
    """One dictionary, or one whole set, that a source offers."""

    id: str
    """Its folder or file inside of the source; empty for the source as a whole."""
    files: tuple[str, ...]
    """What of the source must be there to load it."""
    kind: str | None = None
    """`sae`, `plt` or `clt`, as far as it is known before loading."""
    layer: int | None = None
    """None for a set of all layers, and where it is not known before loading."""
    site: str | None = None
    """The kind of site it reads, as a `SiteKind`."""
    width: int | None = None
    """Features of a layer."""
    l0: float | None = None
    """Active features of a token, as its author measured them."""
    variant: str | None = None
    """What else tells it from its neighbours, as its author calls it."""
    stated: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Settings that somebody states beside its files, and that replace theirs."""
    asks: tuple[Literal["site", "layer"], ...] = ()
    """What neither names nor settings say, so that a choice has to."""

    @property
    def read(self) -> Site:
        """What a chosen dictionary of one layer reads."""
        return Site.parse(f"{self.layer}.{self.site}")

    def row(self) -> dict[str, Any]:
        return {
            "layer": self.layer, "site": self.site, "kind": self.kind, "width": self.width, "L0": self.l0,
            "variant": self.variant, "id": self.id,
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Which of the offers is meant; None where it does not matter."""

    id: str | None = None
    layers: tuple[int, ...] | None = None
    site: str | None = None
    width: int | None = None
    l0: float | None = None
    """The nearest of each layer is taken."""
    variant: str | None = None
    """`none` for offers without one."""

    @classmethod
    def of(
        cls,
        *,
        id: str | None = None,
        layers: int | Iterable[int] | None = None,
        site: str | None = None,
        width: int | str | None = None,
        l0: float | int | None = None,
        variant: str | None = None,
    ) -> "Choice":
        """As users write it: one layer or several, a width such as 16384 or "16k"."""
        if l0 is not None and (not _is_number(l0, Real) or not 0 < l0 < math.inf):
            raise InputError(f"l0={l0!r} is no number of active features; give a positive number.")
        if site is not None and site not in get_args(SiteKind):
            raise InputError(f"Unknown site {site!r}; the sites are {', '.join(get_args(SiteKind))}.")
        return cls(
            id=id,
            layers=None if layers is None else _layers(layers),
            site=site,
            width=None if width is None else width_of(width),
            l0=None if l0 is None else float(l0),
            variant=variant,
        )

    @property
    def stated(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if value is not None}


def _layers(given: Any) -> tuple[int, ...]:
    layers: tuple[Any, ...] = (given,)
    if isinstance(given, Iterable) and not isinstance(given, str):
        layers = tuple(given)
    if (
        not layers
        or not all(_is_number(layer, Integral) and layer >= 0 for layer in layers)
        or len({*layers}) < len(layers)
    ):
        raise InputError(f"layers={given!r} are no layers; give distinct numbers from 0, such as 3 or range(4, 8).")
    return layers


def _is_number(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def unsaid(site: str | None, layer: int | None) -> tuple[Literal["site", "layer"], ...]:
    """`Offer.asks` for what is not known of it."""
    return (*(("site",) if site is None else ()), *(("layer",) if layer is None else ()))


def width_of(text: int | str) -> int:
    """The features that "16k", "1m" or 16384 speaks of: the power of two nearby, or as many times 1024 ("24k")."""
    found = re.fullmatch(r"(\d{1,9})([km]?)", str(text).strip().lower())
    if found is None or int(found[1]) < 1:
        raise InputError(f"width={text!r} is no number of features; give one such as 16384 or '16k'.")
    thousands = {"": 0, "k": 1, "m": 2}[found[2]]
    number = int(found[1]) * 1000**thousands
    power = 2 ** round(math.log2(number))
    if thousands and abs(power - number) <= number / 20:
        return power
    return int(found[1]) * 1024**thousands


def width_text(width: int) -> str:
    """How authors write a width: 16k of 16384, 1m of 2²⁰."""
    for unit, letter in ((2**20, "m"), (2**10, "k")):
        if width >= unit and width & (width - 1) == 0:
            return f"{width // (1_000_000 if letter == 'm' else 1000)}{letter}"
    return str(width)


def fitting(offers: Sequence[Offer], choice: Choice, label: str) -> list[Offer]:
    """The offers with what is stated; the L0 is left to `choose`. `FileFormatError` where there are none.

    Those that leave something open are meant only where no others are.
    """
    if not offers:
        raise FileFormatError(f"{label} offers no dictionaries; check the name and what lies there.")
    left = [offer for offer in offers if not offer.asks and _fits(offer, choice)]
    left = left or [offer for offer in (_completed(offer, choice) for offer in offers) if _fits(offer, choice)]
    if not left:
        asked = ", ".join(f"{_ARGUMENTS.get(n, n)}={_text(n, value)}" for n, value in choice.stated.items())
        named = "" if choice.id is None else _near(choice.id, offers)
        raise FileFormatError(f"{label} offers nothing with {asked}; it offers {summary_of(offers)}{named}.")
    return left


def choose(offers: Sequence[Offer], choice: Choice, label: str) -> list[Offer]:
    """The offers that are meant: one set of all layers, or one dictionary for each layer, alike.

    Raises `FileFormatError` where nothing fits, and `InputError`, with the options, where more than one does.
    """
    left = fitting(offers, choice, label)
    for name in ("kind", "site", "width", "variant"):
        if len(options := {getattr(offer, name) for offer in left}) > 1 and _several_a_layer(left):
            raise InputError(
                f"{label} offers dictionaries of more than one {name} ({_options(name, options)}); say which with "
                f"{name}=… (--{name})."
                if name != "kind"
                else f"{label} holds dictionaries of more than one kind ({_options(name, options)}); give the folder "
                "of one of them."
            )
    for name in ("site", "layer"):
        if open_ := next((offer for offer in left if name in offer.asks), None):
            example = f"layers=… (--{name}s)" if name == "layer" else f"{name}=… (--{name})"
            raise InputError(
                f"Neither the names nor the settings of {label} say which {name} {open_.id or 'it'} reads; say it with "
                f"{example}."
            )
    _require_layers(left, choice, label)
    by_layer = [
        (layer, list(group)) for layer, group in groupby(sorted(left, key=_by_layer), key=lambda offer: offer.layer)
    ]
    return [_only(_nearest(group, choice.l0), layer, label) for layer, group in by_layer]


def _require_layers(left: Sequence[Offer], choice: Choice, label: str) -> None:
    """Raises `FileFormatError` unless every layer that is asked for is there; a set of all layers is not asked."""
    there = {offer.layer for offer in left}
    if choice.layers is None or None in there:
        return
    if missing := sorted(set(choice.layers) - there):
        raise FileFormatError(
            f"{label} offers nothing for the layers {missing}; of those asked for, it offers {summary_of(left)}."
        )


def _nearest(group: list[Offer], l0: float | None) -> list[Offer]:
    """Those of one layer whose L0 is the nearest to one that is stated."""
    if l0 is None or not (known := [offer.l0 for offer in group if offer.l0 is not None]):
        return group
    nearest = min(known, key=lambda other: abs(other - l0))
    return [offer for offer in group if offer.l0 == nearest]


def _only(group: Sequence[Offer], layer: int | None, label: str) -> Offer:
    """The one offer of a layer; `InputError`, with the options, where there are several."""
    if len(group) == 1:
        return group[0]
    where = "" if layer is None else f" of layer {layer}"
    l0s = sorted({offer.l0 for offer in group if offer.l0 is not None})
    if len(l0s) == len(group):
        raise InputError(
            f"{label} offers {len(group)} dictionaries{where}, of L0 {', '.join(f'{l0:g}' for l0 in l0s)}; say which "
            "with l0=… (--l0), of which the nearest is taken."
        )
    raise InputError(
        f"{label} offers {len(group)} dictionaries{where} ({_some(offer.id for offer in group)}); say which with "
        "sae_id=… (--sae-id)."
    )


def _completed(offer: Offer, choice: Choice) -> Offer:
    """An offer with what it leaves open, and the choice states."""
    if "site" in offer.asks and choice.site is not None:
        offer = replace(offer, site=choice.site, asks=tuple(name for name in offer.asks if name != "site"))
    if "layer" in offer.asks and choice.layers is not None and len(choice.layers) == 1:
        offer = replace(offer, layer=choice.layers[0], asks=tuple(name for name in offer.asks if name != "layer"))
    return offer


def _by_layer(offer: Offer) -> int:
    return -1 if offer.layer is None else offer.layer


def _several_a_layer(offers: Sequence[Offer]) -> bool:
    layers = [offer.layer for offer in offers]
    return len(set(layers)) < len(layers) or (None in layers and len(layers) > 1)


def _fits(offer: Offer, choice: Choice) -> bool:
    if choice.id is not None and offer.id.strip("/") != choice.id.strip("/"):
        return False
    if choice.layers is not None and offer.layer is not None and offer.layer not in choice.layers:
        return False
    if choice.variant == _NO_VARIANT and offer.variant is None:
        return choice.site in (None, offer.site) and choice.width in (None, offer.width)
    return all(getattr(choice, name) in (None, getattr(offer, name)) for name in ("site", "width", "variant"))


def _text(name: str, value: Any) -> str:
    if name == "layers":
        return ",".join(map(str, value))
    if isinstance(value, float):
        return f"{value:g}"
    return width_text(value) if name == "width" and isinstance(value, int) else str(value)


def _near(id: str, offers: Sequence[Offer]) -> str:
    """The ids that are most like one that there is not."""
    every = list(dict.fromkeys(offer.id for offer in offers if offer.id))
    near = get_close_matches(id, every, n=3, cutoff=0.3) or every[:3]
    return f"; ids such as {', '.join(near)}" if near else ""


def _options(name: str, options: Iterable[Any]) -> str:
    known = sorted(option for option in options if option is not None)
    return ", ".join(_text(name, option) for option in known) + (f" or {_NO_VARIANT}" if None in options else "")


def summary_of(offers: Sequence[Offer]) -> str:
    """What the offers differ in, such as `layer 0, 1; width 16k, 65k`."""
    found: Mapping[str, set[Any]] = {
        name: {getattr(offer, name) for offer in offers} - {None}
        for name in ("layer", "site", "width", "l0", "variant")
    }
    parts = [f"{name} {_some(_text(name, v) for v in sorted(values))}" for name, values in found.items() if values]
    return "; ".join(parts) or _some(offer.id or "one set" for offer in offers)


def _some(names: Iterable[str], most: int = 8) -> str:
    every = list(names)
    return ", ".join(every[:most]) + (f" and {len(every) - most} more" if len(every) > most else "")
