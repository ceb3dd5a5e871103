"""Metrics per example: logits [... example pos vocab] → [... example], in any number of alternatives before `example`.

All read the last position, but the losses over the two copies of an induction prompt. Higher is more of the behaviour,
but for `kl` and the losses. All but `accuracy` and `top1` have gradients.
"""

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuitsae.tasks.base import ABSENT, PatchPair
from transcoders.errors import InputError

MetricName = Literal[
    "logit_diff",
    "prob_diff",
    "log_prob",
    "sharpness",
    "accuracy",
    "top1",
    "kl",
    "first_copy_loss",
    "second_copy_loss",
]
METRICS: tuple[str, ...] = get_args(MetricName)
COPY = "copy"
"""The role of the first token of an induction prompt's second copy."""


@dataclass(frozen=True, eq=False)
class TaskMetric:
    """A metric of some examples, as a function of their logits."""

    name: str
    pair: PatchPair
    reference: Float[Tensor, "example vocab"] | None = None

    def __call__(
        self, logits: Float[Tensor, "*alternative example pos vocab"]
    ) -> Float[Tensor, "*alternative example"]:
        if self.reference is not None:
            return kl(logits, self.reference)
        return _METRICS[self.name](logits, self.pair)

    def take(self, index: Int[Tensor, "taken"]) -> "TaskMetric":
        """The metric of the examples at `index` alone."""
        reference = None if self.reference is None else self.reference[index]
        return TaskMetric(self.name, self.pair.take(index), reference)


def metric(name: str, pair: PatchPair, *, reference: Tensor | None = None) -> TaskMetric:
    """The metric `name` of the examples of `pair`.

    `reference` is for `kl` alone: the logits it compares with, [example pos vocab] or [example vocab].
    Raises `InputError` for an unknown name, and for one the examples do not carry what it takes.
    """
    if name == "kl":
        if reference is None:
            raise InputError("The metric 'kl' compares with other logits; give reference=, those of the clean run.")
        return TaskMetric(name, pair, reference[:, -1] if reference.ndim == 3 else reference)
    if name not in _METRICS:
        near = get_close_matches(name, METRICS, 1)
        raise InputError(
            f"There is no metric {name!r}; "
            + (f"did you mean {near[0]!r}?" if near else f"the metrics are: {', '.join(METRICS)}.")
        )
    _need(bool((pair.answers != ABSENT).any(-1).all()), name, "answers")
    if name in ("first_copy_loss", "second_copy_loss"):
        copies = pair.roles.get(COPY)
        there = copies is not None and bool((copies != ABSENT).all())
        _need(there, name, f"a role {COPY!r}, where the second copy begins,")
    if name in ("logit_diff", "prob_diff", "accuracy"):
        _need(bool((pair.wrong != ABSENT).any(-1).all()), name, "wrong answers")
    if name == "sharpness":
        _need(bool((pair.boundary != ABSENT).all()), name, "a boundary (the answers above and below the threshold)")
    return TaskMetric(name, pair)


def _need(there: bool, name: str, what: str) -> None:
    if not there:
        raise InputError(f"The metric {name!r} takes {what} in every example, and some have none.")


def logit_diff(
    logits: Float[Tensor, "*alternative example pos vocab"], pair: PatchPair
) -> Float[Tensor, "*alternative example"]:
    """Mean logit of the answers minus that of the wrong ones: logit(IO) − logit(S) in IOI (Wang et al. 2022, §2.1)."""
    end = logits[..., -1, :]
    return _mean(*_pick(end, pair.answers)) - _mean(*_pick(end, pair.wrong))


def prob_diff(
    logits: Float[Tensor, "*alternative example pos vocab"], pair: PatchPair
) -> Float[Tensor, "*alternative example"]:
    """Σ p(answers) − Σ p(wrong): Σ_{y>YY} p − Σ_{y≤YY} p in greater-than (Hanna et al. 2023, §2.1)."""
    end = logits[..., -1, :].softmax(-1)
    return _sum(*_pick(end, pair.answers)) - _sum(*_pick(end, pair.wrong))


def log_prob(
    logits: Float[Tensor, "*alternative example pos vocab"], pair: PatchPair
) -> Float[Tensor, "*alternative example"]:
    """log Σ p(answers), in nats."""
    picked, there = _pick(logits[..., -1, :].log_softmax(-1), pair.answers)
    return picked.masked_fill(~there, -torch.inf).logsumexp(-1)


def sharpness(
    logits: Float[Tensor, "*alternative example pos vocab"], pair: PatchPair
) -> Float[Tensor, "*alternative example"]:
    """p just above the threshold minus p just below it: p(YY+1) − p(YY−1) (Hanna et al. 2023, §2.1)."""
    picked, _ = _pick(logits[..., -1, :].softmax(-1), pair.boundary)
    return picked[..., 0] - picked[..., 1]


def accuracy(
    logits: Float[Tensor, "*alternative example pos vocab"], pair: PatchPair
) -> Float[Tensor, "*alternative example"]:
    """1 where the best answer outranks every wrong one, else 0."""
    end = logits[..., -1, :]
    return (_best(*_pick(end, pair.answers)) > _best(*_pick(end, pair.wrong))).to(logits.dtype)


def top1(
    logits: Float[Tensor, "*alternative example pos vocab"], pair: PatchPair
) -> Float[Tensor, "*alternative example"]:
    """1 where an answer outranks every other token, else 0."""
    return (logits[..., -1, :].argmax(-1, keepdim=True) == pair.answers).any(-1).to(logits.dtype)


def kl(
    logits: Float[Tensor, "*alternative example pos vocab"], reference: Float[Tensor, "example vocab"]
) -> Float[Tensor, "*alternative example"]:
    """KL(reference ‖ these) = Σ p_ref (log p_ref − log p) in nats; 0 with no gradient where they are the same."""
    expected, found = reference.log_softmax(-1), logits[..., -1, :].log_softmax(-1)
    return (expected.exp() * (expected - found)).sum(-1)


def first_copy_loss(
    logits: Float[Tensor, "*alternative example pos vocab"], pair: PatchPair
) -> Float[Tensor, "*alternative example"]:
    """Mean loss in nats on the tokens of the first copy but the prompt's first token."""
    return _copy_loss(logits, pair, second=False)


def second_copy_loss(
    logits: Float[Tensor, "*alternative example pos vocab"], pair: PatchPair
) -> Float[Tensor, "*alternative example"]:
    """Mean loss in nats on the tokens of the second copy, of which the answer is the last."""
    return _copy_loss(logits, pair, second=True)


def _copy_loss(
    logits: Float[Tensor, "*alternative example pos vocab"], pair: PatchPair, *, second: bool
) -> Float[Tensor, "*alternative example"]:
    targets = torch.cat([pair.clean[:, 1:], pair.answers[:, :1]], dim=1)
    log_p = logits.log_softmax(-1)
    losses = -log_p.gather(-1, targets[..., None].expand(*log_p.shape[:-1], 1))[..., 0]
    # Position i predicts token i + 1.
    at = torch.arange(targets.shape[1], device=targets.device) + 1
    counted = at >= pair.roles[COPY][:, None] if second else at < pair.roles[COPY][:, None]
    return torch.where(counted, losses, 0.0).sum(-1) / counted.sum(-1)


def _pick(
    values: Float[Tensor, "*alternative example vocab"], ids: Int[Tensor, "example k"]
) -> tuple[Float[Tensor, "*alternative example k"], Bool[Tensor, "example k"]]:
    """The values of some tokens of each example, and which of them are there."""
    index = ids.clamp(min=0).expand(*values.shape[:-1], ids.shape[-1])
    return values.gather(-1, index), ids != ABSENT


def _sum(
    values: Float[Tensor, "*alternative example k"], there: Bool[Tensor, "example k"]
) -> Float[Tensor, "*alternative example"]:
    return torch.where(there, values, 0.0).sum(-1)


def _mean(
    values: Float[Tensor, "*alternative example k"], there: Bool[Tensor, "example k"]
) -> Float[Tensor, "*alternative example"]:
    return _sum(values, there) / there.sum(-1)


def _best(
    values: Float[Tensor, "*alternative example k"], there: Bool[Tensor, "example k"]
) -> Float[Tensor, "*alternative example"]:
    return values.masked_fill(~there, -torch.inf).amax(-1)


_METRICS: dict[str, Callable[[Tensor, PatchPair], Tensor]] = {
    "logit_diff": logit_diff,
    "prob_diff": prob_diff,
    "log_prob": log_prob,
    "sharpness": sharpness,
    "accuracy": accuracy,
    "top1": top1,
    "first_copy_loss": first_copy_loss,
    "second_copy_loss": second_copy_loss,
}
