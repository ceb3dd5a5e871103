"""What circuits are judged on: prompts whose positions have names, and a number from the logits of each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from torch import Tensor

from circuitsae.interventions import Metric, Prompt, PromptLike, Recording
from circuitsae.interventions.prompts import Library
from circuitsae.replacement import ReplacementModel
from transcoders.errors import InputError


@runtime_checkable
class Example(Protocol):
    """One prompt of a task. A text attribute `template`, where there is one, groups prompts for means."""

    @property
    def prompt(self) -> str | Tensor: ...
    @property
    def roles(self) -> Mapping[str, int]:
        """Position of each role."""
        ...


@runtime_checkable
class Task(Protocol):
    """Examples, and the metric of each: from logits `[*batch d_vocab]` to values `[*batch]`."""

    @property
    def examples(self) -> Sequence[Example]: ...
    def metric(self, example: Example, /) -> Metric: ...


@dataclass(frozen=True, eq=False)
class PromptExample:
    """A prompt with its own metric."""

    prompt: str | Tensor
    measure: Metric
    roles: Mapping[str, int] = field(default_factory=dict)
    template: str = ""


@dataclass(frozen=True, eq=False)
class PromptTask:
    """A task of examples that carry their metrics."""

    examples: Sequence[PromptExample]
    name: str = ""

    def metric(self, example: Example, /) -> Metric:
        assert isinstance(example, PromptExample)
        return example.measure


def as_prompt(example: Example) -> Prompt:
    """The prompt of an example as interventions take it."""
    return Prompt(example.prompt, example.roles, str(getattr(example, "template", "")))


class Cases:
    """The examples of a task, each traced once, with its metric."""

    def __init__(self, model: ReplacementModel, task: Task) -> None:
        if not task.examples:
            raise InputError("The task has no examples; give at least one.")
        library = Library(model)
        self.model = model
        self.prompts: list[PromptLike] = [as_prompt(example) for example in task.examples]
        self.recordings: list[Recording] = [library[prompt] for prompt in self.prompts]
        self.metrics: list[Metric] = [task.metric(example) for example in task.examples]

    def __len__(self) -> int:
        return len(self.recordings)

    def by_length(self) -> list[list[int]]:
        """Numbers of the examples, those of one number of tokens together."""
        groups: dict[int, list[int]] = {}
        for number, recording in enumerate(self.recordings):
            groups.setdefault(len(recording), []).append(number)
        return list(groups.values())
