"""`matched`: the graph of another tool on a loaded model and dictionaries, checked to be those that it was made of.

A file of another tool names its model and dictionaries at best, and its numbers may come from another precision. So the
prompt is traced again and compared: tokens, features, activations and probabilities.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from torch import Tensor, tensor

from circuitsae.graph import AttributionGraph, Node, NodeKind
from circuitsae.replacement import ReplacementModel, Trace
from transcoders.errors import InputError, PromptError

TOLERANCE = 0.1
_MISREAD = 0.25
"""Share of tokens whose text may be written otherwise: tools differ in how they show bytes and spaces."""
_SHOWN = 3


@dataclass(frozen=True)
class Match:
    """How far a graph agrees with what the model and the dictionaries do on its prompt."""

    tokens: int
    features: int
    """Features of the graph."""
    inactive: tuple[str, ...]
    """Those that are not active here, by our ids; their edges are not tested."""
    activation_error: float
    """`Σ |a − â| / Σ |a|` over the features that are active in both, a the file's; NaN where it states none."""
    probability_error: float
    """Largest difference of an output's probability; NaN where it states none."""

    def to_json(self) -> dict[str, Any]:
        """As JSON values; NaN becomes null."""
        return {
            name: list(value) if isinstance(value, tuple) else None if value != value else value
            for name, value in asdict(self).items()
        }

    def __str__(self) -> str:
        firing = self.features - len(self.inactive)
        found = f"{self.tokens} tokens agree; {firing} of {self.features} features fire here"
        if np.isfinite(self.activation_error):
            found += f", with activations that differ by {self.activation_error:.1e} of their sum"
        if np.isfinite(self.probability_error):
            found += f"; probabilities differ by at most {self.probability_error:.1e}"
        return found


def matched(
    model: ReplacementModel, graph: AttributionGraph, *, tolerance: float = TOLERANCE
) -> tuple[AttributionGraph, Match]:
    """The part of a graph that is there in this model with these dictionaries, with all token ids; and how far it is.

    `tolerance`: of the share of features that are not active, of the error of the activations and of that of the
    probabilities; numbers in bfloat16 are within a hundredth. Raises `InputError` for a graph of another model (layers,
    tokens, probabilities), another prompt or other dictionaries (features, activations).
    """
    if not 0 <= tolerance < 1:
        raise InputError(f"tolerance={tolerance} is no share that may differ; give one from 0 to below 1.")
    if graph.n_layers != model.model.n_layers:
        raise InputError(
            f"The graph is of a model of {graph.n_layers} layers, but {model.model.name} has {model.model.n_layers}; "
            "load the model that it was made with."
        )
    tokens = _tokens(model, graph)
    trace = model.trace(tokens)
    rows = [row for row, node in enumerate(graph.nodes) if node.kind is NodeKind.FEATURE]
    stated = np.array([graph.nodes[row].activation for row in rows], dtype=float)
    here = _activations(trace, [graph.nodes[row] for row in rows])
    active = here > 0
    error = _relative(stated[active], here[active])
    match = Match(
        tokens=len(tokens),
        features=len(rows),
        inactive=tuple(graph.nodes[row].id for row, fires in zip(rows, active, strict=True) if not fires),
        activation_error=error,
        probability_error=_probability_error(trace, graph),
    )
    _refuse(model, match, tolerance)
    kept = np.ones(len(graph.nodes), dtype=bool)
    kept[np.array(rows, dtype=int)[~active]] = False
    part = replace(graph, token_ids=tuple(tokens.tolist()))
    return part.keep(kept, part.weights), match


def _tokens(model: ReplacementModel, graph: AttributionGraph) -> Int[Tensor, "pos"]:
    """The prompt's ids: the file's own, what it leaves out from its text. Raises `InputError` where they disagree."""
    stated = list(graph.token_ids)
    if stated and min(stated) >= 0:
        tokens = model.tokens(tensor(stated))
    else:
        tokens = _retokenised(model, str(graph.provenance.get("prompt") or ""), stated)
    if model.model.has_tokenizer and any(graph.tokens):
        texts = model.model.token_strings(tokens)
        other = [pos for pos, (a, b) in enumerate(zip(texts, graph.tokens, strict=True)) if a.strip() != b.strip()]
        if len(other) > _MISREAD * len(texts):
            pos = other[0]
            raise InputError(
                f"The graph's token {int(tokens[pos])} at position {pos} is {graph.tokens[pos]!r:.40}, but "
                f"{texts[pos]!r:.40} in {model.model.name}; load the model that the graph was made with."
            )
    return tokens


def _retokenised(model: ReplacementModel, prompt: str, stated: list[int]) -> Int[Tensor, "pos"]:
    for bos in (None, True, False):
        try:
            tokens = model.tokens(prompt, bos=bos)
        except PromptError:
            continue
        ids = tokens.tolist()
        if len(ids) == len(stated) and all(a in (-1, b) for a, b in zip(stated, ids, strict=True)):
            return tokens
    raise InputError(
        f"{model.model.name} does not cut the graph's prompt {prompt[:60]!r} into the {len(stated)} tokens that the "
        "graph has; load the model, and with it the tokenizer, that the graph was made with."
    )


def _activations(trace: Trace, nodes: list[Node]) -> Float[np.ndarray, "node"]:
    """Of features on the prompt; 0 for those that are not active."""
    index, value = trace.features
    found = {tuple(at): own for at, own in zip(index.tolist(), value.tolist(), strict=True)}
    return np.array([found.get((node.layer, node.pos, node.index), 0.0) for node in nodes], dtype=float)


def _relative(stated: Float[np.ndarray, "n"], here: Float[np.ndarray, "n"]) -> float:
    known: Bool[np.ndarray, "n"] = np.isfinite(stated)
    size = np.abs(stated[known]).sum()
    return float(np.abs(stated - here)[known].sum() / size) if size > 0 else float("nan")


def _probability_error(trace: Trace, graph: AttributionGraph) -> float:
    """Over the outputs of which the file states a probability; those beyond the vocabulary count as never given."""
    p = trace.logits[-1].softmax(-1)
    differences = [
        abs(node.probability - (float(p[node.index]) if node.index < len(p) else 0.0))
        for node in graph.nodes
        if node.kind is NodeKind.LOGIT and not node.explained and node.index >= 0 and node.probability > 0
    ]
    return max(differences, default=float("nan"))


def _refuse(model: ReplacementModel, match: Match, tolerance: float) -> None:
    name = model.model.name
    if match.probability_error > tolerance:
        raise InputError(
            f"The probabilities of the graph's outputs differ by up to {match.probability_error:.2f} from those of "
            f"{name} on its prompt (at most {tolerance:g} may); load the model that the graph was made with."
        )
    if match.features and len(match.inactive) > tolerance * match.features:
        shown = ", ".join(match.inactive[:_SHOWN])
        raise InputError(
            f"{len(match.inactive)} of the graph's {match.features} features ({shown}, …) are not active in these "
            f"dictionaries on its prompt (at most {tolerance:g} of them may be); load the graph's own dictionaries."
        )
    if match.activation_error > tolerance:
        raise InputError(
            f"The activations of the graph's features differ by {match.activation_error:.2f} of their sum from those "
            f"of these dictionaries (at most {tolerance:g} may); load the graph's own dictionaries."
        )
