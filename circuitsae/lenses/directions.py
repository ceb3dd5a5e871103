"""`direction_lens`: which tokens a feature, an error node or any vector in the stream speaks for, by itself.

The part of the logits that goes straight from a node to the unembedding: direct logit attribution (Elhage et al. 2021,
*A Mathematical Framework for Transformer Circuits*), through translators where the lens is a tuned one.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuitsae.attribution.linear import norm_of, post_norm
from circuitsae.interventions.targets import Error, Feature, parse_target
from circuitsae.lenses.translators import TunedLens
from circuitsae.replacement import ReplacementModel, Trace
from circuitsae.report.heat_map import heat_map
from circuitsae.report.text import visible
from transcoders.errors import InputError

if TYPE_CHECKING:
    import plotly.graph_objects as go

_AFTER = {"mlp_out": "ln2_post", "attn_out": "ln1_post"}
"""Sites whose vectors pass a norm of their own before they are added to the stream, in models that have it."""
_ADDED = ("mlp_added", "attn_added", "resid_pre", "resid_mid", "resid_post")


@dataclass(frozen=True)
class DirectionLens:
    """What some nodes add to the logits at their own position, straight."""

    nodes: tuple[str, ...]
    logits: Float[np.ndarray, "node d_vocab"]
    """Less their mean over the vocabulary, which no probability depends on; before a soft cap or a factor."""
    promoted: Int[np.ndarray, "node k"]
    suppressed: Int[np.ndarray, "node k"]
    texts: dict[int, str]
    tuned: bool

    def frame(self) -> pd.DataFrame:
        """`node`, `side` (promoted, suppressed), `place` (1 first), `token`, `text`, `logit`."""
        return pd.DataFrame(
            {
                "node": node, "side": side, "place": place + 1, "token": int(token), "text": self.texts[int(token)],
                "logit": self.logits[row, token],
            }
            for row, node in enumerate(self.nodes)
            for side in ("promoted", "suppressed")
            for place, token in enumerate(getattr(self, side)[row])
        )  # fmt: skip

    def figure(self) -> "go.Figure":
        """Node × place: the tokens that each promotes, then those that it suppresses."""
        order = np.concatenate([self.promoted, self.suppressed[:, ::-1]], axis=1)
        k = self.promoted.shape[1]
        return heat_map(
            np.take_along_axis(self.logits, order, axis=1),
            self.nodes,
            [f"+{place + 1}" for place in range(k)] + [f"−{k - place}" for place in range(k)],
            title=("Tuned lens" if self.tuned else "Logit lens") + " of directions",
            unit="logit",
            texts=[[visible(self.texts[int(token)]) for token in row] for row in order],
        )


@torch.no_grad()
def direction_lens(
    model: ReplacementModel,
    prompt: str | Int[Tensor, "pos"] | Trace,
    nodes: Sequence[str],
    *,
    lens: TunedLens | None = None,
    top: int = 10,
) -> DirectionLens:
    """`Σ_m norm*(v_m A_{m+1}) W_U`, v_m what a node adds to the stream at layer m, norm* the final norm held.

    A feature adds its activation times its decoder row of every layer that it writes to (`2.713@5`), an error node
    (`2.err@5`) what the dictionary misses. Norms are held at the scale that they have on the prompt at that position,
    so that the map is linear and contributions add up. With a tuned `lens`, A is the linear part of the translator of
    the stream after layer m; without, the identity.

    Raises `InputError` for a feature that is not active, and where a dictionary writes no vector of the stream.
    """
    if not nodes:
        raise InputError("There is no node to look at; name features as LAYER.INDEX@POSITION, errors as 2.err@5.")
    if not 1 <= top <= model.model.d_vocab:
        raise InputError(f"top={top} is no number of tokens to keep; give 1 to {model.model.d_vocab}.")
    trace = prompt if isinstance(prompt, Trace) else model.trace(prompt)
    if lens is not None:
        lens.check_fits(model.model)
    found = torch.stack([_straight(model, trace, node, lens) for node in nodes])
    logits = found - found.mean(-1, keepdim=True)
    promoted, suppressed = (logits.topk(top, largest=largest).indices.cpu().numpy() for largest in (True, False))
    texts = {int(token): model.model.token_string(int(token)) for token in np.unique([promoted, suppressed])}
    return DirectionLens(
        tuple(nodes), logits.double().cpu().numpy(), promoted, suppressed, texts, tuned=lens is not None
    )


def _straight(model: ReplacementModel, trace: Trace, node: str, lens: TunedLens | None) -> Float[Tensor, "d_vocab"]:
    """The logits of one node's direct path."""
    frozen, parts = trace.frozen, model.model.parts
    final = parts.final_norm
    pos, writes = _writes(model, trace, node)
    total = trace.errors.new_zeros(model.model.d_model)
    at = torch.tensor([pos], device=total.device)
    for layer, vector in writes:
        site = model.dictionaries.writes[layer]
        after = post_norm(frozen, layer, _AFTER[site.kind]) if site.kind in _AFTER else None
        added = vector if after is None else after.forward_at(vector[None], at)[0].to(vector)
        state = layer if site.kind == "resid_pre" else layer + 1
        total += added if lens is None or state == model.model.n_layers else added @ lens.A[state].to(added)
    if final is not None:
        total = norm_of(frozen, final, "ln_final").forward_at(total[None], at)[0].to(total)
    return total @ model.model.W_U


def _writes(model: ReplacementModel, trace: Trace, node: str) -> tuple[int, Iterator[tuple[int, Tensor]]]:
    """The position of a node, and what it writes at which layers."""
    target, length = parse_target(node), trace.n_positions
    if not isinstance(target, Feature | Error) or not isinstance(target.at, int):
        raise InputError(f"{node!r} is no feature or error node at a position; write it like 2.713@5 or 2.err@5.")
    if not -length <= target.at < length or target.layer >= model.model.n_layers:
        raise InputError(
            f"{node} is not on the prompt: it has {length} tokens, the model {model.model.n_layers} layers."
        )
    pos, dictionaries = target.at % length, model.dictionaries
    layers = dictionaries.write_layers(target.layer) if isinstance(target, Feature) else [target.layer]
    if strange := [dictionaries.writes[at] for at in layers if dictionaries.writes[at].kind not in (*_AFTER, *_ADDED)]:
        raise InputError(f"The dictionary of {node} writes {strange[0]}, which is not added to the stream.")
    if isinstance(target, Error):
        return pos, iter([(target.layer, trace.errors[target.layer, pos])])
    index, value = trace.features
    here = (index == torch.tensor([target.layer, pos, target.index], device=index.device)).all(-1).nonzero()
    if not len(here):
        raise InputError(f"The feature {node} is not active on the prompt; name one that is.")
    activation, number = value[here[0, 0]], torch.tensor([target.index], device=index.device)
    rows = ((at, activation * dictionaries.decoder_rows(target.layer, number, at)[0]) for at in layers)
    return pos, rows
