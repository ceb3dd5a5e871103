"""What a reproduction found: claims with verdicts, and sections of tables and figures.

How many prompts each stage takes, and what is aimed at.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from circuitsae.components.network import Edge, Network
from circuitsae.report import CircuitPicture
from circuitsae.tasks import Task, load_task
from circuitsae.validation.circuits import Circuit
from transcoders.errors import InputError
from transcoders.files import write_file
from transcoders.language_model import LanguageModel

OPTIONS: dict[str, dict[str, Any]] = {"induction": {"corruption": "query"}}
"""Options of tasks. Induction: the corrupt prompt asks about another word of the same sequence, so that what differs
is which word is looked up; with other words in the first copy everything said about it differs."""


Step = Callable[[str], object]
"""Is told what a stage begins with."""


def silent(step: str) -> None:
    """Tells nobody."""


LARGE, FEW, PATCHED = 10_000, 24, 200
"""A model of more edges than this (GPT-2 small has three times as many) is reproduced quickly on so few prompts, and so
many of its edges are patched exactly."""


def is_large(model: LanguageModel) -> bool:
    """Whether a model has more than `LARGE` edges between heads and MLPs."""
    return len(Network.of(model).graph.edges) > LARGE


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
    doublings: int = 2
    """Where the selected edges are not stable, so many times twice as many prompts are scored."""
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
    known: bool = False
    """Whether only prompts that the model gets right are taken, but where its behaviour is measured."""
    seed: int = 0

    @classmethod
    def quick(cls, seed: int = 0) -> "Settings":
        """Fewer prompts everywhere but in the stability of the edges, whose bar is at 200."""
        return cls(behaviour=200, discovery=100, held_out=150, ablated=8, resamples=12, subsets=4, greedy=1,
                   features=24, feature_nodes=1000, supernodes=6, audit=10, seed=seed)  # fmt: skip

    def quick_for(self, model: LanguageModel, prompts: int | None = None) -> "Settings":
        """These, or for a model of more than `LARGE` edges at most `FEW` prompts in any stage and `PATCHED` edges.

        A number of prompts or edges that was asked for stays.
        Patching a tenth of all edges takes runs that grow with the square of the layers, each as long as the model is
        deep, and every circuit that is judged reads the stream apart for each of its readers.
        """
        if not is_large(model):
            return self
        fewer = self.capped(FEW) if prompts is None else self
        return replace(fewer, rescore=PATCHED if self.rescore is None else self.rescore)

    def capped(self, prompts: int) -> "Settings":
        """At most so many prompts in every stage, and no long search: a large model on a small machine.

        Raises `InputError` for less than 2 prompts, which have no spread.
        """
        if prompts < 2:
            raise InputError(f"A task cannot be reproduced on {prompts} prompts; give at least 2.")
        counts = ("behaviour", "discovery", "held_out", "ablated", "stability", "features", "audit")
        fewer = {name: min(prompts, getattr(self, name)) for name in counts}
        return replace(self, pruning=0, greedy=0, parts=4, doublings=0, **fewer)

    def prompts(self, task: str, model: LanguageModel, n: int, draw: int = 0) -> Task:
        """`n` prompts of a task as they are reproduced, others for each `draw`.

        With `known` the first `n` of twice as many that the model gets right; less, where that is less than half.
        """
        options = OPTIONS.get(task, {})
        drawn = load_task(task, model, 2 * n if self.known else n, self.seed + draw, known=self.known, **options)
        return drawn.take(slice(n))


TOLERANCE = 0.1
"""A measured figure agrees with a published one within this share of it."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One figure: what was measured, what it had to be, and what a paper printed."""

    task: str
    name: str
    measured: float | None
    """None where it could not be measured; `note` says why."""
    at_least: float | None = None
    at_most: float | None = None
    published: float | None = None
    source: str = ""
    note: str = ""

    @property
    def has_bar(self) -> bool:
        return self.at_least is not None or self.at_most is not None

    @property
    def verdict(self) -> str:
        """`met` or `not met` (a bar), `agrees` or `differs` (published, within 10 %), `measured`, `not measured`."""
        value = self.measured
        if value is None or math.isnan(value):
            return "not met" if self.has_bar and value is not None else "not measured"
        if self.has_bar:
            above = self.at_least is None or value >= self.at_least
            return "met" if above and (self.at_most is None or value <= self.at_most) else "not met"
        if self.published is not None:
            return "agrees" if abs(value - self.published) <= TOLERANCE * abs(self.published) else "differs"
        return "measured"

    @property
    def bar(self) -> str:
        """The bar in words; empty without one."""
        parts = [
            f"{sign} {bound:g}" for sign, bound in (("≥", self.at_least), ("≤", self.at_most)) if bound is not None
        ]
        return ", ".join(parts)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "measured": _plain(self.measured), "verdict": self.verdict}


@dataclass(frozen=True, eq=False)
class Section:
    """A table and a figure with what they show."""

    title: str
    text: str = ""
    table: pd.DataFrame | None = None
    figure: go.Figure | None = None

    def to_json(self) -> dict[str, Any]:
        rows = [] if self.table is None else self.table.to_dict("records")
        return {"title": self.title, "text": self.text, "table": _plain(rows)}


@dataclass(eq=False)
class Reproduction:
    """Everything found about one task."""

    task: str
    model: str
    settings: dict[str, Any]
    claims: list[Claim] = field(default_factory=list)
    sections: list[Section] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    """Of each stage."""
    graph: Any = None
    """The task's attribution graphs as one (`circuitsae.graph.AggregateGraph`), where there are dictionaries."""

    picture: CircuitPicture | None = None
    """The circuit of heads by roles."""
    edges: frozenset[Edge] = frozenset()
    """The circuit of heads and MLPs."""
    nodes: Circuit | None = None
    """The feature circuit, where there are dictionaries."""

    @property
    def failed(self) -> list[Claim]:
        """The claims whose bar was not met."""
        return [claim for claim in self.claims if claim.verdict == "not met"]

    def add(self, name: str, measured: float | None, **options: Any) -> None:
        """Add a claim about this task."""
        self.claims.append(Claim(task=self.task, name=name, measured=measured, **options))

    def section(self, title: str, text: str = "", table: pd.DataFrame | None = None, figure: Any = None) -> None:
        self.sections.append(Section(title, text, table, figure))

    def to_json(self) -> dict[str, Any]:
        """Claims, tables and settings as JSON values; missing numbers are null."""
        return {
            "task": self.task,
            "model": self.model,
            "settings": self.settings,
            "seconds": self.seconds,
            "claims": [claim.to_json() for claim in self.claims],
            "sections": [section.to_json() for section in self.sections],
        }


def claims_frame(claims: Sequence[Claim]) -> pd.DataFrame:
    """A row per claim: task, claim, measured, bar, published, verdict, note."""
    rows = [
        {
            "task": c.task,
            "claim": c.name,
            "measured": c.measured,
            "bar": c.bar,
            "published": c.published,
            "verdict": c.verdict,
            "note": "; ".join(filter(None, (c.source, c.note))),
        }
        for c in claims
    ]
    return pd.DataFrame(rows)


def write_json(found: Sequence[Reproduction], path: Path) -> Path:
    """Write all of it as one JSON file."""
    document = json.dumps([one.to_json() for one in found], ensure_ascii=False, indent=1, allow_nan=False)
    write_file(path, document)
    return path


def _plain(value: Any) -> Any:
    """JSON values of numpy scalars; null for what is not finite."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "item") and not isinstance(value, str):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
