"""What an intervention acts on: features, error nodes, tokens, heads, MLPs, and sites of the residual stream.

`at` says where: None is every position (features and errors: those from the first one with features on),
an integer is a position (a negative one counts from the prompt's end), a text the name of one of the prompt's roles;
a tuple holds several.
"""

import re
from dataclasses import dataclass
from typing import get_args

from jaxtyping import Int
from torch import Tensor

from transcoders.errors import InputError
from transcoders.sites import Site, SiteKind

Places = int | str | tuple[int | str, ...] | None


@dataclass(frozen=True)
class Feature:
    """One feature; its value is its activation."""

    layer: int
    index: int
    at: Places = None


@dataclass(frozen=True, eq=False)
class Features:
    """Many features at given positions, each with its own activation: a circuit, or all that is outside one."""

    index: Int[Tensor, "n 3"]
    """Layer, position and feature of each, as in `SparseFeatures`."""


@dataclass(frozen=True)
class Error:
    """What the dictionary misses of an MLP's output, or of an SAE's site: `e_l(p) = write_l(p) − y_l(p)`, clean run."""

    layer: int
    at: Places = None


@dataclass(frozen=True)
class Token:
    """The embedding of the token at a position."""

    at: Places = None


@dataclass(frozen=True)
class Head:
    """One attention head; its value is z, the pattern's mean of the head's value vectors (`[d_head]`).

    A vector of `d_model` numbers to set or add is taken as the head's output, after W_O.
    """

    layer: int
    head: int
    at: Places = None


@dataclass(frozen=True)
class MLP:
    """The output of one MLP, whatever stands in its place in the regime, where its transcoder writes if it has one."""

    layer: int
    at: Places = None


@dataclass(frozen=True)
class Stream:
    """The vector at any site: the residual stream before, inside or after a block, or what a component reads or adds.

    A change at `resid_mid` enters the stream between attention and MLP. One at the site of an autoencoder is made after
    it has read: its features do not see it.
    """

    layer: int
    kind: SiteKind
    at: Places = None

    @property
    def site(self) -> Site:
        return Site(self.layer, self.kind)


Target = Feature | Features | Error | Token | Head | MLP | Stream

_SITES = "|".join(get_args(SiteKind))
_ID = re.compile(
    rf"(?:(?P<layer>\d+)\.(?:(?P<feature>\d+)|(?P<error>err)|head(?P<head>\d+)|(?P<mlp>mlp)|(?P<site>{_SITES}))"
    r"|(?P<token>tok))(?:@(?P<at>-?\d+|[A-Za-z]\S*))?"
)


def parse_target(text: str) -> Target:
    """The target that a node id or its like names.

    `2.713@5` a feature, `2.err@5` an error, `tok@5` a token, `2.head3@5` a head, `2.mlp@5` an MLP, `2.resid_pre@5` a
    site; without `@` every position, and after it a position or the name of a role.
    """
    found = _ID.fullmatch(text.strip())
    if found is None:
        raise InputError(
            f"Cannot read {text!r}; write a feature as LAYER.INDEX@POSITION such as 2.713@5 (without @ for every "
            "position), or 2.err@5, tok@5, 2.head3@5, 2.mlp@5, 2.resid_pre@5."
        )
    part = found.groupdict()
    at = part["at"]
    places: Places = int(at) if at is not None and at.lstrip("-").isdigit() else at
    if part["token"]:
        return Token(places)
    layer = int(part["layer"])
    if part["feature"]:
        return Feature(layer, int(part["feature"]), places)
    if part["head"]:
        return Head(layer, int(part["head"]), places)
    if part["error"] or part["mlp"]:
        return Error(layer, places) if part["error"] else MLP(layer, places)
    site = Site.parse(f"{layer}.{part['site']}")
    return Stream(site.layer, site.kind, places)


def target_id(target: Target) -> str:
    """The text that `parse_target` reads (several places joined by commas)."""
    match target:
        case Features(index):
            return f"{len(index)} features"
        case Feature(layer, index):
            name = f"{layer}.{index}"
        case Error(layer):
            name = f"{layer}.err"
        case Token():
            name = "tok"
        case Head(layer, head):
            name = f"{layer}.head{head}"
        case MLP(layer):
            name = f"{layer}.mlp"
        case Stream(layer, kind):
            name = f"{layer}.{kind}"
    if target.at is None:
        return name
    return f"{name}@{','.join(str(p) for p in (target.at if isinstance(target.at, tuple) else (target.at,)))}"
