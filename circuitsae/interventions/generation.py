"""Writing on with interventions active, by the side of the clean model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuitsae.interventions.changes import Contribution, Intervention
from circuitsae.interventions.forward import REGIMES, Forward
from circuitsae.interventions.hooks import On, Tables, Window, compile_edits
from circuitsae.interventions.intervene import alternatives_of
from circuitsae.interventions.outcome import said
from circuitsae.interventions.prompts import Library, PromptLike
from circuitsae.replacement import ReplacementModel
from transcoders._lazy import public
from transcoders.errors import InputError, PromptError
from transcoders.token_text import join_tokens


@dataclass(frozen=True, eq=False)
class Generation:
    """Continuations of one prompt; row 0 is the clean model's."""

    alternatives: tuple[tuple[Intervention | Contribution, ...], ...]
    n_prompt: int
    tokens: Int[Tensor, "row pos"]
    texts: tuple[str, ...]
    """What was written after the prompt."""
    logits: Float[Tensor, "row n d_vocab"]
    """From which each new token was chosen."""

    def frame(self) -> pd.DataFrame:
        """One row per continuation: `alternative` (−1 for the clean model), `interventions`, `text`."""
        words = ["", *("; ".join(map(said, alternative)) for alternative in self.alternatives)]
        return pd.DataFrame({"alternative": range(-1, len(words) - 1), "interventions": words, "text": self.texts})

    def _repr_html_(self) -> str:
        return public("circuitsae.report.continuations_html")(self.frame().to_dict("records"))

    def to_json(self) -> dict[str, Any]:
        """Tokens and texts as JSON values."""
        return {"n_prompt": self.n_prompt, "tokens": self.tokens.tolist(), "rows": self.frame().to_dict("records")}


@torch.no_grad()
def generate(
    model: ReplacementModel,
    prompt: PromptLike,
    alternatives: Sequence[Intervention | Contribution] | Sequence[Sequence[Intervention | Contribution]],
    *,
    n: int = 20,
    on: On = "all",
    cache: bool = True,
    temperature: float = 0.0,
    seed: int = 0,
) -> Generation:
    """Write `n` tokens on, in the clean model and with each alternative, all in one batch, in the model regime.

    Interventions on every position act where `on` says: on the prompt's positions, on new ones, or on both; those with
    positions of their own act there. `temperature` 0 takes the most probable token; otherwise every row draws with the
    same random numbers. With `cache` keys and values are kept and only the newest position is computed; the numbers
    are those of the run without, up to rounding. Raises `PromptError` where the context is too short.
    """
    chosen = alternatives_of(alternatives)
    if n < 1 or temperature < 0:
        raise InputError(f"n={n}, temperature={temperature}: write at least one token, at a temperature from 0 on.")
    if on not in ("all", "prompt", "new"):
        raise InputError(f"on={on!r} is no place to act; give 'all', 'prompt' or 'new'.")
    library = Library(model)
    recording = library[prompt]
    if len(recording) + n > model.model.context:
        raise PromptError(
            f"A prompt of {len(recording)} tokens and {n} new ones are more than the {model.model.context} that "
            f"{model.model.name} reads; write fewer."
        )
    rows = [(), *chosen]
    tokens = recording.trace.tokens.expand(len(rows), -1)
    past = model.model.new_cache() if cache else None
    draw = torch.Generator().manual_seed(seed)
    start, logits = 0, []
    for _ in range(n):
        window = Window(start, tokens.shape[1], growing=True, on=on)
        edits = [compile_edits(alternative, recording, library, window) for alternative in rows]
        forward = Forward(model, [recording] * len(rows), Tables.of(edits), REGIMES["model"])
        out, _ = model.model.run_hooked(tokens[:, start:], write=forward.hooks(), past=past)
        logits.append(out[:, -1])
        start = tokens.shape[1] if cache else 0
        tokens = torch.cat([tokens, _next(logits[-1], temperature, draw)], dim=1)
    new = tokens[:, len(recording) :]
    texts = tuple(join_tokens(model.model.token_strings(row)) for row in new)
    return Generation(tuple(tuple(a) for a in chosen), len(recording), tokens, texts, torch.stack(logits, dim=1))


def _next(logits: Float[Tensor, "row d_vocab"], temperature: float, draw: torch.Generator) -> Int[Tensor, "row 1"]:
    """The next token of every row; Gumbel noise, the same for all rows, makes a draw from the softmax."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    uniform = torch.rand(logits.shape[-1], generator=draw, dtype=torch.float64).clamp(min=1e-300)
    return (logits / temperature - (-uniform.log()).log().to(logits)).argmax(-1, keepdim=True)
