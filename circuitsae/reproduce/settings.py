"""How many prompts each stage takes, and what is aimed at."""

from dataclasses import dataclass, replace
from typing import Any

from circuitsae.tasks import Task, load_task
from transcoders.errors import InputError
from transcoders.language_model import LanguageModel

OPTIONS: dict[str, dict[str, Any]] = {"induction": {"corruption": "query"}}
"""Options of tasks. Induction: the corrupt prompt asks about another word of the same sequence, so that what differs
is which word is looked up; with other words in the first copy everything said about it differs."""


def task_prompts(task: str, model: LanguageModel, n: int, seed: int) -> Task:
    """The prompts of a task as they are reproduced."""
    return load_task(task, model, n, seed, **OPTIONS.get(task, {}))


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Sizes of a reproduction; `Settings.quick()` is for minutes on two cores."""

    behaviour: int = 1000
    """Prompts on which the behaviour is measured."""
    discovery: int = 200
    """Prompts on which edges are scored."""
    rescore: int | None = None
    """Edges whose score is patched exactly, beside those whose gradient vanished; None: a tenth."""
    pruning: int = 48
    """Prompts on which a circuit is pruned, where no number of best edges reaches the target; 0: it is not."""
    held_out: int = 300
    """Prompts on which the size of the circuit is chosen, and as many others on which it is judged."""
    ablated: int = 50
    """Prompts of completeness and minimality, which run many circuits."""
    stability: int = 200
    """Prompts that the bootstrap of the selected edges draws from."""
    resamples: int = 20
    subsets: int = 20
    """Random sets of components in completeness and minimality."""
    parts: int = 40
    """At most this many components, the strongest, are tried in minimality, which takes the square of runs."""
    greedy: int = 5
    """Steps of the greedy set in completeness."""
    features: int = 80
    """Prompts of the feature circuit."""
    feature_nodes: int = 1500
    """The largest feature circuit that is tried."""
    supernodes: int = 12
    """At most this many supernodes, the strongest, are ablated and patched."""
    target: float = 0.97
    """Faithfulness that the search for a circuit stops at; above the bar, for held-out prompts cost some of it."""
    audit: int = 40
    """Prompts of the cross-layer audit."""
    seed: int = 0

    @classmethod
    def quick(cls, seed: int = 0) -> "Settings":
        """Fewer prompts everywhere but in the stability of the edges, whose bar is at 200."""
        return cls(behaviour=200, discovery=100, held_out=150, ablated=8, resamples=12, subsets=4, greedy=1,
                   features=24, feature_nodes=1000, supernodes=6, audit=10, seed=seed)  # fmt: skip

    def capped(self, prompts: int) -> "Settings":
        """At most so many prompts in every stage, and no long search: a large model on a small machine.

        Raises `InputError` for less than 2 prompts, which have no spread.
        """
        if prompts < 2:
            raise InputError(f"A task cannot be reproduced on {prompts} prompts; give at least 2.")
        counts = ("behaviour", "discovery", "held_out", "ablated", "stability", "features", "audit")
        fewer = {name: min(prompts, getattr(self, name)) for name in counts}
        return replace(self, pruning=0, greedy=0, parts=4, **fewer)
