"""`patch_sweep`: a state of one run put into another, layer by layer and place by place; and what such sweeps found."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from circuitsae.components.problem import PatchingProblem, problems_of
from circuitsae.lenses.replacing import BATCH_TOKENS, Cell, StateKind, check_kind, replaced, run_of, windows_of
from circuitsae.report.heat_map import heat_map
from circuitsae.report.text import visible
from circuitsae.tasks.task import Task
from transcoders.errors import InputError
from transcoders.language_model import LanguageModel

if TYPE_CHECKING:
    import plotly.graph_objects as go

Direction = Literal["denoise", "noise"]
"""`denoise`: the clean run's state into the corrupt run. `noise`: the corrupt run's into the clean one."""
NAMES: dict[str, str] = {
    "resid_post": "stream after the block",
    "mlp_out": "MLP output",
    "attn_out": "attention output",
}
_RESAMPLES = 1000


@dataclass(frozen=True)
class Sweep:
    """What each cell's replacement does: metric with the state replaced − metric of the run it is put into.

    Of `example` runs: the pairs of a task, or the noise seeds of a causal trace.
    """

    effects: Float[np.ndarray, "layer column example"]
    base: Float[np.ndarray, "example"]
    """The metric of the run that states are put into."""
    source: Float[np.ndarray, "example"]
    """The metric of the run that they are taken from."""
    windows: tuple[range, ...]
    """[layer], those whose states are replaced together."""
    columns: tuple[str, ...]
    kind: StateKind
    metric: str
    direction: str
    """What was put into what."""

    @property
    def total(self) -> float:
        """Mean metric of the source − that of the base: what replacing everything does."""
        return float((self.source - self.base).mean())

    @property
    def mean(self) -> Float[np.ndarray, "layer column"]:
        """Mean effect over the examples."""
        return self.effects.mean(-1)

    def interval(self, level: float = 0.95, *, seed: int = 0) -> Float[np.ndarray, "2 layer column"]:
        """Lower and upper end of the mean's interval, from resampled examples; NaN of a single one."""
        n = self.effects.shape[-1]
        if n < 2:
            return np.full((2, *self.mean.shape), np.nan)
        counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), _RESAMPLES) / n
        return np.quantile(self.effects @ counts.T, [(1 - level) / 2, (1 + level) / 2], axis=-1)

    def frame(self) -> pd.DataFrame:
        """A row per cell: `layer`, `first`, `last` (of its window), `column`, `effect`, `low`, `high`, `share`.

        `share` is the effect over `total`: 1 where the cell alone carries all the difference, NaN where there is none.
        """
        (low, high), mean = self.interval(), self.mean
        total = self.total or np.nan
        return pd.DataFrame(
            {
                "layer": layer, "first": window[0], "last": window[-1], "column": column,
                "effect": mean[layer, i], "low": low[layer, i], "high": high[layer, i], "share": mean[layer, i] / total,
            }
            for layer, window in enumerate(self.windows)
            for i, column in enumerate(self.columns)
        )  # fmt: skip

    def figure(self) -> "go.Figure":
        """Layer × column, coloured by the mean effect."""
        (low, high), mean = self.interval(), self.mean
        hover = [
            [f"{mean[at, i]:+.4f} [{low[at, i]:+.4f}, {high[at, i]:+.4f}]" for i in range(len(self.columns))]
            for at in range(len(self.windows))
        ]
        wide = max(map(len, self.windows))
        name = NAMES[self.kind] + (f", {wide} layers at a time" if wide > 1 else "")
        return heat_map(
            mean,
            [f"layer {layer}" for layer in range(len(self.windows))],
            self.columns,
            title=f"{name}, {self.direction}",
            unit=f"Δ {self.metric}",
            hover=hover,
        )


def patch_sweep(
    model: LanguageModel,
    task: Task | PatchingProblem | Sequence[PatchingProblem],
    *,
    kind: StateKind = "resid_post",
    direction: Direction = "denoise",
    window: int = 1,
    roles: Sequence[str] = (),
    metric: str | None = None,
    batch_tokens: int = BATCH_TOKENS,
) -> Sweep:
    """Activation patching (Heimersheim & Nanda 2024, arXiv:2404.15255) over layer × position, or layer × role.

    `m(base with h_{l,P} ← source's h_{l,P}) − m(base)` for the state h of `kind` in every `window` of layers and every
    set P of positions: each position of the prompts by itself, or those of `roles` (and all others, "other").
    Problems bring their own sets (`spans`) and their own metric.

    Raises `InputError` for prompts of several lengths without roles, and for problems without corrupt prompts.
    """
    check_kind(kind, window, model.n_layers)
    if direction not in ("denoise", "noise"):
        raise InputError(f"direction={direction!r} is none; give 'denoise' (clean into corrupt) or 'noise'.")
    problems = _problems(model, task, roles, metric)
    columns = _columns(problems)
    parts = [part for problem in problems for part in problem.chunks(max(1, batch_tokens // problem.n_pos))]
    found = [_swept(part, kind, direction, window, batch_tokens) for part in parts]
    effects, base, source = (np.concatenate(side, axis=-1) for side in zip(*found, strict=True))
    named = metric or (task.metric if isinstance(task, Task) else "metric")
    put = "clean into corrupt" if direction == "denoise" else "corrupt into clean"
    return Sweep(effects, base, source, tuple(windows_of(model.n_layers, window)), columns, kind, named, put)


def _problems(
    model: LanguageModel,
    task: Task | PatchingProblem | Sequence[PatchingProblem],
    roles: Sequence[str],
    metric: str | None,
) -> list[PatchingProblem]:
    if isinstance(task, Task):
        found = problems_of(model, task, metric=metric, roles=roles)
    elif roles or metric is not None:
        raise InputError("`roles` and `metric` are for a task; problems have spans and a metric of their own.")
    else:
        found = [task] if isinstance(task, PatchingProblem) else list(task)
    if not found:
        raise InputError("There is no problem to patch; give at least one.")
    if len(lengths := sorted({problem.n_pos for problem in found})) > 1 and found[0].spans is None:
        raise InputError(
            f"The prompts have {', '.join(map(str, lengths))} tokens, so that positions are not comparable; name "
            "roles of the task (--role) or take prompts of one length."
        )
    return [problem if problem.spans is not None else problem.each_position() for problem in found]


def _columns(problems: Sequence[PatchingProblem]) -> tuple[str, ...]:
    """Names of the sets of positions; of single positions with their token, where all prompts have the same one."""
    first = problems[0]
    if first.span_names != tuple(str(pos) for pos in range(first.n_pos)):
        return first.span_names
    rows = torch.cat([problem.clean for problem in problems] + [p.corrupt for p in problems if p.corrupt is not None])
    same = (rows == rows[0]).all(0).tolist()
    texts = first.model.token_strings(rows[0])
    return tuple(f"{pos} {visible(text)}" if same[pos] else str(pos) for pos, text in enumerate(texts))


@torch.no_grad()
def _swept(
    problem: PatchingProblem, kind: StateKind, direction: Direction, window: int, batch_tokens: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Effects `[layer, column, example]` of one problem, and the metrics of base and source."""
    model, corrupt = problem.model, problem.corrupt
    if corrupt is None:
        raise InputError("A sweep puts one run into another; give the problem corrupt prompts.")
    rows = (corrupt, problem.clean) if direction == "denoise" else (problem.clean, corrupt)
    base, source = (run_of(model, side, kind) for side in rows)
    before, target = (_metric(problem, run.final[None])[0] for run in (base, source))
    spans, windows = problem.spans, windows_of(model.n_layers, window)
    assert spans is not None
    cells = [Cell(layers, span) for layers in windows for span in spans]
    runs = replaced(model, kind, base, source, cells, batch_tokens)
    values = torch.cat([_metric(problem, final) for final in runs]) - before
    shaped = values.unflatten(0, (len(windows), len(spans)))
    return tuple(side.double().cpu().numpy() for side in (shaped, before, target))  # pyright: ignore


def _metric(problem: PatchingProblem, final: Float[Tensor, "cell example pos _"]) -> Float[Tensor, "cell example"]:
    """The problem's metric of several runs, from what the unembedding reads in them."""
    if problem.read is not None:
        final = final[:, torch.arange(len(problem), device=final.device), problem.read][:, :, None]
    logits = problem.model.logits_of(final.flatten(0, 2)).unflatten(0, final.shape[:3])
    return torch.stack([problem.metric(each) for each in logits])
