"""What heads do, found by behaviour: where they look on the task, and what they write."""

from dataclasses import dataclass
from typing import cast

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuitsae.components import direct_logit_attribution, exact_edges, exact_nodes, problems_of
from circuitsae.components.network import Network
from circuitsae.reproduce.result import Reproduction
from circuitsae.tasks import Task
from transcoders.errors import InputError
from transcoders.language_model import LanguageModel

LOOKS = 0.3
"""A head looks somewhere if this share of its attention, in the mean over prompts, falls there."""
WRITES = 0.02
"""A head writes the answer (or against it) if its direct attribution is at least this share of the metric."""
MOVES = 0.02
"""A head matters if ablating it (or its edges to a reader) changes the metric by at least this share."""


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
        Pattern("name mover", "END", "IO", 1),
        Pattern("negative name mover", "END", "IO", -1),
        Pattern("name mover through S2", "END", "S2", 1),
        Pattern("negative mover through S2", "END", "S2", -1),
        Pattern("s-inhibition", "END", "S2", 0, ("name mover", "name mover through S2")),
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
"""Wang et al. 2022, section 3, for IOI; the others by the same two questions."""


def head_roles(model: LanguageModel, task: Task, patterns: tuple[Pattern, ...] | None = None) -> pd.DataFrame:
    """A row per head and role it was found in: `head`, `role`, and the evidence.

    `attention`: mean attention from the role's query to its key on clean prompts; `corrupt`: the same on corrupt ones;
    `direct`: direct logit attribution, `effect`: the change of the metric when the head is ablated (resampled), both
    as shares of the clean metric's mean; `feeds`: the effect of its edges to the queries of the heads it must feed.
    Raises `InputError` for a task whose roles are not known and no patterns given.
    """
    chosen = PATTERNS.get(task.name) if patterns is None else patterns
    if chosen is None:
        raise InputError(
            f"No head roles are known for the task {task.name!r}; give patterns, of {', '.join(PATTERNS)}."
        )
    looks = attention_between(model, task, chosen)  # [2 offset head] each
    problems = problems_of(model, task)
    heads = [name for name in Network.of(model).graph.writers if name.startswith("a")]
    scale = abs(float(torch.cat([_clean(model, p.clean, p.metric) for p in problems]).mean()))
    direct, effect = direct_logit_attribution(problems).only(heads), exact_nodes(problems, heads)
    wrote, moved = (scores.mean.double() / scale for scores in (direct, effect))
    rows = []
    for pattern in chosen:
        here = looks[pattern]
        best = here[0].argmax(0).tolist()
        for number, head in enumerate(heads):
            clean, corrupt = here[:, best[number], number]
            if clean < LOOKS or pattern.sign * wrote[number] < abs(pattern.sign) * WRITES:
                continue
            values = {"attention": clean, "corrupt": corrupt, "direct": wrote[number], "effect": moved[number]}
            row = {
                "head": head,
                "role": pattern.role,
                "from": pattern.query,
                "to": pattern.place(pattern.offsets[best[number]]),
            }
            rows.append(row | {key: float(value) for key, value in values.items()})
    return _feeding(pd.DataFrame(rows), model, problems, chosen, scale)


def _clean(model: LanguageModel, tokens: Tensor, metric: object) -> Tensor:
    with torch.no_grad():
        return metric(model.run(tokens)[0])  # pyright: ignore[reportCallIssue]


def _feeding(
    rows: pd.DataFrame, model: LanguageModel, problems: list, patterns: tuple[Pattern, ...], scale: float
) -> pd.DataFrame:
    """Heads that must feed others keep their role only where their edges to those queries change the metric."""
    feeding = {pattern.role: pattern.feeds for pattern in patterns if pattern.feeds}
    if rows.empty or not feeding:
        return rows
    graph, values, kept = Network.of(model).graph, [], []
    for row in rows.to_dict("records"):
        fed = rows["role"].isin(feeding.get(str(row["role"]), ()))
        receivers = [head for head in dict.fromkeys(rows["head"][fed].tolist()) if head != row["head"]]
        edges = [(row["head"], f"{head}.q") for head in receivers if row["head"] in graph.writers_before(f"{head}.q")]
        value = float(exact_edges(problems, edges).mean.sum()) / scale if edges else float("nan")
        values.append(value)
        kept.append(row["role"] not in feeding or abs(value) >= MOVES)
    return cast(pd.DataFrame, rows.assign(feeds=values)[kept])


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


def role_stage(report: Reproduction, model: LanguageModel, task: Task, circuit: tuple[str, ...]) -> None:
    """Name the heads, with the evidence, and say which of them are in the circuit."""
    table = head_roles(model, task)
    text = (
        f"A head has a role if at least {LOOKS:.0%} of its attention goes where the role says, in the mean over "
        f"{len(task)} prompts, and, where the role is about writing, its direct logit attribution is at least "
        f"{WRITES:.0%} of the metric (s-inhibition: its edges to movers' queries change it by {MOVES:.0%}). "
        "`corrupt` is the attention on corrupt prompts; `direct`, `effect` (the head resampled) and `feeds` are shares "
        "of the clean metric."
    )
    if table.empty:
        report.section("Roles of heads", text + " No head was found in any role.")
        return
    table = table.assign(in_circuit=[head in circuit for head in table["head"]])
    report.section("Roles of heads", text, table)
    for pattern in PATTERNS[report.task]:
        heads = table[table["role"] == pattern.role]["head"].tolist()
        report.add(f"heads found as {pattern.role}", float(len(heads)), note=", ".join(heads) or "none")
