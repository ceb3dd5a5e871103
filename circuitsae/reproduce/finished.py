"""Stages of a reproduction on disk, until all are done: one that was ended goes on with the next.

A stage is a JSON file with the claims and sections that it added, tables with their types and figures as plotly writes
them; the scores of a circuit, which later stages take, lie beside it. All is told by a hash of what the stages depend
on: task, settings, and the weights of model and dictionaries.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.io
from safetensors.torch import load, save

from circuitsae.components import Edge, Rescored, Scores
from circuitsae.components.network import ComponentGraph
from circuitsae.graph.aggregate import AggregateGraph
from circuitsae.report.circuit_diagram import Arrow, Box, Diagram
from circuitsae.report.circuit_drawing import CircuitPicture
from circuitsae.reproduce.circuit import FoundCircuit
from circuitsae.reproduce.result import Claim, Reproduction, Section
from circuitsae.validation.circuits import Circuit
from transcoders.files import short_hash, write_file


class Finished:
    """The stages of one task that are done, in a folder."""

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self.folder = folder / f"{identity['task']}-{short_hash([json.dumps(identity, sort_keys=True)])}"

    def save(self, stage: str, report: Reproduction, before: tuple[int, int], found: FoundCircuit | None) -> None:
        """Keep what a stage added to a report that had so many claims and sections, and the circuit that it found."""
        record: dict[str, Any] = {
            "claims": [asdict(claim) for claim in report.claims[before[0] :]],
            "sections": [_section(section) for section in report.sections[before[1] :]],
            "seconds": report.seconds[stage],
            "graph": None if report.graph is None else _aggregate(report.graph),
            "picture": None if report.picture is None else asdict(report.picture),
            "circuit": None,
            "nodes": None if report.nodes is None else report.nodes.ids,
        }
        if found is not None:
            record["circuit"] = self._save_circuit(stage, found)
        write_file(self._place(stage, "json"), json.dumps(record, default=lambda value: value.item()))

    def restore(self, stage: str, report: Reproduction, graph: ComponentGraph) -> tuple[bool, FoundCircuit | None]:
        """Whether a stage was done, and then the circuit that it found; what it added is added to the report."""
        try:
            record = json.loads(self._place(stage, "json").read_text(encoding="utf-8"))
            claims = [Claim(**claim) for claim in record["claims"]]
            sections = [_read_section(section) for section in record["sections"]]
            found = None if record["circuit"] is None else self._read_circuit(stage, record["circuit"], graph)
            seconds, whole = float(record["seconds"]), record["graph"]
            picture = None if record["picture"] is None else _read_picture(record["picture"])
            aggregate = None if whole is None else _read_aggregate(whole)
            nodes = None if record["nodes"] is None else Circuit.of(record["nodes"])
        except (OSError, ValueError, KeyError, TypeError):  # not done, or cut off
            return False, None
        report.claims += claims
        report.sections += sections
        report.seconds[stage] = seconds
        report.graph = aggregate if aggregate is not None else report.graph
        report.nodes = nodes if nodes is not None else report.nodes
        report.picture = picture if picture is not None else report.picture
        return True, found

    def _place(self, stage: str, suffix: str) -> Path:
        return self.folder / f"{stage.replace(' ', '-')}.{suffix}"

    def _save_circuit(self, stage: str, found: FoundCircuit) -> dict[str, Any]:
        scored = found.scored
        tensors = {"scores": scored.scores.values.contiguous(), "cheap": scored.cheap.values.contiguous()}
        write_file(self._place(stage, "safetensors"), save(tensors))
        return {
            "circuit": sorted(found.circuit), "patched": sorted(scored.patched), "vanished": scored.vanished,
            "scores": _scores(scored.scores), "cheap": _scores(scored.cheap),
        }  # fmt: skip

    def _read_circuit(self, stage: str, record: Mapping[str, Any], graph: ComponentGraph) -> FoundCircuit:
        tensors = load(self._place(stage, "safetensors").read_bytes())
        scores, cheap = (_read_scores(record[name], tensors[name]) for name in ("scores", "cheap"))
        rescored = Rescored(scores, cheap, _edges(record["patched"]), int(record["vanished"]))
        return FoundCircuit(_edges(record["circuit"]), rescored, graph)


def _edges(pairs: list[list[str]]) -> frozenset[Edge]:
    return frozenset(Edge(*pair) for pair in pairs)


def _scores(scores: Scores) -> dict[str, Any]:
    return {"items": scores.items, "method": scores.method, "spans": scores.spans, "patches": scores.patches}


def _read_scores(record: Mapping[str, Any], values: Any) -> Scores:
    items = tuple(item if isinstance(item, str) else Edge(*item) for item in record["items"])
    return Scores(items, values, record["method"], tuple(record["spans"]), record["patches"])


def _section(section: Section) -> dict[str, Any]:
    return {
        "title": section.title,
        "text": section.text,
        "table": None if section.table is None else _table(section.table),
        "figure": None if section.figure is None else section.figure.to_json(),
    }


def _read_section(record: Mapping[str, Any]) -> Section:
    table = None if record["table"] is None else _read_table(record["table"])
    figure = None if record["figure"] is None else plotly.io.from_json(record["figure"])
    return Section(record["title"], record["text"], table, figure)  # pyright: ignore[reportArgumentType]


def _read_picture(record: Mapping[str, Any]) -> CircuitPicture:
    diagram = record["diagram"]
    boxes, arrows = ([kind(**each) for each in diagram[name]] for kind, name in ((Box, "boxes"), (Arrow, "arrows")))
    made = {**diagram, "boxes": tuple(boxes), "arrows": tuple(arrows), "sentences": tuple(diagram["sentences"])}
    return CircuitPicture(Diagram(**made), record["columns"])


def _table(frame: pd.DataFrame) -> dict[str, Any]:
    return {
        "columns": frame.columns.tolist(),
        "types": [str(dtype) for dtype in frame.dtypes],
        "cells": [frame.iloc[:, i].tolist() for i in range(frame.shape[1])],
        "index": frame.index.tolist(),
    }


def _read_table(record: Mapping[str, Any]) -> pd.DataFrame:
    index = pd.Index(record["index"])
    columns = [
        pd.Series(cells, index=index, dtype=dtype)
        for cells, dtype in zip(record["cells"], record["types"], strict=True)
    ]
    made = pd.concat(columns, axis=1) if columns else pd.DataFrame(index=index)
    return made.set_axis(record["columns"], axis=1)


def _aggregate(graph: AggregateGraph) -> dict[str, Any]:
    own = {name: getattr(graph, name) for name in ("places", "n_layers", "n_prompts", "scores", "provenance")}
    return own | {"nodes": _table(graph.nodes), "edges": _table(graph.edges)}


def _read_aggregate(record: Mapping[str, Any]) -> AggregateGraph:
    frames = {name: _read_table(record[name]) for name in ("nodes", "edges")}
    return AggregateGraph(**{**record, **frames, "places": tuple(record["places"])})
