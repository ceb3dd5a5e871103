"""What heads do, found by behaviour: where they look on the task, what they write, and whose queries they move.

Of every role the evidence: attention, copy score, effect, and, where the role asks for it, what changes once other
heads are patched or knocked out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuitsae.components import (
    PatchingProblem,
    attention_moved,
    direct_logit_attribution,
    exact_edges,
    exact_nodes,
    problems_of,
)
from circuitsae.components.network import Network
from circuitsae.reproduce.copying import COPIED, copy_scores
from circuitsae.reproduce.result import Step, silent
from circuitsae.tasks import Task
from transcoders.errors import InputError
from transcoders.language_model import LanguageModel

LOOKS = 0.3
"""A head looks somewhere if this share of its attention, in the mean over prompts, falls there."""
WRITES = 0.02
"""A head writes the answer (or against it) if its direct attribution is at least this share of the metric."""
MOVES = 0.02
"""A head moves others' queries if ablating its edges to them changes the metric by at least this share."""
COPIES = 0.5
"""A head copies (or, with −OV, suppresses) names if its copy score is at least this; GPT-2 small's movers have .95."""


@dataclass(frozen=True)
class Pattern:
    """A role as a behaviour: from one place the head looks at another."""

    role: str
    query: str
    key: str
    sign: int = 0
    """+1: it must write the answer; −1: against it; 0: its writing is not asked about."""
    feeds: tuple[str, ...] = ()
    """Roles of the heads whose queries it must change."""
    copies: int = 0
    """+1: its copy score must be high; −1: that with −OV; 0: it is not asked about."""
    but_not: tuple[str, ...] = ()
    """Roles, named before, whose heads are left out."""
    replaces: tuple[str, ...] = ()
    """Roles that are knocked out first: it must write only then, wherever it looks."""
    offsets: tuple[int, ...] = (0,)
    """Distances from the key that count as well; a head is judged by the one that it looks at most."""

    def place(self, offset: int) -> str:
        return self.key if not offset else f"{self.key}{offset:+d}"


_NEAR, _BEFORE = tuple(range(9)), tuple(range(-8, 0))
PATTERNS: dict[str, tuple[Pattern, ...]] = {
    "ioi": (
        Pattern("previous token", "S1+1", "S1"),
        Pattern("duplicate token", "S2", "S1"),
        Pattern("induction", "S2", "S1+1"),
        Pattern("IO reader at S2", "S2", "IO"),
        Pattern("name mover", "END", "IO", 1, copies=1),
        Pattern("negative name mover", "END", "IO", -1, copies=-1),
        Pattern("subject suppressor", "END", "S2", 1, copies=-1),
        Pattern("name mover through S2", "END", "S2", 1, but_not=("subject suppressor",)),
        Pattern("negative mover through S2", "END", "S2", -1),
        Pattern("s-inhibition", "END", "S2", 0, ("name mover", "name mover through S2")),
        Pattern("backup name mover", "END", "IO", 1, replaces=("name mover", "name mover through S2")),
    ),
    "greater-than": (
        Pattern("year reader", "END", "YY"),
        Pattern("year reader, writes the answer", "END", "YY", 1),
        Pattern("century reader", "END", "XX1"),
    ),
    "induction": (
        Pattern("fixed distance back", "END", "END", offsets=_BEFORE),
        Pattern("duplicate token", "END", "A1"),
        Pattern("induction", "END", "B1", offsets=_NEAR),
        Pattern("induction, writes the answer", "END", "B1", 1, offsets=_NEAR),
    ),
    "two-hop": (Pattern("city reader", "END", "city"), Pattern("city reader, writes the answer", "END", "city", 1)),
    "agreement": (
        Pattern("subject reader", "END", "subject"),
        Pattern("subject reader, writes the answer", "END", "subject", 1),
        Pattern("distractor reader", "END", "distractor"),
    ),
}
"""Wang et al. 2022, section 3, for IOI; the others by the same questions."""
MOVED: dict[str, tuple[str, tuple[str, ...]]] = {"ioi": ("IO", ("S1", "S2"))}
"""By task: attention of the heads fed to the first place, less that to the others, is what feeding them moves."""


def head_roles(
    model: LanguageModel,
    task: Task,
    patterns: tuple[Pattern, ...] | None = None,
    *,
    progress: Step = silent,
) -> pd.DataFrame:
    """A row per head and role it was found in: `head`, `role`, and the evidence.

    `attention`: mean attention from the role's query to its key on clean prompts; `corrupt`: the same on corrupt ones;
    `direct`: direct logit attribution, `effect`: the change of the metric when the head is ablated (resampled), both
    as shares of the clean metric's mean; `copies`: the copy score (`copy_scores`); `feeds`: the effect of its edges to
    the queries of the heads it must feed; `moves`: how far that moves their attention (`MOVED`); `knocked_out`: its
    direct attribution with the heads that it replaces ablated.
    Raises `InputError` for a task whose roles are not known and no patterns given.
    """
    chosen = PATTERNS.get(task.name) if patterns is None else patterns
    if chosen is None:
        raise InputError(
            f"No head roles are known for the task {task.name!r}; give patterns, of {', '.join(PATTERNS)}."
        )
    found = _Evidence(model, task, progress)
    progress("attention")
    looks = attention_between(model, task, chosen)  # [2 offset head] each
    rows: list[Row] = []
    for pattern in chosen:
        taken = _having(rows, pattern.but_not)
        rows += [row for row in found.rows(pattern, looks[pattern]) if row["head"] not in taken]
    rows = _feeding(rows, found, chosen)
    for pattern in chosen:
        gone = _having(rows, pattern.replaces)
        rows += found.backups(pattern, looks[pattern], gone) if gone else []
    table = pd.DataFrame(found.with_effects(rows))
    return table.reindex(columns=[column for column in COLUMNS if column in table])


COLUMNS = ("head", "role", "from", "to", "attention", "corrupt", "direct", "effect", "copies", "feeds", "moves",
           "knocked_out")  # fmt: skip
Row = dict[str, Any]


def _having(rows: Sequence[Row], roles: Sequence[str]) -> list[str]:
    """The heads found in one of these roles."""
    return list(dict.fromkeys(row["head"] for row in rows if row["role"] in roles))


class _Evidence:
    """What is known of every head before roles are given."""

    def __init__(self, model: LanguageModel, task: Task, progress: Step) -> None:
        self.model, self.task, self.progress = model, task, progress
        self.problems: list[PatchingProblem] = problems_of(model, task)
        self.graph = Network.of(model).graph
        self.heads = [name for name in self.graph.writers if name.startswith("a")]
        self.scale = abs(mean_metric(model, self.problems))
        progress("what they write")
        self.direct = self._direct()
        self.copies = None
        if task.name in COPIED:
            progress("copy scores")
            self.copies = copy_scores(model, task)

    def _direct(self, without: Sequence[str] = ()) -> Float[Tensor, "head"]:
        """Direct attribution of every head as a share of the clean metric."""
        scores = direct_logit_attribution(self.problems, without=without).only(self.heads)
        return scores.mean.double().cpu() / self.scale

    def rows(self, pattern: Pattern, looks: Float[Tensor, "2 offset head"]) -> list[Row]:
        """The heads that look where the pattern says, and write and copy as it says."""
        if pattern.replaces:  # known only once others are ablated: `backups`
            return []
        made = [self._row(pattern, looks, number) for number in range(len(self.heads))]
        return [row for row in made if row["attention"] >= LOOKS and _writes(pattern, row)]

    def backups(self, pattern: Pattern, looks: Float[Tensor, "2 offset head"], gone: list[str]) -> list[Row]:
        """The heads that write the answer only once others are ablated (Wang et al. 2022, section 3.4)."""
        self.progress(f"backups of {len(gone)} heads")
        after = self._direct(gone)
        rose = (self.direct < WRITES) & (after >= WRITES) & (after - self.direct >= WRITES)
        made = [(self.heads[i], i) for i in rose.nonzero()[:, 0].tolist()]
        return [self._row(pattern, looks, i) | {"knocked_out": float(after[i])} for head, i in made if head not in gone]

    def _row(self, pattern: Pattern, looks: Float[Tensor, "2 offset head"], number: int) -> Row:
        best = int(looks[0, :, number].argmax())
        place = {"head": self.heads[number], "role": pattern.role, "from": pattern.query}
        values = {"attention": looks[0, best, number], "corrupt": looks[1, best, number], "direct": self.direct[number]}
        if self.copies is not None:
            values["copies"] = self.copies[int(pattern.copies < 0), number]
        numbers = {name: float(value) for name, value in values.items()}
        return place | {"to": pattern.place(pattern.offsets[best])} | numbers

    def with_effects(self, rows: list[Row]) -> list[Row]:
        """The rows with the effect of ablating each head whole."""
        heads = [head for head in self.heads if any(row["head"] == head for row in rows)]
        if not heads:
            return rows
        self.progress(f"{len(heads)} heads resampled")
        scores = exact_nodes(self.problems, heads)
        return [row | {"effect": scores.of(row["head"]) / self.scale} for row in rows]


def _writes(pattern: Pattern, row: Row) -> bool:
    if pattern.sign and pattern.sign * row["direct"] < WRITES:
        return False
    return not pattern.copies or row.get("copies", 1.0) >= COPIES


@torch.no_grad()
def mean_metric(model: LanguageModel, problems: Sequence[PatchingProblem]) -> float:
    """The mean of their metric over the clean prompts."""
    return float(torch.cat([problem.metric(model.run(problem.clean)[0]) for problem in problems]).mean())


def _feeding(rows: list[Row], found: _Evidence, patterns: tuple[Pattern, ...]) -> list[Row]:
    """Heads that must feed others keep their role only where their edges to those queries change the metric."""
    feeding = {pattern.role: pattern.feeds for pattern in patterns if pattern.feeds}
    kept = []
    for row in rows:
        if row["role"] not in feeding:
            kept.append(row)
            continue
        fed = [name for name in _having(rows, feeding[row["role"]]) if name != row["head"]]
        edges = [(row["head"], f"{name}.q") for name in fed if row["head"] in found.graph.writers_before(f"{name}.q")]
        if not edges:
            continue
        found.progress(f"edges from {row['head']} to queries")
        value = float(exact_edges(found.problems, edges).mean.sum()) / found.scale
        if abs(value) >= MOVES:
            moved = _moves(found, rows, row["head"], [edge[1].removesuffix(".q") for edge in edges])
            kept.append(row | {"feeds": value, "moves": moved})
    return kept


def _moves(found: _Evidence, rows: Sequence[Row], sender: str, fed: Sequence[str]) -> float:
    """How far the heads that look at one place look there more than elsewhere, once the sender is patched."""
    to, others = MOVED.get(found.task.name, ("", ()))
    heads = [head for head in fed if any(row["head"] == head and row["to"] == to for row in rows)]
    if not heads:
        return float("nan")
    problems = problems_of(found.model, found.task, roles=(to, *others))
    moved = attention_moved(problems, [sender], heads)[0].double().mean((0, 1))
    return float(moved[0] - moved[1 : 1 + len(others)].sum())


@torch.no_grad()
def attention_between(
    model: LanguageModel, task: Task, patterns: tuple[Pattern, ...]
) -> dict[Pattern, Float[Tensor, "2 offset head"]]:
    """Mean attention of every head (layers in order) from a pattern's query to its key, clean and corrupt."""
    found: dict[Pattern, list[Tensor]] = {pattern: [] for pattern in patterns}
    for pair in task.tokens(model):
        for part in pair.split(64):
            both = [_patterns(model, tokens) for tokens in (part.clean, part.corrupt)]
            for pattern in patterns:
                query, key = part.roles[pattern.query], part.roles[pattern.key]
                rows = torch.arange(len(part), device=query.device)[(query >= 0) & (key >= 0)]
                at = key[rows, None] + torch.tensor(pattern.offsets, device=key.device)
                there = (at >= 0) & (at <= query[rows, None])
                at = at.clamp(0, part.clean.shape[1] - 1)
                looked = [a[rows[:, None], :, query[rows, None], at] * there[..., None] for a in both]
                found[pattern].append(torch.stack(looked))
    return {pattern: torch.cat(values, 1).double().mean(1).cpu() for pattern, values in found.items()}


def _patterns(model: LanguageModel, tokens: Int[Tensor, "example pos"]) -> Float[Tensor, "example head pos pos"]:
    names = [f"blocks.{layer}.attn.hook_pattern" for layer in range(model.n_layers)]
    _, cache = model.run_hooked(tokens, read=names)
    return torch.cat([cache[name] for name in names], 1)
