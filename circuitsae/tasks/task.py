"""Example, Task and PatchPair: text with roles and the metric of each example, and the same as tensors."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuitsae.interventions import Prompt
from circuitsae.tasks.wording import Encoded, Span, encode
from transcoders.errors import InputError, PromptError
from transcoders.language_model import LanguageModel

END = "END"
"""The role every example has: its last token, from which the answer is read."""
ABSENT = -1
_SHOWN = 5

Answer = str | int
"""A text that is one token, leading space included, or a token's id."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A clean prompt, its corrupt twin, and what follows the clean one."""

    clean: str
    corrupt: str
    answers: tuple[Answer, ...]
    """Tokens that are right after the clean prompt."""
    wrong: tuple[Answer, ...] = ()
    """Tokens they compete with."""
    roles: Mapping[str, Span] = field(default_factory=dict)
    """Characters of the clean prompt that play a role; its position is that of their last token."""
    template: str = ""
    """Prompts of one template have their roles in the same order, and share means."""
    boundary: tuple[Answer, Answer] | None = None
    """The answers just above and just below a threshold, for `sharpness`."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """What the answer rests on though the prompt does not say it: the state, in two hops."""


@dataclass(frozen=True, slots=True, eq=False)
class PatchPair:
    """Clean and corrupt prompts of one length, as tensors on the model's device."""

    clean: Int[Tensor, "example pos"]
    corrupt: Int[Tensor, "example pos"]
    answers: Int[Tensor, "example answer"]
    """Token ids, filled up with -1."""
    wrong: Int[Tensor, "example wrong"]
    """Token ids, filled up with -1."""
    boundary: Int[Tensor, "example 2"]
    """Token ids above and below the threshold; -1 where the example has none."""
    roles: dict[str, Int[Tensor, "example"]]
    """The position of each role (`END` always), or -1 in an example without it."""
    templates: tuple[str, ...]
    index: Int[Tensor, "example"]
    """Which examples of the task these are."""

    def __len__(self) -> int:
        return len(self.clean)

    def take(self, rows: Int[Tensor, "k"] | Sequence[int] | slice) -> "PatchPair":
        """Some of the examples, in the order given."""
        if not isinstance(rows, slice):
            rows = torch.as_tensor(rows, device=self.clean.device)
        chosen = torch.arange(len(self), device=self.clean.device)[rows]
        return PatchPair(
            clean=self.clean[chosen],
            corrupt=self.corrupt[chosen],
            answers=self.answers[chosen],
            wrong=self.wrong[chosen],
            boundary=self.boundary[chosen],
            roles={role: pos[chosen] for role, pos in self.roles.items()},
            templates=tuple(self.templates[i] for i in chosen.tolist()),
            index=self.index[chosen],
        )

    def split(self, size: int) -> list["PatchPair"]:
        """Parts of at most `size` examples."""
        return [self.take(slice(start, start + size)) for start in range(0, len(self), size)]

    def prompts(self, *, corrupt: bool = False) -> list[Prompt]:
        """The prompts as interventions take them, with their roles and templates."""
        rows = self.corrupt if corrupt else self.clean
        places = {role: pos.tolist() for role, pos in self.roles.items()}
        return [
            Prompt(row, {role: pos[i] for role, pos in places.items() if pos[i] != ABSENT}, self.templates[i])
            for i, row in enumerate(rows)
        ]


class Known(NamedTuple):
    """How many of a task's examples a model gets right, the others being left out."""

    kept: int
    of: int
    measure: str
    """Right is an example on which this is above 0."""
    model: str

    def __str__(self) -> str:
        return f"{self.kept} of {self.of} examples, those that {self.model} gets right ({self.measure} > 0)"


@dataclass(frozen=True, slots=True)
class Task:
    """Examples of one behaviour and the metric it is judged by."""

    name: str
    examples: tuple[Example, ...]
    metric: str = "logit_diff"
    """Name of the default metric, one of `circuitsae.tasks.task.METRICS`."""
    measures: tuple[str, ...] = ("logit_diff", "prob_diff", "accuracy", "top1")
    """What `behaviour` reports."""
    refused: tuple[str, ...] = ()
    """Words, years or examples left out because the model's tokenizer splits them."""
    known: Known | None = None
    """What `known_examples` kept; None where the examples are as they were drawn."""

    def __post_init__(self) -> None:
        if not self.examples:
            raise InputError(f"The task {self.name!r} has no examples; give at least one.")

    def __len__(self) -> int:
        return len(self.examples)

    def take(self, rows: Sequence[int] | slice) -> "Task":
        """Some of the examples, in the order given."""
        chosen = range(len(self))[rows] if isinstance(rows, slice) else rows
        return replace(self, examples=tuple(self.examples[i] for i in chosen))

    def tokens(self, model: LanguageModel) -> list[PatchPair]:
        """The examples as this model reads them, grouped by length, the shortest first.

        Raises `PromptError` with the list where a clean and a corrupt prompt differ in length or an answer is not one
        token; `fitting` leaves such examples out instead.
        """
        reader = _Reader(model, self.examples)
        if reader.unfit:
            raise PromptError(_refusal(self, model, reader.unfit))
        groups: dict[int, list[int]] = defaultdict(list)
        for i, encoded in enumerate(reader.clean):
            groups[len(encoded.ids)].append(i)
        model.check_tokens(torch.tensor(reader.clean[groups[max(groups)][0]].ids))
        return [reader.pair(groups[length]) for length in sorted(groups)]

    def fitting(self, model: LanguageModel) -> "Task":
        """The task without the examples that `tokens` would refuse; `refused` says what they were."""
        unfit = _Reader(model, self.examples).unfit
        if len(unfit) == len(self):
            raise PromptError(_refusal(self, model, unfit))
        kept = tuple(example for i, example in enumerate(self.examples) if i not in unfit)
        return replace(self, examples=kept, refused=(*self.refused, *unfit.values()))

    def score(self, pair: PatchPair, name: str | None = None, *, reference: Tensor | None = None) -> "TaskMetric":
        """A metric of these examples, logits [... example pos vocab] → [... example]; the task's own unless named."""
        return metric(name or self.metric, pair, reference=reference)


def _refusal(task: Task, model: LanguageModel, unfit: Mapping[int, str]) -> str:
    shown = "; ".join(list(unfit.values())[:_SHOWN])
    more = f"; and {len(unfit) - _SHOWN} more" if len(unfit) > _SHOWN else ""
    return (
        f"{len(unfit)} of the {len(task)} examples of {task.name!r} do not fit the tokenizer of {model.name}: "
        f"{shown}{more}. Pairs must be of equal length and answers one token; use `fitting` to leave these out."
    )


class _Reader:
    """The examples of a task through one model's tokenizer."""

    def __init__(self, model: LanguageModel, examples: Sequence[Example]) -> None:
        self._model, self._examples = model, examples
        self._ids: dict[Answer, int | None] = {}
        self._rows: dict[tuple[Answer, ...], list[int | None]] = {}
        encoded = encode(model, [text for example in examples for text in (example.clean, example.corrupt)])
        self.clean: list[Encoded] = encoded[::2]
        self.corrupt: list[Encoded] = encoded[1::2]
        self.unfit = {i: reason for i in range(len(examples)) if (reason := self._unfit(i))}
        """Number of each example that cannot be used, and why."""

    def _unfit(self, i: int) -> str | None:
        example, clean, corrupt = self._examples[i], len(self.clean[i].ids), len(self.corrupt[i].ids)
        if clean != corrupt:
            return f"{example.clean!r} has {clean} tokens but {example.corrupt!r} has {corrupt}"
        parts = (example.answers, example.wrong, example.boundary or ())
        split = [part[i] for part in parts for i, token in enumerate(self._row(part)) if token is None]
        names = ", ".join(map(repr, dict.fromkeys(split)))
        return f"{names} after {example.clean!r} is not one token" if split else None

    def _row(self, answers: tuple[Answer, ...]) -> list[int | None]:
        """Token ids; None for what is not one token. Examples share their answers, so each is looked up once."""
        if answers not in self._rows:
            for answer in answers:
                if answer not in self._ids:
                    self._ids[answer] = self._id(answer)
            self._rows[answers] = [self._ids[answer] for answer in answers]
        return self._rows[answers]

    def _id(self, answer: Answer) -> int | None:
        if isinstance(answer, int):
            return answer if 0 <= answer < self._model.d_vocab else None
        try:
            return self._model.token_id(answer)
        except PromptError:
            return None

    def pair(self, rows: list[int]) -> PatchPair:
        """The examples `rows`, which have one length."""
        device, examples = self._model.device, [self._examples[i] for i in rows]
        length = len(self.clean[rows[0]].ids)
        roles: dict[str, list[int]] = {role: [] for example in examples for role in example.roles}
        for i, example in zip(rows, examples, strict=True):
            for role, positions in roles.items():
                span = example.roles.get(role)
                positions.append(ABSENT if span is None else self.clean[i].position(span[1] - 1))
        roles[END] = [length - 1] * len(rows)
        return PatchPair(
            clean=torch.tensor([self.clean[i].ids for i in rows], device=device),
            corrupt=torch.tensor([self.corrupt[i].ids for i in rows], device=device),
            answers=self._padded([example.answers for example in examples]),
            wrong=self._padded([example.wrong for example in examples]),
            boundary=self._padded([example.boundary or () for example in examples], width=2),
            roles={role: torch.tensor(positions, device=device) for role, positions in roles.items()},
            templates=tuple(example.template for example in examples),
            index=torch.tensor(rows, device=device),
        )

    def _padded(self, answers: Sequence[tuple[Answer, ...]], width: int = 0) -> Int[Tensor, "example answer"]:
        width = max([width, *map(len, answers)])
        rows = [self._row(row) + [ABSENT] * (width - len(row)) for row in answers]
        return torch.tensor(rows, dtype=torch.int64, device=self._model.device).reshape(len(answers), width)


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
