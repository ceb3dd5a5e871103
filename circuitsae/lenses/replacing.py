"""One state of a run put in the place of another run's: at some positions, after a block or in what it adds."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from transcoders.errors import InputError
from transcoders.held import EMBED
from transcoders.language_model import Hook, LanguageModel
from transcoders.sites import Site

StateKind = Literal["resid_post", "mlp_out", "attn_out"]
"""The stream after a block, or what its MLP or its attention gives."""
BATCH_TOKENS = 4096
"""How many tokens go through the model at a time, unless said otherwise."""


def check_kind(kind: str, window: int, n_layers: int) -> None:
    """Raises `InputError` for an unknown kind of state, and for windows that there are none of."""
    if kind not in get_args(StateKind):
        raise InputError(f"Unknown state {kind!r}; the states are {', '.join(get_args(StateKind))}.")
    if not 1 <= window <= n_layers:
        raise InputError(f"window={window} is no number of layers of this model; give 1 to {n_layers}.")
    if kind == "resid_post" and window > 1:
        raise InputError(
            f"window={window} of the stream is one state too many: the last of them decides alone; give window=1, or "
            "kind='mlp_out' or 'attn_out'."
        )


def windows_of(n_layers: int, window: int) -> list[range]:
    """Around each layer the `window` layers that are replaced together, fewer at both ends."""
    before = (window - 1) // 2
    return [range(max(0, at - before), min(n_layers, at - before + window)) for at in range(n_layers)]


class Cell(NamedTuple):
    """What is replaced in one run."""

    layers: range
    where: Bool[Tensor, "row pos"]


@dataclass(frozen=True)
class Run:
    """Rows of tokens through the model, and what was at each state."""

    tokens: Int[Tensor, "row pos"]
    at: Mapping[Site, Float[Tensor, "row pos d_model"]]
    final: Float[Tensor, "row pos _"]
    """What the unembedding reads."""
    embed: Float[Tensor, "row pos d_model"] | None = None
    """Embeddings in the place of the tokens' own."""


@torch.no_grad()
def run_of(
    model: LanguageModel,
    tokens: Int[Tensor, "row pos"],
    kind: StateKind,
    embed: Float[Tensor, "row pos d_model"] | None = None,
) -> Run:
    """One run with its states, from other embeddings than the tokens' where they are given."""
    kinds: tuple[StateKind, ...] = ("resid_post",) if kind == "resid_post" else ("resid_post", kind)
    sites = [Site(layer, each) for layer in range(model.n_layers) for each in kinds]
    final, at = model.run_to_unembedding(tokens, sites, held=_embedded(embed))
    return Run(tokens, at, final, embed)


@torch.no_grad()
def replaced(
    model: LanguageModel, kind: StateKind, base: Run, source: Run, cells: Sequence[Cell], batch_tokens: int
) -> Iterator[Float[Tensor, "cell row pos _"]]:
    """What the unembedding reads in `base` with each cell's states taken from `source`, some cells at a time, in order.

    A run begins at the first block that can see the change.
    """
    at_once = max(1, batch_tokens // base.tokens.numel())
    start = 0
    while start < len(cells):
        layers = cells[start].layers
        some = [cell.where for cell in cells[start : start + at_once] if cell.layers == layers]
        yield _together(model, kind, base, source, layers, torch.stack(some))
        start += len(some)


def _together(
    model: LanguageModel, kind: StateKind, base: Run, source: Run, layers: range, where: Bool[Tensor, "cell row pos"]
) -> Float[Tensor, "cell row pos _"]:
    """Cells of the same layers, side by side as rows."""
    cells = len(where)
    tokens, chosen = base.tokens.repeat(cells, 1), where.flatten(0, 1)[..., None]

    def put(layer: int, value: Tensor) -> Tensor:
        return torch.where(chosen, source.at[Site(layer, kind)].repeat(cells, 1, 1), value)

    if kind == "resid_post":
        layer = layers[-1]
        stream = put(layer, base.at[Site(layer, kind)].repeat(cells, 1, 1))
        final, _ = model.run_to_unembedding(tokens, start=layer + 1, stream=stream)
    else:
        first = layers[0]
        edits: dict[Site, Hook] = {Site(at, kind): _putting(put, at) for at in layers}
        stream = base.at[Site(first - 1, "resid_post")].repeat(cells, 1, 1) if first else None
        embed = None if first or base.embed is None else base.embed.repeat(cells, 1, 1)
        final, _ = model.run_to_unembedding(tokens, edits=edits, start=first, stream=stream, held=_embedded(embed))
    return final.unflatten(0, (cells, -1))


def _putting(put: Callable[[int, Tensor], Tensor], layer: int) -> Hook:
    return lambda value: put(layer, value)


def _embedded(embed: Tensor | None) -> dict[str, Hook]:
    return {} if embed is None else {EMBED: lambda _: embed}
