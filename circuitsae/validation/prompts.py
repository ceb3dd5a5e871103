"""The same edges on other prompts: on paraphrases, and on the other prompts of a task.

A node of the graph stands for a feature (error, token) at a position. On another prompt it is the same feature at the
corresponding position: that of the same role, or the same number where the position has no role and both prompts have
as many tokens. A logit is the same token's, or the token that answers the other prompt. There the edge makes the
claims that the other prompt's own graph makes, and is put to the same test among the other edges there.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from circuitsae.graph import AttributionGraph, Node, NodeKind
from circuitsae.graph.notes import Claim
from circuitsae.interventions import Prompt, PromptLike, Recording
from circuitsae.interventions.prompts import Library
from circuitsae.replacement import ReplacementModel
from circuitsae.validation.claims import Pairs, Settings, judge
from circuitsae.validation.measuring import node_row, reading_like, values_of
from circuitsae.validation.statistics import LEVEL, slopes
from transcoders.errors import InputError


@dataclass(frozen=True, eq=False)
class Answered(Prompt):
    """A prompt that other tokens answer than the graph's: in IOI another name."""

    answers: Mapping[int, int] = field(default_factory=dict)
    """The token here for each token of the graph's logits; edges into others have no counterpart."""


def read_prompts(path: str | Path) -> list[str]:
    """The prompts of a text file, one a line. Raises `InputError` for a file that cannot be read or has none."""
    try:
        prompts = [line for line in Path(path).read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error}); give a text file with one prompt a line.") from error
    if not prompts:
        raise InputError(f"{path} has no prompt; give a text file with one prompt a line.")
    return prompts


def on_prompts(
    model: ReplacementModel,
    graph: AttributionGraph,
    edges: pd.DataFrame,
    prompts: Sequence[PromptLike],
    *,
    roles: Mapping[str, int] | None = None,
    settings: Settings = Settings(),
    begin: Callable[[int], Any] = lambda _: None,
    advance: Callable[[int], Any] = lambda _: None,
) -> pd.DataFrame:
    """Edges (`source`, `target`) of a graph on each prompt: `prompt` (its number), both ids, `active`, `kind`, claims.

    `active` says whether both ends are there; the columns of claims are those of `judge` on that prompt, NaN where one
    is not. An edge has no row on a prompt where an end has no counterpart, or the source's comes after the target's.
    `roles`: positions of the graph's prompt by role. Raises `InputError` for a position that it has not.
    """
    length, library = len(graph.token_ids), Library(reading_like(model, graph))
    for role, pos in (roles or {}).items():
        if not -length <= pos < length:
            raise InputError(f"Role {role!r} is at position {pos}, but the graph's prompt has {length} tokens.")
    role_at = {pos % length: role for role, pos in (roles or {}).items()}
    ends = [[graph.nodes[node_row(graph, name)] for name in edges[end]] for end in ("source", "target")]
    frames = []
    for number, prompt in enumerate(prompts):
        recording = library[prompt]
        where = _Counterparts(length, role_at, recording, prompt.answers if isinstance(prompt, Answered) else None)
        found = _on_one(model, recording, where, list(zip(*ends, strict=True)), settings, begin, advance)
        frames.append(found.assign(prompt=number))
    columns = ["prompt", "source", "target", "active", "kind"]
    every = pd.concat([pd.DataFrame(columns=columns), *(frame for frame in frames if len(frame))], ignore_index=True)
    return every.astype({"active": bool, "prompt": int})


def _on_one(
    model: ReplacementModel,
    prompt: Recording,
    where: "_Counterparts",
    ends: Sequence[tuple[Node, Node]],
    settings: Settings,
    begin: Callable[[int], Any],
    advance: Callable[[int], Any],
) -> pd.DataFrame:
    """The edges that have a counterpart, judged where that is active."""
    moved = [(where.moved(s), where.moved(t)) for s, t in ends]
    both = [(*edge, a, b) for edge, (a, b) in zip(ends, moved, strict=True) if a is not None and b is not None]
    there = [found for found in both if found[2].pos <= found[3].pos]
    active = np.array([where.is_on(a) and where.is_on(b) for *_, a, b in there], dtype=bool)
    frame = pd.DataFrame([{"source": s.id, "target": t.id} for s, t, *_ in there]).assign(active=active)
    if not active.any():
        return frame
    pairs = Pairs.of([(a, b) for (*_, a, b), on in zip(there, active, strict=True) if on])
    found = judge(model, prompt, pairs, settings, elsewhere=values_of([prompt]), begin=begin, advance=advance)
    found = found.drop(columns=["source", "target", "hops", "frozen"])
    return frame.join(found.set_index(np.flatnonzero(active)))


class _Counterparts:
    """The nodes of a graph on another prompt."""

    def __init__(
        self, length: int, role_at: Mapping[int, str], prompt: Recording, answers: Mapping[int, int] | None
    ) -> None:
        self.prompt, self.role_at, self.answers = prompt, role_at, answers
        self.same_length = length == len(prompt)
        self.active = {tuple(row) for row in prompt.trace.features.index.tolist()}

    def moved(self, node: Node) -> Node | None:
        """The node there; a logit stays at the last position."""
        if node.kind is NodeKind.LOGIT:
            return self._answered(replace(node, pos=len(self.prompt) - 1))
        role = self.role_at.get(node.pos)
        if role is not None and role in self.prompt.roles:
            pos = self.prompt.roles[role] % len(self.prompt)
        elif role is None and self.same_length:
            pos = node.pos
        else:
            return None
        return None if node.kind is NodeKind.FEATURE and bool(self.prompt.trace.exact[pos]) else replace(node, pos=pos)

    def _answered(self, node: Node) -> Node | None:
        """A token's logit, or a contrast, of the tokens that answer this prompt; a direction is the same."""
        if self.answers is None or node.vector:
            return node
        found = [self.answers.get(token) for token in [term.token for term in node.terms] or [node.index]]
        tokens = [token for token in found if token is not None]
        if len(tokens) < len(found):
            return None
        if not node.terms:
            return replace(node, index=tokens[0])
        terms = zip(node.terms, tokens, strict=True)
        return replace(node, terms=tuple(term._replace(token=token) for term, token in terms))

    def is_on(self, node: Node) -> bool:
        return node.kind is not NodeKind.FEATURE or (node.layer, node.pos, node.index) in self.active


def stability(frame: pd.DataFrame, claim: Claim = "graph") -> pd.DataFrame:
    """What other prompts (`on_prompts`) say of each edge's claim: a row per `source` and `target`.

    `prompts`: on how many both ends are active; `stability`: on which share of these the claim is confirmed, with its
    exact binomial interval `stability_low` to `stability_high` (Clopper & Pearson 1934: each prompt is one draw);
    `pooled`: Σ measured·predicted / Σ predicted² over these, `pooled_low` to `pooled_high` by drawing prompts.
    """
    ends = ["source", "target"]
    edges = pd.MultiIndex.from_arrays([frame[end] for end in ends]).unique()
    on = pd.DataFrame(frame[frame["active"].to_numpy(bool)])
    n = Counter(zip(on["source"], on["target"], strict=True))
    verdicts = on[f"{claim}_verdict"] if len(on) else []
    k = Counter((s, t) for s, t, v in zip(on["source"], on["target"], verdicts, strict=True) if v == "confirmed")
    pooled = np.full((len(edges), 3), np.nan)
    if len(on):
        wide = on.pivot(index=ends, columns="prompt").reindex(edges)
        pooled = slopes(*(wide[f"{claim}_{name}"].to_numpy(float) for name in ("predicted", "measured")))
    columns = ["stability", "stability_low", "stability_high", "pooled", "pooled_low", "pooled_high"]
    shares = np.reshape([_share(k[edge], n[edge]) for edge in edges], (-1, 3))
    found = pd.DataFrame(np.column_stack([shares, pooled]), columns=pd.Index(columns), index=edges)
    found.insert(0, "prompts", [n[edge] for edge in edges])
    return found.reset_index()


def _share(k: int, n: int) -> tuple[float, float, float]:
    if n == 0:
        return np.nan, np.nan, np.nan
    low, high = stats.binomtest(k, n).proportion_ci(LEVEL, method="exact")
    return k / n, float(low), float(high)
