"""Many prompts with one model, one after the other; a prompt that fails does not end the others."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from circuitsae.attribution.attribute import attribute_pruned, check_settings
from circuitsae.attribution.expansion import FullSize
from circuitsae.attribution.targets import ChooseTargets, LogitTargets, TopLogits
from circuitsae.graph import AttributionGraph
from circuitsae.replacement import ReplacementModel
from transcoders.errors import CircuitsaeError, InputError


@dataclass(frozen=True, eq=False)
class Asked:
    """A prompt, and what is to be explained of it."""

    prompt: str | Int[Tensor, "pos"]
    targets: tuple[str | int, ...] = ()
    """Tokens, as `LogitTargets` takes them; none: those that are chosen for all prompts."""
    id: str | None = None
    """What its owner calls it."""


class Attributed(NamedTuple):
    """What became of a prompt: its graph and how large that was before it was pruned, or why there is none."""

    asked: Asked
    graph: AttributionGraph | None
    full: FullSize | None
    error: CircuitsaeError | None


def attribute_many(
    model: ReplacementModel,
    prompts: Iterable[str | Int[Tensor, "pos"] | Asked],
    *,
    targets: ChooseTargets = TopLogits(),
    **settings: Any,
) -> Iterator[Attributed]:
    """`attribute_pruned` of each prompt as it is asked for, in their order, the same to the bit.

    Takes the settings of `attribute_pruned`. A prompt that cannot be attributed, memory that is not enough included,
    comes with its `error`. Raises `InputError` at once for settings out of range.

    Prompts are not put together: what batches could share, the clean run with its encoding, is a twentieth of the time
    of a small prompt (`benchmarks/results/many_prompts.md`), and rounds otherwise.
    """
    check_settings(**settings)
    return (_attributed(model, each if isinstance(each, Asked) else Asked(each), targets, settings) for each in prompts)


def _attributed(model: ReplacementModel, asked: Asked, targets: ChooseTargets, settings: dict[str, Any]) -> Attributed:
    chosen = LogitTargets(asked.targets) if asked.targets else targets
    try:
        graph, full = attribute_pruned(model, asked.prompt, targets=chosen, **settings)
    except CircuitsaeError as error:
        return Attributed(asked, None, None, error)
    except (torch.OutOfMemoryError, MemoryError) as error:
        short = InputError(f"The prompt needs more memory than there is ({error!s:.80}); try --max-features.")
        return Attributed(asked, None, None, short)
    return Attributed(asked, graph, full, None)
