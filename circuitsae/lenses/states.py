"""`logit_lens`: what the stream after each block would say, were it the last one.

Source: nostalgebraist 2020, *interpreting GPT: the logit lens* (LessWrong).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuitsae.lenses.reading import check_last, lens_logits, streams_of
from circuitsae.lenses.translators import TunedLens
from circuitsae.report.heat_map import heat_map
from circuitsae.report.text import visible
from transcoders.errors import InputError
from transcoders.language_model import LanguageModel

if TYPE_CHECKING:
    import plotly.graph_objects as go

Shown = Literal["probability", "kl", "entropy", "target"]
_UNITS: dict[Shown, str] = {
    "probability": "P(first token)", "kl": "KL(model ‖ lens), nats", "entropy": "entropy, nats", "target": "P(target)",
}  # fmt: skip


@dataclass(frozen=True)
class Lens:
    """What a lens reads in a prompt, by state: before block 0, after block 0, …, after the last one."""

    tokens: tuple[str, ...]
    top: Int[np.ndarray, "state pos k"]
    """The most probable tokens, the first one first."""
    probabilities: Float[np.ndarray, "state pos k"]
    texts: dict[int, str]
    """Of every token in `top`."""
    kl: Float[np.ndarray, "state pos"]
    """KL(model ‖ lens) in nats: how far from what the model says in the end."""
    entropy: Float[np.ndarray, "state pos"]
    target: Float[np.ndarray, "state pos"]
    """Probability of the target."""
    rank: Int[np.ndarray, "state pos"]
    """How many tokens are more probable than the target."""
    target_text: str
    """The target: one token, or at each position the model's own first choice ("")."""
    tuned: bool

    @property
    def states(self) -> tuple[str, ...]:
        return ("embeddings", *(f"after {layer}" for layer in range(len(self.kl) - 1)))

    def frame(self) -> pd.DataFrame:
        """A row per state and position.

        `state`, `layer` (−1 before block 0), `pos`, `token`, `first` (its most probable token), `probability`, `kl`,
        `entropy`, `target` (its probability), `rank`.
        """
        return pd.DataFrame(
            {
                "state": name, "layer": row - 1, "pos": pos, "token": token,
                "first": self.texts[int(self.top[row, pos, 0])], "probability": self.probabilities[row, pos, 0],
                "kl": self.kl[row, pos], "entropy": self.entropy[row, pos], "target": self.target[row, pos],
                "rank": self.rank[row, pos],
            }
            for row, name in enumerate(self.states)
            for pos, token in enumerate(self.tokens)
        )  # fmt: skip

    def figure(self, show: Shown = "probability") -> "go.Figure":
        """State × position with each cell's first token, coloured by one of its figures."""
        if show not in _UNITS:
            raise InputError(f"show={show!r} is no figure of a lens; use one of {', '.join(_UNITS)}.")
        values = self.probabilities[..., 0] if show == "probability" else getattr(self, show)
        names = {token: visible(text) for token, text in self.texts.items()}
        hover = [
            [
                ", ".join(f"{names[int(t)]} {p:.3f}" for t, p in zip(tops, shares, strict=True))
                for tops, shares in zip(*cells, strict=True)
            ]
            for cells in zip(self.top, self.probabilities, strict=True)
        ]
        of = f" of {visible(self.target_text)}" if show == "target" and self.target_text else ""
        return heat_map(
            values,
            self.states,
            [f"{pos} {visible(token)}" for pos, token in enumerate(self.tokens)],
            title=("Tuned lens" if self.tuned else "Logit lens") + of,
            unit=_UNITS[show],
            texts=[[names[int(cell)] for cell in row] for row in self.top[..., 0]],
            hover=hover,
        )


@torch.no_grad()
def logit_lens(
    model: LanguageModel,
    prompt: str | Int[Tensor, "pos"],
    *,
    lens: TunedLens | None = None,
    target: str | int | None = None,
    top: int = 5,
) -> Lens:
    """`softmax(unembed(norm(h)))` for the stream h before the first and after each block, with the model's final norm.

    With a tuned `lens`, h is first translated: `h A + b` of that state. `target`: a token to follow, by default the
    model's own first choice at each position. The last state's logits are the model's, which is checked.
    Raises `ModelError` where they are not: something else stands between the last block and the logits.
    """
    if not 1 <= top <= model.d_vocab:
        raise InputError(f"top={top} is no number of tokens to keep; give 1 to {model.d_vocab}.")
    tokens = model.to_tokens(prompt) if isinstance(prompt, str) else model.check_tokens(prompt)
    logits, streams = streams_of(model, tokens[None])
    logits, streams = logits[0], streams[:, 0]
    check_last(model, streams[-1], logits)
    if lens is not None:
        streams = lens.translate(streams, model)
    said = logits.argmax(-1) if target is None else torch.full_like(tokens, _token(model, target))
    expected = logits.double().log_softmax(-1)
    parts = [_read(model, state, expected, said, top) for state in streams]
    found = [torch.stack(side).cpu().numpy() for side in zip(*parts, strict=True)]
    texts = {int(token): model.token_string(int(token)) for token in np.unique(found[0])}
    named = "" if target is None else model.token_string(int(said[0]))
    return Lens(
        tokens=tuple(model.token_strings(tokens)), top=found[0], probabilities=found[1], texts=texts, kl=found[2],
        entropy=found[3], target=found[4], rank=found[5], target_text=named, tuned=lens is not None,
    )  # fmt: skip


def _token(model: LanguageModel, target: str | int) -> int:
    if isinstance(target, str):
        return model.token_id(target)
    if not 0 <= target < model.d_vocab:
        raise InputError(f"There is no token {target}; {model.name} has ids 0 to {model.d_vocab - 1}.")
    return target


def _read(
    model: LanguageModel,
    stream: Float[Tensor, "pos d_model"],
    expected: Float[Tensor, "pos d_vocab"],
    said: Int[Tensor, "pos"],
    top: int,
) -> tuple[Tensor, ...]:
    """Of one state: the first tokens, their probabilities, KL, entropy, and the probability and rank of a token."""
    log_p = torch.cat(list(lens_logits(model, stream))).double().log_softmax(-1)
    first, own = log_p.topk(top), log_p.gather(-1, said[:, None])
    kl = (expected.exp() * (expected - log_p)).sum(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    return first.indices, first.values.exp(), kl, entropy, own[:, 0].exp(), (log_p > own).sum(-1)
