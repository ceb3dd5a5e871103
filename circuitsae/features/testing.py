"""Testing a label: each row of its ledger measured on a model."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import pandas as pd
import torch

from circuitsae.features.ledger import Evidence, Label, RowKind, Verdict
from circuitsae.features.top_examples import BEFORE, examples, token_activations
from circuitsae.interventions import (
    Add,
    Feature,
    Features,
    Intervention,
    Metric,
    PromptLike,
    parse_target,
    run_alternatives,
)
from circuitsae.interventions.controls import matched_features
from circuitsae.interventions.prompts import Library, Recording
from circuitsae.interventions.steering import SteeringReport, steer
from circuitsae.replacement import ReplacementModel
from transcoders.errors import InputError

AGREE = 0.8
"""A row is supported from this share on, contradicted at or below the opposite one."""
CONTROLS = 20


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What a label says, in a form that can be measured. What is left out leaves its rows open."""

    fires_on: str = ""
    """A regular expression that is found where it fires: searched in the text up to and including the token, of which
    the last 13 tokens are looked at (end it with `$` to ask for the token itself)."""
    metric: Metric | None = None
    """The number, from the logits of the last position, that it raises: `logit_diff(right, wrong)`."""
    metric_name: str = "metric"
    texts: Sequence[PromptLike] = field(default_factory=tuple)
    """Texts that the label was read from."""
    held_out_texts: Sequence[PromptLike] = field(default_factory=tuple)
    prompts: Sequence[PromptLike] = field(default_factory=tuple)
    """Prompts on which it is said to matter."""
    held_out: Sequence[PromptLike] = field(default_factory=tuple)
    """Prompts for steering that nothing else was chosen on."""
    steer_on: Sequence[PromptLike] = field(default_factory=tuple)
    """Prompts on which the strength is chosen; default `prompts`. Those on which it is off leave more to steer."""
    paraphrases: Sequence[Sequence[PromptLike]] = field(default_factory=tuple)
    """For each of `prompts`, the same in other words."""


def check_label(
    model: ReplacementModel, label: Label, claim: Claim, *, command: str = "", seed: int = 0, controls: int = CONTROLS
) -> Label:
    """The label with every row that the claim allows to measure, in the real model (regime `model`).

    * `top examples`, `held-out examples`: of the (at most 50) tokens on which it is more than half as active as on its
      strongest, the share at which `fires_on` is found; beside it the share of all tokens at which it is.
    * `target ablation`: the change of the metric once the features are removed everywhere; supported if it falls on
      80 % of the prompts on which they are active, and its mean falls by more than every control's.
    * `negative control`: the same with other features that write as much; supported if their mean |change| is at most
      half of the features'.
    * `steering`: `steer` on `prompts` and `held_out`; supported by a recommended strength above zero.
    * `paraphrase stability`: the share of paraphrases on which they are active (or not) as on the prompt, and removing
      them changes the metric in the same direction.

    Raises `InputError` for features that are no features of these dictionaries.
    """
    features = [_feature(name) for name in label.features]
    said = command or f"circuitsae.features.check_label(model, {label.text!r}, seed={seed})  # {model.model.name}"
    tester = _Tester(model, features, claim, said, seed, controls)
    return label.with_rows(*tester.examples(), *tester.ablations(), *tester.steering(), *tester.paraphrases())


def _feature(name: str) -> Feature:
    target = parse_target(name)
    if not isinstance(target, Feature):
        raise InputError(f"{name!r} is no feature; labels are of features, LAYER.INDEX.")
    return Feature(target.layer, target.index)


@dataclass(frozen=True)
class _Tester:
    model: ReplacementModel
    features: list[Feature]
    claim: Claim
    command: str
    seed: int
    controls: int

    def _row(self, kind: RowKind, verdict: Verdict, measurement: dict[str, Any]) -> Evidence:
        return Evidence(kind, verdict, measurement, self.command)

    # where it fires

    def examples(self) -> list[Evidence]:
        kinds: tuple[tuple[RowKind, Sequence[PromptLike]], ...] = (
            ("top examples", self.claim.texts),
            ("held-out examples", self.claim.held_out_texts),
        )
        return [self._examples(kind, texts) for kind, texts in kinds if texts]

    def _examples(self, kind: RowKind, texts: Sequence[PromptLike]) -> Evidence:
        found = examples(self.model, self.features, texts, n=50)
        found = [example for example in found if example.activation > found[0].activation / 2]
        shown = [f"{e.before}⟦{e.token}⟧{e.after}" for e in found[:10]]
        measured: dict[str, Any] = {"tokens": len(found), "examples": shown}
        if not found or not self.claim.fires_on:
            return self._row(kind, Verdict.OPEN, measured)
        pattern, library = re.compile(self.claim.fires_on), Library(self.model)
        share = sum(bool(pattern.search(e.before + e.token)) for e in found) / len(found)
        everywhere = [bool(pattern.search(c)) for text in texts for c in self._contexts(library.tokens(text))]
        base = sum(everywhere) / len(everywhere)
        measured |= {"fires_on": self.claim.fires_on, "share": share, "share_of_all_tokens": base}
        return self._row(kind, _decide(share, above=base), measured)

    def _contexts(self, tokens: torch.Tensor) -> list[str]:
        strings = self.model.model.token_strings(tokens)
        first = self.model.first
        return ["".join(strings[max(first, pos - BEFORE) : pos + 1]) for pos in range(first, len(strings))]

    # what it does

    def ablations(self) -> list[Evidence]:
        if self.claim.metric is None or not self.claim.prompts:
            return []
        own, random = self._remove(self.claim.prompts)
        if not own:
            return [self._row("target ablation", Verdict.OPEN, {"prompts": 0, "note": "active on none of the prompts"})]
        effects, others = (torch.tensor(x, dtype=torch.float64) for x in (own, random))  # [prompt], [prompt control]
        mean, by_control = float(effects.mean()), others.mean(0)
        falls, bound = float((effects < 0).double().mean()), float(by_control.abs().max())
        measured = {"metric": self.claim.metric_name, "prompts": len(own), "mean_change": mean, "falls_on": falls,
                    "largest_control": bound}  # fmt: skip
        verdict = Verdict.OPEN
        if abs(mean) > bound:
            verdict = _decide(falls)
        control = float(others.abs().mean())
        size = float(effects.abs().mean())
        quiet = {"metric": self.claim.metric_name, "controls": self.controls, "mean_abs_change": control,
                 "mean_abs_change_of_label": size}  # fmt: skip
        calm = Verdict.SUPPORTED if control <= size / 2 else Verdict.CONTRADICTED if control >= size else Verdict.OPEN
        return [self._row("target ablation", verdict, measured), self._row("negative control", calm, quiet)]

    def _remove(self, prompts: Sequence[PromptLike], controls: bool = True) -> tuple[list[float], list[list[float]]]:
        """Change of the metric on each prompt on which they are active, and that of each control."""
        assert self.claim.metric is not None
        library, draw = Library(self.model), torch.Generator().manual_seed(self.seed)
        own, random = [], []
        for prompt in prompts:
            recording = library[prompt]
            index = self._active(recording)
            if not len(index):
                continue
            amount = -recording.activations(index)
            changes = [(index, amount)]
            for _ in range(self.controls if controls else 0):
                changes.append(self._control(index, amount, draw))
            rows = [(recording, [Intervention(Features(i), Add(a))]) for i, a in changes]
            chunks = run_alternatives(self.model, rows, "model", library=library)
            after = torch.cat([self.claim.metric(chunk.logits[:, -1]) for chunk in chunks])
            change = (after - self.claim.metric(recording.trace.logits[-1])).tolist()
            own.append(change[0])
            random.append(change[1:])
        return own, random

    def _active(self, recording: Recording) -> torch.Tensor:
        wanted = {(feature.layer, feature.index) for feature in self.features}
        index = recording.trace.features.index
        keep = [(layer, feature) in wanted for layer, _, feature in index.tolist()]
        return index[torch.tensor(keep, dtype=torch.bool, device=index.device)] if len(index) else index

    def _control(
        self, index: torch.Tensor, amount: torch.Tensor, draw: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Other features in the places of these: the same one wherever the same one was."""
        pairs, which = index[:, [0, 2]].unique(dim=0, return_inverse=True)
        total = torch.zeros(len(pairs), dtype=amount.dtype).index_add_(0, which, amount)
        drawn, scaled = matched_features(self.model, pairs, total, draw)
        changed = index.clone()
        changed[:, 2] = drawn[which, 1]
        return changed, amount * (scaled / total)[which]

    def steering(self) -> list[Evidence]:
        claim = self.claim
        prompts = claim.steer_on or claim.prompts
        if claim.metric is None or not (prompts and claim.held_out and claim.texts):
            return []
        report = steer(
            self.model, self.features, metric=claim.metric, metric_name=claim.metric_name, prompts=prompts,
            held_out=claim.held_out, unrelated_text=claim.held_out_texts or claim.texts, seed=self.seed,
            controls=min(self.controls, 5),
        )  # fmt: skip
        return [steering_row(report, self.command)]

    def paraphrases(self) -> list[Evidence]:
        pairs = [(p, q) for p, others in zip(self.claim.prompts, self.claim.paraphrases, strict=False) for q in others]
        if not pairs:
            return []
        same = [self._alike(prompt, other) for prompt, other in pairs]
        share = sum(same) / len(same)
        measured = {"paraphrases": len(same), "share_alike": share, "metric": self.claim.metric_name}
        return [self._row("paraphrase stability", _decide(share), measured)]

    def _alike(self, prompt: PromptLike, other: PromptLike) -> bool:
        """Active on both or neither, and with a metric, the same sign of what removing does."""
        on = [bool(row.max() > 0) for row in token_activations(self.model, self.features, [prompt, other])]
        if on[0] != on[1] or not on[0] or self.claim.metric is None:
            return on[0] == on[1]
        (a,), (b,) = (self._remove([p], controls=False)[0] for p in (prompt, other))
        return (a < 0) == (b < 0)


def steering_row(report: SteeringReport, command: str = "") -> Evidence:
    """The ledger's row of a steering report: supported by a recommended strength on the label's side.

    Contradicted where pushing the features up moves the metric the other way on held-out prompts, by more than every
    control and without breaking the model.
    """
    best = report.recommended
    table = cast(pd.DataFrame, report.table[(report.table.broken == "") & (report.table.strength > 0)])
    sign = 1 if report.want == "up" else -1
    other_way = (sign * table.held_out_effect < -table.held_out_control) & (sign * table.effect < -table.control)
    against = table.strength[other_way].tolist()
    measured: dict[str, Any] = {"metric": report.metric, "recommended": best, "reason": report.reason}
    if best is not None and best > 0:
        row = report.table[report.table.strength == best].iloc[0]
        names = ("effect", "held_out_effect", "held_out_control", "kl", "loss_rise")
        measured |= {name: float(row[name]) for name in names}
        return Evidence("steering", Verdict.SUPPORTED, measured, command or report.command)
    measured |= {"strengths_that_move_it_the_other_way": against}
    verdict = Verdict.CONTRADICTED if against else Verdict.OPEN
    return Evidence("steering", verdict, measured, command or report.command)


def _decide(share: float, above: float = 0.0) -> Verdict:
    """Supported from `AGREE` on, if that is far above chance; contradicted at `1 − AGREE`, or at chance.

    Open where chance alone reaches `AGREE`: then the claim says nothing.
    """
    if above >= AGREE:
        return Verdict.OPEN
    if share >= AGREE and share >= min(2 * above, (1 + above) / 2):
        return Verdict.SUPPORTED
    return Verdict.CONTRADICTED if share <= max(1 - AGREE, above) else Verdict.OPEN
