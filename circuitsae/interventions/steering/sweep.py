"""A sweep of strengths: the metric, held-out prompts, unrelated text, controls, and continuations."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuitsae.interventions.changes import Intervention
from circuitsae.interventions.generation import generate
from circuitsae.interventions.intervene import Chunk, run_alternatives
from circuitsae.interventions.outcome import Metric
from circuitsae.interventions.prompts import Library, Prompt, PromptLike, Recording
from circuitsae.interventions.steering.directions import Direction, Push, SteeringDirection, steering_direction
from circuitsae.interventions.steering.report import Limits, SteeringReport, tabulate
from circuitsae.interventions.targets import Feature
from circuitsae.replacement import ReplacementModel
from transcoders.errors import InputError, PromptError
from transcoders.progress import progress_bar
from transcoders.token_text import join_tokens

STRENGTHS = (-4.0, -2.0, -1.0, -0.5, 0.5, 1.0, 2.0, 4.0)


@torch.no_grad()
def steer(
    model: ReplacementModel,
    what: Feature | Sequence[Feature] | Direction,
    *,
    metric: Metric,
    prompts: Sequence[PromptLike],
    held_out: Sequence[PromptLike] = (),
    unrelated_text: Sequence[PromptLike] = (),
    strengths: Sequence[float] = STRENGTHS,
    units: Sequence[float] | None = None,
    push: Push = "add",
    want: Literal["up", "down"] = "up",
    metric_name: str = "metric",
    controls: int = 5,
    limits: Limits = Limits(),
    generate_on: Sequence[PromptLike] | None = None,
    n_generate: int = 20,
    seed: int = 0,
    command: str = "",
    memory: int | None = None,
    progress: bool = False,
) -> SteeringReport:
    """Push features or a direction with every strength, in the real model, and measure what follows.

    `what`: a feature, several of them (a supernode, each with its `at`), or a `Direction`, such as
    `difference_of_prompts`. A strength s adds s·unit to a feature's activation (`push="set"`: sets it to s·unit;
    `"scale"`: multiplies it by s); the unit is the largest activation on `prompts` and `unrelated_text`, unless given.
    A direction is added s times.

    Measured for every strength, and for `controls` stand-ins of the same written norm (other features of the same
    layers that fire on the texts; Gaussian vectors for a direction): the metric at the last position of `prompts`
    and of `held_out`, its change; mean KL(clean ‖ steered) and change of loss per token on `unrelated_text`, where the
    direction acts at every position; continuations of `generate_on` (default: the first two of `held_out`, or else of
    `prompts`) before and after. What is not given is not measured. `limits` says when a strength breaks the model.

    The recommended strength is the one with the largest effect on `prompts`, in the direction that is wanted, among
    those that do not break the model and exceed every control; it is only recommended if its effect on `held_out`
    has the same sign and exceeds every control there too, where there are held-out prompts. Raises `InputError` for
    missing prompts or strengths.
    """
    sets = {"prompts": list(prompts), "held_out": list(held_out), "unrelated": list(unrelated_text)}
    if not prompts:
        raise InputError("There are no prompts to steer on; give at least one.")
    if not strengths or controls < 1 or want not in ("up", "down"):
        raise InputError(f"strengths={strengths!r}, controls={controls}, want={want!r}: give at least one of both, "
                         "and 'up' or 'down'.")  # fmt: skip
    library = Library(model)
    recordings = {name: [library[prompt] for prompt in members] for name, members in sets.items()}
    texts = recordings["prompts"] + recordings["unrelated"]
    direction = steering_direction(what, units, push, _largest(model, texts))
    direction.everywhere()  # refused before anything is run
    draw = torch.Generator().manual_seed(seed)
    firing = [row > 0 for row in _largest(model, texts)]
    directions = [direction, *(direction.control(model, draw, firing) for _ in range(controls))]
    starts = (
        (recordings["held_out"] or recordings["prompts"])[:2]
        if generate_on is None
        else [library[prompt] for prompt in generate_on]
    )
    given = [name for name in ("prompts", "held_out") if recordings[name]]
    with progress_bar(shown=progress) as bar:
        task = bar.add_task("steering", total=sum(map(len, sets.values())) * len(directions) * len(strengths))
        job = _Job(
            model, library, metric, tuple(float(s) for s in strengths), directions, memory,
            lambda runs: bar.advance(task, runs),
        )  # fmt: skip
        effects = pd.concat([job.effects(name, recordings[name]) for name in given], ignore_index=True)
        side, clean_loss = job.side_effects(recordings["unrelated"])
        bar.reset(task, description="continuing texts", total=len(starts))
        written = job.continuations(starts, n_generate)
    table = tabulate(effects, side, written, clean_loss=clean_loss, limits=limits)
    return SteeringReport(
        model=model.model.name,
        direction=direction.name,
        push=direction.push,
        units=direction.units,
        metric=metric_name,
        want=want,
        clean_loss=clean_loss,
        limits=limits,
        table=table,
        effects=effects,
        generations=written.drop(columns="tokens"),
        n={"prompts": len(prompts), "held_out": len(held_out), "unrelated": len(unrelated_text), "controls": controls},
        command=command,
    )


def _largest(model: ReplacementModel, recordings: Sequence[Recording]) -> list[Float[Tensor, "_"]]:
    """The largest activation of every feature, by layer."""
    dictionaries = model.dictionaries
    found = [
        torch.zeros(dictionaries.n_features(layer), dtype=model.model.dtype, device=model.model.device)
        for layer in range(model.model.n_layers)
    ]
    for recording in recordings:
        index, value = recording.trace.features
        for layer, row in enumerate(found):
            here = index[:, 0] == layer
            row.scatter_reduce_(0, index[here, 2], value[here], "amax")
    return found


@dataclass(frozen=True, eq=False)
class _Job:
    model: ReplacementModel
    library: Library
    metric: Metric
    strengths: tuple[float, ...]
    directions: list[SteeringDirection]
    """The direction, then its controls."""
    memory: int | None
    advance: Callable[[int], Any]

    def effects(self, name: str, prompts: Sequence[Recording]) -> pd.DataFrame:
        """`set`, `prompt`, `control` (−1: the direction itself), `strength`, `before`, `after`, `effect`."""
        rows = []
        for members in _by_length(prompts).values():
            todo = [(i, c, s) for i in members for c in range(len(self.directions)) for s in self.strengths]
            runs = [(prompts[i], self.directions[c].at(s)) for i, c, s in todo]
            after = torch.cat([self.metric(chunk.logits[:, -1]) for chunk in self._run(runs)]).tolist()
            before = {i: float(self.metric(prompts[i].trace.logits[-1])) for i in members}
            rows += [(name, i, c - 1, s, before[i], x) for (i, c, s), x in zip(todo, after, strict=True)]
        frame = pd.DataFrame(rows, columns=["set", "prompt", "control", "strength", "before", "after"])
        return frame.assign(effect=frame.after - frame.before)

    def side_effects(self, texts: Sequence[Recording]) -> tuple[pd.DataFrame, float]:
        """`control`, `strength`, `kl`, `loss_rise` per token of the texts, and the clean model's loss."""
        columns = ["control", "strength", "kl", "loss_rise"]
        if not texts:
            return pd.DataFrame(columns=columns), math.nan
        totals: dict[tuple[int, float], list[float]] = defaultdict(lambda: [0.0, 0.0])
        clean = {i: _losses(text.trace.logits[None], text.trace.tokens) for i, text in enumerate(texts)}
        scored = sum(loss.shape[1] for loss in clean.values())
        if not scored:
            raise PromptError("The unrelated text has no second token to predict; give longer text.")
        directions = [direction.everywhere() for direction in self.directions]
        for members in _by_length(texts).values():
            todo = [(i, c, s) for i in members for c in range(len(directions)) for s in self.strengths]
            for chunk in self._run([(texts[i], directions[c].at(s)) for i, c, s in todo]):
                for (i, c, s), logits in zip(todo[chunk.start : chunk.stop], chunk.logits, strict=True):
                    total = totals[c - 1, s]
                    total[0] += float(_kl(texts[i].trace.logits, logits)[:-1].sum())
                    total[1] += float((_losses(logits[None], texts[i].trace.tokens) - clean[i]).sum())
        rows = [(c, s, kl / scored, rise / scored) for (c, s), (kl, rise) in totals.items()]
        loss = sum(float(x.sum()) for x in clean.values()) / scored
        return pd.DataFrame(rows, columns=columns), loss

    def continuations(self, prompts: Sequence[Recording], n: int) -> pd.DataFrame:
        """`prompt`, `strength` (NaN: the clean model), `text`, `tokens`."""
        rows = []
        for recording in prompts:
            prompt = Prompt(recording.trace, recording.roles, recording.template)
            alternatives = [self.directions[0].at(s) for s in self.strengths]
            made = generate(self.model, prompt, alternatives, n=n)
            start = join_tokens(recording.trace.token_strings[int(recording.trace.starts_with_bos) :])
            new = made.tokens[:, made.n_prompt :].tolist()
            rows += [(start, s, text, row) for s, text, row in
                     zip((float("nan"), *self.strengths), made.texts, new, strict=True)]  # fmt: skip
            self.advance(1)
        return pd.DataFrame(rows, columns=["prompt", "strength", "text", "tokens"])

    def _run(self, runs: Sequence[tuple[Recording, list[Intervention]]]) -> Iterator[Chunk]:
        for chunk in run_alternatives(self.model, runs, "model", memory=self.memory, library=self.library):
            yield chunk
            self.advance(chunk.stop - chunk.start)


def _by_length(prompts: Sequence[Recording]) -> dict[int, list[int]]:
    groups: dict[int, list[int]] = defaultdict(list)
    for number, prompt in enumerate(prompts):
        groups[len(prompt)].append(number)
    return groups


def _losses(logits: Float[Tensor, "batch pos d_vocab"], tokens: Int[Tensor, "pos"]) -> Float[Tensor, "batch _"]:
    """Loss of each next token."""
    log_p = logits[:, :-1].log_softmax(-1)
    return -log_p.gather(-1, tokens[1:].expand(len(logits), -1)[..., None])[..., 0]


def _kl(clean: Float[Tensor, "pos d_vocab"], changed: Float[Tensor, "pos d_vocab"]) -> Float[Tensor, "pos"]:
    before = clean.log_softmax(-1)
    return (before.exp() * (before - changed.log_softmax(-1))).sum(-1)
