"""Runs of the model that a page asked for: one at a time, in a thread of their own, with what they are at."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import pandas as pd

from circuitsae.graph import AttributionGraph
from circuitsae.graph.totals import explained_rows, foreseen
from circuitsae.interventions import Outcome, Recording, RegimeName, intervene
from circuitsae.interventions.prompts import Library
from circuitsae.replacement import ReplacementModel
from circuitsae.report.claims import tests_data, with_validation
from circuitsae.report.text import visible
from circuitsae.serving.asked import Change, Test
from circuitsae.validation import validate
from circuitsae.validation.measuring import Targets, reading_like, require_active, traced
from circuitsae.validation.result import jsonable
from transcoders.errors import CircuitsaeError, InputError

MOST_KEPT = 50
"""Runs whose results can still be asked for."""
TOP = 5
"""Tokens of an outcome, before or after."""

State = Literal["running", "done", "failed", "cancelled"]


class BusyError(InputError):
    """Another run is under way."""


class _CancelledError(Exception):
    pass


@dataclass
class Run:
    """One run: what it is at, and what came of it."""

    number: int
    step: str = "begins"
    state: State = "running"
    result: dict[str, Any] | None = None
    error: str = ""
    cancelled: threading.Event = field(default_factory=threading.Event)

    def at(self, step: str) -> None:
        """Say what comes next; raises where the run was cancelled."""
        if self.cancelled.is_set():
            raise _CancelledError
        self.step = step

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("number", "step", "state", "result", "error")}


class Runs:
    """The model of a graph, loaded when the first run needs it, and the runs that were asked of it."""

    def __init__(self, graph: AttributionGraph, load: Callable[[], ReplacementModel]) -> None:
        self.graph = graph
        self._load, self._lock, self._runs = load, threading.Lock(), dict[int, Run]()
        self._library: Library | None = None
        self._prompt: Recording | None = None

    def start(self, asked: Change | Test) -> Run:
        """Begin a run. Raises `BusyError` while there is another."""
        if not self._lock.acquire(blocking=False):
            raise BusyError("Another run is under way, and the model makes one at a time; wait for it, or cancel it.")
        run = Run(max(self._runs, default=0) + 1)
        self._runs[run.number] = run
        for old in list(self._runs)[:-MOST_KEPT]:
            del self._runs[old]
        threading.Thread(target=self._work, args=(run, asked), daemon=True).start()
        return run

    def __getitem__(self, number: int) -> Run:
        """A run by its number. Raises `InputError` where there is none."""
        if number not in self._runs:
            raise InputError(f"There is no run {number}; the last {MOST_KEPT} are kept while the server runs.")
        return self._runs[number]

    def _work(self, run: Run, asked: Change | Test) -> None:
        state: State = "failed"
        try:
            run.result = self._change(run, asked) if isinstance(asked, Change) else self._test(run, asked)
            run.at("done")
            state = "done"
        except _CancelledError:
            run.result, state = None, "cancelled"
        except CircuitsaeError as error:
            run.error = str(error)
        except Exception as error:  # whatever the model does: the page says it, and the server goes on
            run.error = f"The run ended with {type(error).__name__}: {str(error)[:500]}"
        finally:
            self._lock.release()
            run.state = state  # last, so that whoever reads it may begin another

    def _ready(self, run: Run) -> tuple[Library, Recording]:
        if self._library is None or self._prompt is None:
            run.at("loading the model")
            model = self._load()
            run.at("reading the prompt")
            trace = traced(model, self.graph)
            require_active(trace, self.graph.nodes)
            self._library, self._prompt = Library(reading_like(model, self.graph)), Recording(model, trace)
        return self._library, self._prompt

    def _change(self, run: Run, asked: Change) -> dict[str, Any]:
        library, prompt = self._ready(run)
        rows, nodes = explained_rows(self.graph.nodes_frame()), self.graph.nodes
        targets = Targets(prompt.model, prompt.trace, [nodes[row] for row in rows])
        run.at("running the prompt with the change")
        outcome = self._outcome(library, prompt, asked, "model")
        columns = {"measured": _moved(outcome, targets)}
        if not self.graph.derivatives and not prompt.model.spliced:
            run.at("once more, with attention and norms held")
            columns["held"] = _moved(self._outcome(library, prompt, asked, "graph"), targets)
        doses = asked.doses(self.graph, library, prompt)
        if doses is not None:
            columns["foreseen"] = foreseen(self.graph.nodes_frame(), self.graph.edges_frame(), rows, doses).tolist()
        found = pd.DataFrame({"node": [nodes[row].id for row in rows], **columns})
        return jsonable(
            {
                "changed": [node.id for node in asked.nodes],
                "operation": asked.operation,
                "value": asked.value,
                "targets": found.to_dict("records"),
                "top": [{**row, "text": visible(str(row["text"]))} for row in outcome.top(TOP).to_dict("records")],
                "kl": float(outcome.kl()[0, 0, -1]),
            }
        )

    def _outcome(self, library: Library, prompt: Recording, asked: Change, regime: RegimeName) -> Outcome:
        return intervene(library.model, prompt.trace, asked.interventions(), regime=regime)

    def _test(self, run: Run, asked: Test) -> dict[str, Any]:
        _, prompt = self._ready(run)
        run.at("testing the edge")
        made = 0

        def advance(count: int) -> None:
            nonlocal made
            made += count
            run.at(f"testing the edge: {made:,} runs made")

        check = validate(prompt.model, self.graph, edges=[asked.edge], advance=advance)
        self.graph = self.graph.annotate(_with_rows(self.graph.edge_notes, check.annotate(self.graph).edge_notes))
        return jsonable(
            {
                "edge": [asked.source.id, asked.target.id],
                "tests": tests_data(with_validation(self.graph.edges_frame(), check)),
                "runs": made,
            }
        )


def _moved(outcome: Outcome, targets: Targets) -> list[float]:
    """By how much each target moved: what the graph's numbers are of."""
    after = outcome.changed_reads
    assert after is not None
    return (targets.read(after.by_layer[0], after.final[0]) - targets.clean)[0].tolist()


def _with_rows(old: pd.DataFrame | None, new: pd.DataFrame | None) -> pd.DataFrame:
    """Notes on edges with some rows anew."""
    assert new is not None
    if old is None or old.empty:
        return new
    return pd.concat([old, new], ignore_index=True).drop_duplicates(["source", "target"], keep="last")
