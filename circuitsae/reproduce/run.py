"""All stages of one task, in order.

Behaviour, with the figures that papers print for GPT-2 small.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from signal import SIGINT

import pandas as pd

from circuitsae.components.network import Network
from circuitsae.replacement import ReplacementModel
from circuitsae.reproduce.circuit import (
    FoundCircuit,
    component_stage,
    is_gpt2_small,
    known_stage,
    published_faithfulness,
    stability_stage,
)
from circuitsae.reproduce.cross_layer import cross_layer_audit
from circuitsae.reproduce.features import feature_stage
from circuitsae.reproduce.finished import Finished
from circuitsae.reproduce.result import Reproduction, Settings, Step, silent
from circuitsae.reproduce.role_picture import picture_stage
from circuitsae.reproduce.role_stage import role_stage
from circuitsae.tasks import Task, behaviour, known_examples
from transcoders.dictionaries import DictionarySet
from transcoders.dictionaries.fingerprint import dictionary_fingerprint
from transcoders.dictionaries.provenance import reading_as_trained
from transcoders.errors import InputError, Stopped
from transcoders.language_model import LanguageModel


@dataclass(frozen=True)
class Published:
    """A figure of GPT-2 small on clean prompts."""

    value: float
    source: str


_WANG = "Wang et al. 2022, arXiv:2211.00593, section 2"
_HANNA = "Hanna et al. 2023, arXiv:2305.00586, section 2"
GPT2_SMALL: dict[tuple[str, str], Published] = {
    ("ioi", "logit_diff"): Published(3.56, _WANG),
    ("ioi", "accuracy"): Published(0.993, _WANG),
    ("greater-than", "prob_diff"): Published(0.817, _HANNA),
    ("greater-than", "sharpness"): Published(0.059, _HANNA),
}
"""By task and measure."""


def behaviour_stage(report: Reproduction, model: LanguageModel, task: Task, *, gpt2_small: bool) -> pd.DataFrame:
    """What the model does on clean and corrupt prompts; published figures beside it where they are this model's."""
    table = behaviour(model, task)
    for row in table.to_dict("records"):
        printed = GPT2_SMALL.get((report.task, str(row["measure"]))) if gpt2_small else None
        report.add(
            f"{row['measure']} on clean prompts",
            float(row["clean"]),
            published=printed.value if printed else None,
            source=printed.source if printed else "",
            note=f"± {row['clean_se']:.3f}; corrupt {row['corrupt']:.3f}; {row['n']} prompts",
        )
    refused = f" Left out, for the tokenizer splits them: {', '.join(task.refused[:8])}." if task.refused else ""
    report.section("Behaviour", f"Means over {len(task)} prompts, with standard errors.{refused}", table)
    return table


TASKS = ("ioi", "greater-than", "induction", "two-hop", "agreement")


def reproduce(
    task: str,
    model: LanguageModel,
    dictionaries: DictionarySet | None = None,
    *,
    settings: Settings = Settings(),
    audit_with: Mapping[str, DictionarySet] | None = None,
    progress: Step = silent,
    keep: str | Path | None = None,
) -> Reproduction:
    """Behaviour, the circuit of heads and MLPs, the roles of heads, the feature circuit, and published figures.

    Without `dictionaries` the feature stages are left out, and the report says so. `audit_with` holds several sets of
    transcoders, by name, for the cross-layer audit of two-hop. `progress` is told each stage, and each step of the long
    ones, as it begins. `keep`: a folder for the stages that are done; called again after it was ended, with the same
    settings, it takes what is there and comes to the same report. It is yours to remove.
    Raises `InputError` for a task that cannot be reproduced, and on Ctrl-C, with `keep`, `Stopped`.
    """
    if task not in TASKS:
        raise InputError(f"{task!r} cannot be reproduced; choose one of {', '.join(TASKS)}.")
    report = Reproduction(task, model.name, asdict(settings))
    if dictionaries is not None:
        model = reading_as_trained(model, dictionaries.provenance)
    kept = None
    if keep is not None:
        sets = [] if dictionaries is None else [dictionaries, *(audit_with or {}).values()]
        identity = {"task": task, "model": model.fingerprint(), "settings": asdict(settings), "bos": model.adds_bos}
        identity |= {"dtype": str(model.dtype), "dictionaries": [dictionary_fingerprint(each) for each in sets]}
        kept = Finished(Path(keep), identity)
    stages = _Stages(report, model, progress, kept)
    small, held_out = is_gpt2_small(model), slice(settings.held_out)
    drawn = replace(settings, known=False).prompts(task, model, settings.behaviour, 1)
    prompts = known_examples(model, drawn) if settings.known else drawn

    def behaves(step: Step) -> None:
        behaviour_stage(report, model, drawn, gpt2_small=small)
        if settings.known:
            report.section("Prompts", f"What follows is of prompts that the model gets right: here {prompts.known}.")

    stages.run("behaviour", behaves)
    found = stages.run("heads and MLPs", lambda step: component_stage(report, model, settings, step))
    assert found is not None
    report.edges = found.circuit
    few = prompts.take(held_out)

    def in_roles(step: Step) -> None:
        named = role_stage(report, model, few, found.nodes, gpt2_small=small, progress=step)
        step("the circuit by roles")
        picture_stage(report, model, few, named)

    stages.run("roles of heads", in_roles)
    stages.run("stability", lambda step: stability_stage(report, model, found, settings, step))
    if small:
        stages.run("published circuits", lambda step: _published(report, model, found, few))
    if dictionaries is None:
        report.add("faithfulness of the feature circuit", None, note="no dictionaries were given for this model")
        return report
    stages.run("features", lambda step: feature_stage(report, ReplacementModel(model, dictionaries), settings))
    if task == "two-hop" and audit_with:
        sets = {name: ReplacementModel(model, given) for name, given in audit_with.items()}
        stages.run("cross-layer audit", lambda step: _audit(report, sets, settings))
    return report


@dataclass(frozen=True)
class _Stages:
    """One stage after the other, each done once: what is kept of it is taken from there."""

    report: Reproduction
    model: LanguageModel
    progress: Step
    kept: Finished | None

    def run(self, name: str, work: Callable[[Step], FoundCircuit | None]) -> FoundCircuit | None:
        report, said = self.report, f"{self.report.task}: {name}"
        if self.kept is not None:
            done, found = self.kept.restore(name, report, Network.of(self.model).graph)
            if done:
                self.progress(f"{said}: done before")
                return found
        self.progress(said)
        start, before = time.perf_counter(), (len(report.claims), len(report.sections))
        try:
            found = work(lambda step: self.progress(f"{said}: {step}"))
        except KeyboardInterrupt as stopped:
            if self.kept is None:
                raise
            raise Stopped(
                f"Stopped in {said}; the stages before are kept, and the same command goes on.", SIGINT
            ) from (stopped)
        report.seconds[name] = round(time.perf_counter() - start, 1)
        if self.kept is not None:
            self.kept.save(name, report, before, found)
        return found


def _published(report: Reproduction, model: LanguageModel, found: FoundCircuit, task: Task) -> None:
    known_stage(report, model, found)
    published_faithfulness(report, model, task)


def _audit(report: Reproduction, models: Mapping[str, ReplacementModel], settings: Settings) -> None:
    table = cross_layer_audit(models, n=settings.audit, seed=settings.seed)
    names = list(models)
    values = table.set_index("figure")
    for figure in ("mean edges from the answer to the city", "swapped: other capital"):
        if figure in values.index:
            pair = [float(values.loc[figure, name]) for name in names]  # pyright: ignore[reportArgumentType]
            said = ", ".join(f"{name} {value:.2f}" for name, value in zip(names, pair, strict=True))
            report.add(f"cross-layer audit: {figure}, largest difference", max(pair) - min(pair), note=said)
    report.section(
        "Cross-layer audit",
        f"The same {settings.audit} prompts traced with each set of dictionaries. Walks go from the answer to its "
        "sources, each with its share of the target's absolute input; the state's features were found on one-hop "
        "sentences about its other cities, and are suppressed (0), inverted (−0.75) and swapped for another state's "
        "in the real model.",
        table,
    )
