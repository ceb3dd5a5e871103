"""Edges on trial: remove the source, see what happens to the target.

The prediction of an edge is −A[t, s]; a measurement is the target's pre-activation (a logit: its centred logit) after
the source's contribution was taken out of the stream, minus before. The control of an edge is the same with the
source's contribution replaced by others of the same size at the same places (`random_change`).
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from rich.progress import Progress

from circuitsae.attribution.targets import Readers, feature_readers, logit_readers
from circuitsae.frozen import Reads
from circuitsae.graph import AttributionGraph, Node, NodeKind
from circuitsae.graph.files import write_atomically
from circuitsae.interventions import Change, RegimeName, node_change, random_change, reads_after
from circuitsae.replacement import ReplacementModel, Trace
from circuitsae.validation.statistics import Agreement, agreement
from transcoders.errors import InputError

CONTROL_QUANTILE = 0.95
_SOURCES_AT_ONCE = 32


@dataclass(frozen=True)
class Validation:
    """Predicted and measured effects of edges.

    `edges` has a row per edge: `source`, `target`, `kind` (class of edge, "feature→logit"), `weight`, `predicted`, a
    column per regime (`frozen`, `replacement`, `measured` for the model regime), `control` (95th percentile of the
    random controls' absolute effects in the model regime), `verdict`.

    verdict: `confirmed` if the sign is as predicted and |measured| > control; `reversed` if the sign is the opposite
    and |measured| > control; `null` otherwise.
    """

    edges: pd.DataFrame
    controls: pd.DataFrame
    """Every control: `source`, `target`, `kind`, `predicted` (of the edge it stands in for), `measured`."""
    frozen_error: float
    """Largest |frozen − predicted| over the largest |predicted|; rounding, or this code is wrong."""
    logit_error: float
    """The same of the replacement model's logits, with its error nodes, and the model's own (`logit_error`)."""

    def verdicts(self) -> dict[str, int]:
        """How many edges got each verdict."""
        given = self.edges["verdict"].tolist() if "verdict" in self.edges else []
        return {name: given.count(name) for name in ("confirmed", "null", "reversed")}

    def agreement(self, regime: str = "measured") -> dict[str, Agreement]:
        """Agreement with the prediction for all edges and by class of edge; `random` is that of the controls."""
        table = {"all": _agreement(self.edges, regime)}
        table |= {str(kind): _agreement(rows, regime) for kind, rows in self.edges.groupby("kind")}
        if regime == "measured" and len(self.controls):
            table["random"] = _agreement(self.controls, regime)
        return table

    def annotate(self, graph: AttributionGraph) -> AttributionGraph:
        """The graph with these columns on its edges."""
        return graph.annotate(self.edges.drop(columns=["kind", "weight"]))

    def save(self, path: str | Path) -> Path:
        """Write tables and summary as JSON."""
        document = {
            "verdicts": self.verdicts(),
            "frozen_error": self.frozen_error,
            "logit_error": self.logit_error,
            "agreement": {name: asdict(value) for name, value in self.agreement().items()},
            "edges": self.edges.to_dict("records"),
        }
        text = json.dumps(_jsonable(document), ensure_ascii=False, indent=1, allow_nan=False)
        write_atomically(Path(path), text.encode())
        return Path(path)


def _agreement(rows: pd.DataFrame, regime: str) -> Agreement:
    return agreement(rows["predicted"].to_numpy(float), rows[regime].to_numpy(float))


def _jsonable(value: object) -> object:
    if isinstance(value, dict):
        return {key: _jsonable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_jsonable(item) for item in value]
    return None if isinstance(value, float) and np.isnan(value) else value


def validate(
    model: ReplacementModel,
    graph: AttributionGraph,
    *,
    edges: int = 100,
    regimes: Sequence[RegimeName] = ("frozen", "model"),
    controls: int = 20,
    seed: int = 0,
    progress: bool = False,
) -> Validation:
    """Ablate the sources of the graph's strongest edges and measure their targets.

    `edges` of features, errors and tokens are taken in order of |weight|; each is held against `controls` random
    stand-ins in the model regime. Raises `InputError` where the graph was made with another model.
    """
    made_with = graph.provenance.get("fingerprint")
    if made_with is not None and made_with != model.model.fingerprint():
        raise InputError(
            f"The graph was made with {graph.provenance.get('model')} ({made_with}), not with {model.model.name} "
            f"({model.model.fingerprint()}); validate it with the model it was made with."
        )
    trace = model.trace(torch.tensor(graph.token_ids))
    chosen = _strongest(graph, edges)
    readers = _Readers(model, trace, graph, chosen)
    rng = torch.Generator().manual_seed(seed)
    columns: dict[RegimeName, np.ndarray] = {regime: np.zeros(len(chosen)) for regime in regimes}
    effects = np.full((len(chosen), controls), np.nan)
    by_source = list(chosen.groupby("s", sort=False))
    with Progress(disable=not progress, transient=True) as bar:
        task = bar.add_task("validating", total=len(by_source))
        for start in range(0, len(by_source), _SOURCES_AT_ONCE):
            part = by_source[start : start + _SOURCES_AT_ONCE]
            sources = [graph.nodes[int(s)] for s, _ in part]  # pyright: ignore[reportArgumentType]
            removed = [-1.0 * node_change(model, trace, node) for node in sources]
            for regime in regimes:
                for (_, rows), reads in zip(part, reads_after(model, trace, removed, regime), strict=True):
                    columns[regime][rows.index] = readers.effects(rows, reads)
            if "model" in regimes:
                _run_controls(model, trace, sources, part, readers, controls, rng, effects)
            bar.advance(task, len(part))
    return _table(graph, chosen, columns, effects, model.logit_error(trace))


def _strongest(graph: AttributionGraph, count: int) -> pd.DataFrame:
    """The `count` edges of largest |weight| whose source can be ablated: node rows `s`, `t`, and `weight`."""
    if count < 1:
        raise InputError(f"edges={count} leaves nothing to validate; give at least 1.")
    kinds = [NodeKind.FEATURE, NodeKind.TOKEN]
    # An error node that absorbed features (max_features) is more than the trace's error vector.
    if graph.provenance.get("settings", {}).get("max_features") is None:
        kinds.append(NodeKind.ERROR)
    coo = graph.weights.tocoo()
    usable = graph.mask(*kinds)[coo.col]
    s, t, weight = coo.col[usable], coo.row[usable], coo.data[usable]
    order = np.argsort(-np.abs(weight), kind="stable")[:count]
    return pd.DataFrame({"s": s[order], "t": t[order], "weight": weight[order]})


class _Readers:
    """The target vectors of the chosen edges, and their clean values."""

    def __init__(self, model: ReplacementModel, trace: Trace, graph: AttributionGraph, chosen: pd.DataFrame) -> None:
        self.trace = trace
        self.target: dict[int, tuple[int, int, torch.Tensor]] = {}
        targets = chosen["t"].unique().tolist()
        features = [t for t in targets if graph.nodes[t].kind is NodeKind.FEATURE]
        logits = [t for t in targets if graph.nodes[t].kind is NodeKind.LOGIT]
        row_of = {tuple(index): row for row, index in enumerate(trace.features.index.tolist())}
        if missing := [graph.nodes[t].id for t in features if _key(graph.nodes[t]) not in row_of]:
            raise InputError(f"Features {missing[:3]} of the graph are not active in these dictionaries; load its own.")
        rows = torch.tensor([row_of[_key(graph.nodes[t])] for t in features], dtype=torch.long)
        self._store(features, feature_readers(model, trace, rows))
        self._store(
            logits, logit_readers(trace, torch.tensor([graph.nodes[t].index for t in logits], dtype=torch.long))
        )

    def _store(self, targets: list[int], readers: Readers) -> None:
        for target, layer, pos, vector in zip(targets, readers.layer, readers.pos, readers.vector, strict=True):
            self.target[target] = (int(layer), int(pos), vector)

    def effects(self, rows: pd.DataFrame, reads: Reads) -> list[float]:
        """Change of each row's target from the clean run to `reads`."""
        return [self._value(t, reads) - self._value(t, self.trace.frozen.reads) for t in rows["t"]]

    def _value(self, target: int, reads: Reads) -> float:
        layer, pos, vector = self.target[target]
        read = reads.final if layer == len(reads.mlp_in) else reads.mlp_in[layer]
        return float(read[pos] @ vector)


def _key(node: Node) -> tuple[int, int, int]:
    return node.layer, node.pos, node.index


def _run_controls(
    model: ReplacementModel,
    trace: Trace,
    sources: list[Node],
    part: list,
    readers: _Readers,
    controls: int,
    rng: torch.Generator,
    effects: np.ndarray,
) -> None:
    changes: list[Change] = [-1.0 * random_change(model, trace, node, rng) for node in sources for _ in range(controls)]
    reads = reads_after(model, trace, changes, "model")
    for number, (_, rows) in enumerate(part):
        for control in range(controls):
            effects[rows.index, control] = readers.effects(rows, reads[number * controls + control])


def _table(
    graph: AttributionGraph,
    chosen: pd.DataFrame,
    columns: dict[RegimeName, np.ndarray],
    effects: np.ndarray,
    logit_error: float,
) -> Validation:
    source = [graph.nodes[s] for s in chosen["s"]]
    target = [graph.nodes[t] for t in chosen["t"]]
    frame = pd.DataFrame(
        {
            "source": [n.id for n in source],
            "target": [n.id for n in target],
            "kind": [f"{s.kind}→{t.kind}" for s, t in zip(source, target, strict=True)],
            "weight": chosen["weight"],
            "predicted": -chosen["weight"],
        }
    )
    for regime, values in columns.items():
        frame["measured" if regime == "model" else regime] = values
    controls = pd.DataFrame(columns=["source", "target", "kind", "predicted", "measured"])
    if "measured" in frame and effects.shape[1]:
        frame["control"] = np.quantile(np.abs(effects), CONTROL_QUANTILE, axis=1)
        frame["verdict"] = _verdicts(frame)
        repeated = frame.loc[frame.index.repeat(effects.shape[1]), ["source", "target", "kind", "predicted"]]
        controls = repeated.assign(measured=effects.ravel()).reset_index(drop=True)
    error = np.nan
    if "frozen" in frame and len(frame):
        error = float(np.abs(frame["frozen"] - frame["predicted"]).max() / np.abs(frame["predicted"]).max())
    return Validation(frame, controls, error, logit_error)


def _verdicts(frame: pd.DataFrame) -> np.ndarray:
    exceeds = frame["measured"].abs() > frame["control"]
    agrees = np.sign(frame["measured"]) == np.sign(frame["predicted"])
    return np.where(exceeds, np.where(agrees, "confirmed", "reversed"), "null")
