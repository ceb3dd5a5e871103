"""What came of interventions: logits, reads and activations before and after."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from circuitsae.interventions.changes import Contribution, Intervention
from circuitsae.interventions.forward import Regime
from circuitsae.interventions.prompts import Recording
from circuitsae.replacement import ReplacementModel
from transcoders._lazy import public
from transcoders.errors import InputError
from transcoders.token_text import join_tokens

Metric = Callable[[Float[Tensor, "*batch d_vocab"]], Float[Tensor, "*batch"]]
"""A number from the logits of a position."""


@dataclass(frozen=True, eq=False)
class BatchReads:
    """What the dictionaries and the unembedding read."""

    by_layer: Float[Tensor, "*batch layer pos d_model"]
    final: Float[Tensor, "*batch pos d_model"]


def logit(token: int) -> Metric:
    """The logit of a token."""
    return lambda logits: logits[..., token]


def logit_diff(right: int, wrong: int) -> Metric:
    """logit(right) − logit(wrong)."""
    return lambda logits: logits[..., right] - logits[..., wrong]


def probability(token: int) -> Metric:
    """The probability of a token."""
    return lambda logits: logits.softmax(-1)[..., token]


@dataclass(frozen=True, eq=False)
class Outcome:
    """Prompts × alternatives, each beside its prompt's clean run.

    Effects are `metric(after) − metric(before)`, of the last position whose logits were kept.
    """

    model: ReplacementModel
    prompts: tuple[Recording, ...]
    alternatives: tuple[tuple[Intervention | Contribution, ...], ...]
    regime: Regime
    clean: Float[Tensor, "prompt at d_vocab"]
    changed: Float[Tensor, "prompt alternative at d_vocab"]
    clean_reads: BatchReads
    changed_reads: BatchReads | None
    audit: pd.DataFrame | None = None
    """How far what the regime holds moved: `prompt`, `alternative`, `kind`, `layer`, `moved`."""

    # numbers

    def before(self, metric: Metric) -> Float[Tensor, "prompt"]:
        """The metric of the clean run."""
        return metric(self.clean[:, -1])

    def after(self, metric: Metric) -> Float[Tensor, "prompt alternative"]:
        return metric(self.changed[:, :, -1])

    def effect(self, metric: Metric) -> Float[Tensor, "prompt alternative"]:
        """metric(after) − metric(before)."""
        return self.after(metric) - self.before(metric)[:, None]

    def kl(self) -> Float[Tensor, "prompt alternative at"]:
        """KL(clean ‖ changed) in nats, at each position whose logits were kept."""
        before = self.clean[:, None].log_softmax(-1)
        return (before.exp() * (before - self.changed.log_softmax(-1))).sum(-1)

    def features(self, layer: int) -> Float[Tensor, "prompt alternative pos feature"]:
        """All activations of a layer, as the dictionary reads the changed stream (0 where there are no features).

        What is read, not what was set: a feature that was put in by hand shows only if the stream makes it active.
        """
        return self._encode(layer, self._reads().by_layer)

    def activation(
        self, layer: int, index: int
    ) -> tuple[Float[Tensor, "prompt pos"], Float[Tensor, "prompt alternative pos"]]:
        """One feature's activations in the clean runs and in the changed ones."""
        return self._encode(layer, self.clean_reads.by_layer)[..., index], self.features(layer)[..., index]

    @torch.no_grad()
    def _encode(self, layer: int, read: Float[Tensor, "*batch layer pos d_model"]) -> Tensor:
        active = self.model.dictionaries.activations(layer, read[..., layer, :, :])
        exact = torch.stack([prompt.trace.exact for prompt in self.prompts])
        exact = exact.reshape(len(exact), *[1] * (active.ndim - 3), -1, 1)
        return active.masked_fill_(exact, 0)

    def _reads(self) -> BatchReads:
        if self.changed_reads is None:
            raise InputError("This outcome kept no reads; call intervene(..., reads=True).")
        return self.changed_reads

    # tables

    def top(self, n: int = 10) -> pd.DataFrame:
        """The most probable tokens before or after: `prompt`, `alternative`, `token`, `text`, probability, logit, rank.

        Every token that is among the `n` most probable ones of either run, the most probable after the change first.
        """
        frames = [
            self._top(prompt, alternative, n)
            for prompt in range(len(self.prompts))
            for alternative in range(len(self.alternatives))
        ]
        return pd.concat(frames, ignore_index=True)

    def _top(self, prompt: int, alternative: int, n: int) -> pd.DataFrame:
        runs = {"before": self.clean[prompt, -1], "after": self.changed[prompt, alternative, -1]}
        chosen: dict[int, None] = {}
        for run in ("after", "before"):
            chosen |= dict.fromkeys(runs[run].topk(min(n, runs[run].shape[-1])).indices.tolist())
        tokens = torch.tensor(list(chosen), device=self.clean.device)
        table: dict[str, Any] = {"prompt": prompt, "alternative": alternative, "token": list(chosen)}
        table["text"] = self.model.model.token_strings(tokens)
        for run, logits in runs.items():
            table[f"probability_{run}"] = logits.softmax(-1)[tokens].tolist()
        for run, logits in runs.items():
            table[f"logit_{run}"] = logits[tokens].tolist()
        for run, logits in runs.items():
            table[f"rank_{run}"] = (logits[None] > logits[tokens][:, None]).sum(1).tolist()
        return pd.DataFrame(table).sort_values("probability_after", ascending=False, kind="stable")

    def _repr_html_(self) -> str:
        return public("circuitsae.report.outcome_html")(self.to_json(n=5))

    def to_json(self, n: int = 10) -> dict[str, Any]:
        """Prompts, interventions, regime, top tokens and KL as JSON values."""
        return {
            "model": self.model.model.name,
            "regime": {k: sorted(v) if isinstance(v, frozenset) else v for k, v in asdict(self.regime).items()},
            "prompts": [join_tokens(p.trace.token_strings) for p in self.prompts],
            "alternatives": [[said(it) for it in alternative] for alternative in self.alternatives],
            "kl": self.kl()[..., -1].tolist(),
            "top": self.top(n).to_dict("records"),
            "audit": None if self.audit is None else self.audit.to_dict("records"),
        }


def said(it: Intervention | Contribution) -> str:
    """A change in words."""
    return str(it) if isinstance(it, Intervention) else "vectors added to the stream"
