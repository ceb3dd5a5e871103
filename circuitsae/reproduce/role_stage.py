"""The stage of roles: heads named with their evidence, beside those that a paper names in GPT-2 small.

Of greater-than also the MLPs that raise the answers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from circuitsae.components import direct_logit_attribution, exact_nodes, known_circuit, problems_of
from circuitsae.components.network import Network
from circuitsae.reproduce.copying import TOP
from circuitsae.reproduce.result import Reproduction, Step, silent
from circuitsae.reproduce.roles import COPIES, LOOKS, MOVES, PATTERNS, WRITES, head_roles, mean_metric
from circuitsae.tasks import Task
from transcoders.language_model import LanguageModel

MLP_ROLES = {"greater-than": "raises larger years"}
"""By task: the role of an MLP that writes the answers (Hanna et al. 2023, section 3)."""


@dataclass(frozen=True)
class PublishedRoles:
    """A paper's classes of components, by the roles that they have here."""

    circuit: str
    classes: dict[str, str] = field(default_factory=dict)
    """Class of the paper by role, where the two differ."""

    def row(self, role: str) -> dict[str, Any]:
        """What the paper says of a role; nothing where it does not name it."""
        known = known_circuit(self.circuit)
        name = self.classes.get(role, role)
        if name not in known.classes:
            return {}
        heads = known.classes[name]
        strengths = {f"their {what}": value for what, value in known.strengths.get(name, {}).items()}
        source = ", ".join(filter(None, (known.source.split(",")[0], known.sections.get(name))))
        return {"GPT-2 small": len(heads), "theirs": ", ".join(heads), **strengths, "source": source}


PUBLISHED = {
    "ioi": PublishedRoles("ioi-wang2022"),
    "greater-than": PublishedRoles(
        "greater-than-hanna2023", {"year reader": "heads at END", "raises larger years": "MLPs at END"}
    ),
}


def role_stage(
    report: Reproduction,
    model: LanguageModel,
    task: Task,
    circuit: tuple[str, ...],
    *,
    gpt2_small: bool = False,
    progress: Step = silent,
) -> list[dict[Any, Any]]:
    """Name the heads, with the evidence, say which are in the circuit, and put what a paper found beside them.

    Returns a record per component and role.
    """
    table = head_roles(model, task, progress=progress)
    text = _criteria(report.task, len(task))
    if table.empty:
        report.section("Roles of heads", text + " No head was found in any role.")
    else:
        table = table.assign(in_circuit=[head in circuit for head in table["head"]])
        report.section("Roles of heads", text, table)
    roles = [pattern.role for pattern in PATTERNS[report.task]]
    if report.task in MLP_ROLES:
        progress("MLPs")
        mlps = mlps_that_write(model, task)
        report.section("MLPs that write the answer", _mlp_criteria(len(task)), mlps)
        roles.append(MLP_ROLES[report.task])
        table = pd.concat([table, mlps.rename(columns={"mlp": "head"}).assign(role=roles[-1])])
    records = table.to_dict("records")
    beside = beside_published(report.task, roles, records)
    for row in beside.to_dict("records"):
        _claim(report, row, gpt2_small=gpt2_small)
    if report.task in PUBLISHED:
        source = known_circuit(PUBLISHED[report.task].circuit).source
        text = (
            f"`that matter`: resampled, they change the metric by at least {MOVES:.0%}. GPT-2 small's after {source}."
        )
        report.section("Roles beside GPT-2 small's", text, beside)
    return records


def _claim(report: Reproduction, row: Mapping[Any, Any], *, gpt2_small: bool) -> None:
    """How many have a role; the published number, and which of the published are among them, for their own model."""
    what = "MLPs of the role" if row["role"] in MLP_ROLES.values() else "heads found as"
    name, note = f"{what} {row['role']}", row["which"] or "none"
    theirs = row.get("theirs")
    if not gpt2_small or not isinstance(theirs, str):
        report.add(name, float(row["found"]), note=note)
        return
    same = set(row["which"].split(", ")) & set(theirs.split(", "))
    report.add(name, float(row["found"]), published=float(row["GPT-2 small"]), source=row["source"],
               note=f"{note}; {len(same)} of those published")  # fmt: skip


def mlps_that_write(model: LanguageModel, task: Task) -> pd.DataFrame:
    """The MLPs that raise the answers over the wrong ones: a row each, `mlp`, `direct`, `effect`.

    `direct`: direct attribution to mean logit(answers) − mean logit(wrong), at least `WRITES` of its mean;
    `effect`: the change of the task's own metric when the MLP is ablated, as a share of its mean.
    """
    problems = problems_of(model, task, metric="logit_diff")
    mlps = [name for name in Network.of(model).graph.writers if name.startswith("m")]
    direct = direct_logit_attribution(problems).only(mlps).mean.double() / abs(mean_metric(model, problems))
    chosen = [(name, share) for name, share in zip(mlps, direct.tolist(), strict=True) if share >= WRITES]
    if not chosen:
        return pd.DataFrame(columns=["mlp", "direct", "effect"])
    own = problems_of(model, task)
    effect, scale = exact_nodes(own, [name for name, _ in chosen]), abs(mean_metric(model, own))
    return pd.DataFrame([{"mlp": name, "direct": share, "effect": effect.of(name) / scale} for name, share in chosen])


def beside_published(task: str, roles: Sequence[str], found: Sequence[Mapping[Any, Any]]) -> pd.DataFrame:
    """A row per role: what was found (how many, which, mean attention and copy score), and GPT-2 small's, as printed.

    `found` has a mapping per head (or MLP) and role; `that matter` counts those with an effect of `MOVES`: papers
    look for heads by their effect first. `theirs` are the published ones, `their attention` and
    `their copies` the strengths where the paper prints them.
    """
    published = PUBLISHED.get(task)
    rows = []
    for role in roles:
        here = [one for one in found if one["role"] == role]
        matter = sum(abs(one.get("effect", 0.0)) >= MOVES for one in here)
        row = {"role": role, "found": len(here), "that matter": matter, "which": ", ".join(one["head"] for one in here)}
        for name in ("attention", "copies"):
            values = [one[name] for one in here if name in one and one[name] == one[name]]
            row |= {name: sum(values) / len(values)} if values else {}
        rows.append(row | ({} if published is None else published.row(role)))
    return pd.DataFrame(rows)


def _criteria(task: str, prompts: int) -> str:
    """What a head must do for a role, and what the columns are."""
    said = (
        f"A head has a role if at least {LOOKS:.0%} of its attention goes where the role says, in the mean over "
        f"{prompts} prompts, and, where the role is about writing, its direct logit attribution is at least "
        f"{WRITES:.0%} of the metric. `corrupt` is the attention on corrupt prompts; `direct` and `effect` (the head "
        f"resampled) are shares of the clean metric; `copies` is the share of names, or words, that the head puts "
        f"among the top {TOP} tokens when it attends to them alone."
    )
    if task != "ioi":
        return said
    return said + (
        f" A name mover has a copy score of at least {COPIES:.0%}; a negative one, and a suppressor of the subject, "
        "has it with −OV, and that is the score shown. An s-inhibition head's edges to the movers' queries change the "
        f"metric by at least {MOVES:.0%} (`feeds`); `moves` is what patching its paths to the name movers' queries "
        "changes in their attention to IO, less that to S1 and S2. A backup writes less than "
        f"{WRITES:.0%} until the movers are resampled, and at least that, and so much more, after it (`knocked_out`, "
        "its `direct` then)."
    )


def _mlp_criteria(prompts: int) -> str:
    return (
        f"MLPs whose direct attribution to mean logit(answers) − mean logit(wrong) is at least {WRITES:.0%} of it, in "
        f"the mean over {prompts} prompts; `effect` is the change of the task's metric when the MLP is resampled, as a "
        "share of it."
    )
