"""Edges of many prompts of several tasks on trial, and how far predictions hold by task and class of edge."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor

from circuitsae.attribution import TopLogits, attribute
from circuitsae.attribution.attribute import ChooseLogits
from circuitsae.interventions import RegimeName
from circuitsae.replacement import ReplacementModel
from circuitsae.validation.budget import PARTS, error_budget
from circuitsae.validation.edges import validate
from circuitsae.validation.result import agreement_frame, by_kind, jsonable
from circuitsae.validation.statistics import Agreement, agreement
from transcoders.errors import InputError
from transcoders.progress import progress_bar

REGIMES: tuple[RegimeName, ...] = ("frozen", "replacement", "model")


@dataclass(frozen=True)
class Survey:
    """Validated edges of many prompts; tables as in `Validation`, with `task` and `prompt`."""

    edges: pd.DataFrame
    controls: pd.DataFrame
    budget: pd.DataFrame
    """The error budget of every edge."""
    frozen_error: float
    logit_error: float
    """The largest of any prompt."""

    @property
    def tasks(self) -> list[str]:
        return [str(task) for task in self.edges["task"].unique()]

    def agreement(self, regime: str = "measured", task: str | None = None, *, bootstrap: int = 200) -> pd.DataFrame:
        """A row per class of edge, of one task or of all: figures, their bootstrap intervals, those of the controls.

        Whole prompts are drawn, for the edges of one prompt are not independent of each other. The controls are
        measured in the model regime only, and stand beside that one.
        """
        random = {}
        if regime == "measured":
            random = {
                name: _agreement(rows, regime, 0) for name, rows in by_kind(self._of(self.controls, task)).items()
            }
        rows = by_kind(self._of(self.edges, task))
        return agreement_frame({name: _agreement(part, regime, bootstrap) for name, part in rows.items()}, random)

    def verdicts(self) -> pd.DataFrame:
        """How many edges of each task got each verdict."""
        names = ["confirmed", "null", "reversed"]
        given = [(task, self._of(self.edges, task)["verdict"].tolist()) for task in self.tasks]
        return pd.DataFrame([{"task": task} | {name: found.count(name) for name in names} for task, found in given])

    def worst(self, count: int = 10) -> pd.DataFrame:
        """The edges that miss most, with their error budgets.

        One edge with the same effects on several prompts, which begin with the same tokens, is named once.
        """
        rows = self.budget.iloc[np.argsort(-self.budget["miss"].abs().to_numpy(), kind="stable")]
        effects = zip(rows["predicted"].round(3), rows["measured"].round(3), strict=True)
        keys = list(zip(rows["source"], rows["target"], effects, strict=True))
        first = [keys.index(key) for key in dict.fromkeys(keys)]
        return rows.iloc[first[:count]].reset_index(drop=True)

    def misses(self) -> pd.DataFrame:
        """By task: the mean |miss| of its edges beside the mean |predicted|, and the mean |part| of the budget."""
        columns = ["predicted", "miss", *PARTS]
        return pd.DataFrame(
            [
                {"task": task} | {name: np.abs(rows[name].to_numpy(float)).mean() for name in columns}
                for task in self.tasks
                for rows in [self._of(self.budget, task)]
            ]
        )

    def to_json(self) -> dict[str, Any]:
        """All tables as JSON values, the controls only summed up."""
        document: dict[str, Any] = {"frozen_error": self.frozen_error, "logit_error": self.logit_error}
        for name in ("edges", "budget"):
            document[name] = getattr(self, name).to_dict("records")
        for regime in ("replacement", "measured"):
            document[f"agreement_{regime}"] = {
                task: self.agreement(regime, task, bootstrap=0).to_dict("records") for task in self.tasks
            }
        return jsonable(document)

    @staticmethod
    def _of(frame: pd.DataFrame, task: str | None) -> pd.DataFrame:
        return frame if task is None else frame.loc[frame["task"] == task]


def survey(
    model: ReplacementModel,
    prompts: Mapping[str, Sequence[str | Tensor]],
    *,
    edges: int = 100,
    controls: int = 10,
    targets: ChooseLogits = TopLogits(),
    nodes: float = 0.8,
    seed: int = 0,
    progress: bool = False,
) -> Survey:
    """Attribute, prune and `validate` every prompt of every task, in all three regimes, with every edge's budget.

    `edges` of largest |weight| of each graph that is pruned to hold `nodes` of the influence; a graph with fewer gives
    all it has. Raises `InputError` where there is no prompt.
    """
    flat = [(task, number, prompt) for task, given in prompts.items() for number, prompt in enumerate(given)]
    if not flat:
        raise InputError("There is no prompt to validate; give at least one.")
    parts: dict[str, list[pd.DataFrame]] = {"edges": [], "controls": [], "budget": []}
    frozen, logit = [], []
    with progress_bar(shown=progress) as bar:
        for task, number, prompt in bar.track(flat, description="validating"):
            graph = attribute(model, prompt, targets=targets).prune(nodes=nodes)
            check = validate(model, graph, edges=edges, regimes=REGIMES, controls=controls, seed=seed + number)
            found = {"edges": check.edges, "controls": check.controls}
            found["budget"] = error_budget(model, graph, check.edges)
            for name, frame in found.items():
                parts[name].append(frame.assign(task=task, prompt=number))
            frozen.append(check.frozen_error)
            logit.append(check.logit_error)
    tables = {name: pd.concat(frames, ignore_index=True) for name, frames in parts.items()}
    return Survey(**tables, frozen_error=float(np.nanmax(frozen)), logit_error=float(np.max(logit)))


def _agreement(rows: pd.DataFrame, regime: str, bootstrap: int) -> Agreement:
    predicted, measured = rows["predicted"].to_numpy(float), rows[regime].to_numpy(float)
    clusters = (rows["task"].astype(str) + rows["prompt"].astype(str)).to_numpy()
    return agreement(predicted, measured, bootstrap=bootstrap, clusters=clusters)
