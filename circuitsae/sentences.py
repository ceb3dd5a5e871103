"""What a command found, in a sentence: from the values of graphs, validations and evaluations, without a model."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from circuitsae.report.passing import answering, of_passing
from circuitsae.report.text import visible

if TYPE_CHECKING:
    import pandas as pd

    from circuitsae.graph import AttributionGraph, Node
    from transcoders.evaluation import Evaluation


def of_graph(graph: "AttributionGraph") -> str:
    """What the first choice's logit is made of, what validation said of the edges, where it was run, and how far the
    dictionaries' derivatives are to be trusted, where that was measured.
    """
    notes = graph.edge_notes
    verdicts = "" if notes is None else of_verdicts(notes)
    return " ".join(filter(None, [of_logit(graph), verdicts, of_passing(graph.provenance)]))


def of_logit(graph: "AttributionGraph") -> str:
    """The shares of features, tokens and errors in Σ|weight| of the edges into the most probable logit, or what else
    is explained, and what of these edges passed by skip terms or errors.
    """
    from circuitsae.graph import NodeKind

    logits = graph.top_logits()
    if not logits:
        return "The graph has no logit."
    shares = graph.shares[[graph.position[logits[0].id]]].toarray()[0]
    of_kind = {kind: shares[graph.mask(kind)] for kind in (NodeKind.FEATURE, NodeKind.TOKEN, NodeKind.ERROR)}
    features, tokens, errors = (f"{100 * part.sum():.0f} %" for part in of_kind.values())
    count = int(np.count_nonzero(of_kind[NodeKind.FEATURE]))
    pruned = 1 - sum(part.sum() for part in of_kind.values())
    what, derived = _what(logits[0]), graph.derivatives
    whole = f"what {what} answers to small changes, with {answering(graph.provenance)}" if derived else what
    return (
        f"Of {whole}, {features} comes through {_number(count, 'feature')}, {tokens} "
        f"from tokens directly and {errors} from what the dictionaries miss"
        + (f"; {100 * pruned:.0f} % is pruned." if pruned >= 0.005 else ".")
        + (" These are derivatives, which do not add up to the logit." if derived else "")
        + _past(graph, logits[0].id)
    )


def _what(node: "Node") -> str:
    """What is explained."""
    if node.terms:
        return f"the difference {visible(node.text)}"
    if node.vector:
        return f"what {visible(node.text)} reads"
    return f"the pre-activation of {node.id}" if node.explained else f"the logit of {visible(node.text)}"


def _past(graph: "AttributionGraph", target: str) -> str:
    """How much of the edges into a node passed by skip terms, or errors that answer; nothing where there are none."""
    from circuitsae.graph import NodeKind
    from circuitsae.graph.past import row_shares

    if graph.past is None:
        return ""
    row = [graph.position[target]]
    (share,) = row_shares(graph.weights[row], graph.past[row], graph.mask(NodeKind.BIAS))
    way = "errors that answer" if graph.errors == "linear" else "skip terms"
    return f" {100 * share:.0f} % of these edges passed by {way}, past the features between."


def of_size(graph: "AttributionGraph") -> str:
    """How much a graph holds."""
    return f"The graph has {_number(len(graph.nodes), 'node')} and {_number(graph.weights.nnz, 'edge')}."


def of_verdicts(notes: "pd.DataFrame") -> str:
    """How many claims of the tested edges hold, claim by claim, and how much of the influence these edges hold.

    notes: the columns of `Validation.edges`, or `edge_notes` of a graph. Nothing is said where no edge was tested.
    """
    from circuitsae.graph.notes import is_old

    column = {str(name): notes[name].to_numpy() for name in notes}
    if is_old(notes):
        return (
            f"An older validation gave {_number(len(_given(column['verdict'])), 'edge')} one verdict of another "
            "question: a total effect was held against a direct edge; run `circuitsae validate` again."
        )
    claims = _of_graph_claims(column), _of_direct_edges(column), _of_model_effects(column)
    if not any(claims):
        return ""
    held = float(np.nansum(column["influence"])) if "influence" in column else 0.0
    share = f" The tested edges hold {100 * held:.0f} % of the influence." if held else ""
    return "; ".join(filter(None, claims)) + "." + share


def _of_graph_claims(column: Mapping[str, np.ndarray]) -> str:
    if not (verdicts := _given(column.get("graph_verdict"))):
        return ""
    predicted, measured = (column[f"graph_{name}"].astype(float) for name in ("predicted", "measured"))
    product, square = predicted * measured, predicted**2
    within = np.count_nonzero((product >= square / 2) & (product <= 2 * square))
    said = ", ".join(f"{count} {name}" for name, count in _counts(verdicts).items())
    return f"{within} of {_number(len(verdicts), 'graph claim')} hold within a factor of two ({said})"


def _of_direct_edges(column: Mapping[str, np.ndarray]) -> str:
    if not (verdicts := _given(column.get("direct_verdict"))):
        return ""
    counts = _counts(verdicts)
    carried = {by: f"{counts[by]} mostly carried by {by}" for by in ("attention", "norms") if by in counts}
    if "direct_head" in column:
        heads = _given(column["direct_head"][column["direct_verdict"] == "attention"])
        if (head := _leading(heads)) is not None:
            carried["attention"] += f", head {head} above all"
    confirmed = f"{counts.get('confirmed', 0)} of {_number(len(verdicts), 'direct edge')} are confirmed"
    return ", ".join([confirmed, ", and ".join(carried.values())]) if carried else confirmed


def _leading(names: Sequence[str]) -> str | None:
    """The one that is named more often than any other."""
    (first, most), (_, next_most) = [*Counter(names).most_common(2), ("", 0), ("", 0)][:2]
    return first if most > next_most else None


def _of_model_effects(column: Mapping[str, np.ndarray]) -> str:
    if "model_predicted" not in column:
        return ""
    predicted, measured = (column[f"model_{name}"].astype(float) for name in ("predicted", "measured"))
    right, tested = np.sign(predicted) == np.sign(measured), np.isfinite(predicted)
    if not tested.any():
        return ""
    return f"in the live model {np.count_nonzero(right)} of {np.count_nonzero(tested):,} point the right way"


def _given(values: np.ndarray | None) -> list[str]:
    """The texts of a column."""
    return [] if values is None else [value for value in values if isinstance(value, str) and value]


def _counts(verdicts: Sequence[str]) -> Mapping[str, int]:
    """How many there are of each verdict that was given, in the order of the verdicts."""
    from circuitsae.graph.notes import VERDICTS

    return {name: verdicts.count(name) for name in VERDICTS if name in verdicts}


def of_evaluation(evaluation: "Evaluation") -> str:
    """Sparsity, what is unexplained, the model's first choice with everything replaced, and what small changes do."""
    replaced, found = evaluation.replaced, evaluation.agreement
    passing = "" if found is None else " " + of_passing({"dictionaries": {"agreement": found.summary()}})
    features = "" if replaced.features == "replaced" else ", features of the original model's stream"
    return (
        f"{evaluation.l0:.1f} features are active per layer and token and leave {evaluation.fvu:.1%} of the variance "
        f"unexplained; with all layers replaced{features} the first choice stays at {replaced.top1_agreement:.1%} of "
        f"the tokens, KL {replaced.kl:.3f} nats, loss {replaced.loss:.3f} instead of {evaluation.loss:.3f}.{passing}"
    )


def of_comparison(both: Any) -> str:
    """How many edges two graphs have in common, and which changes most."""
    shared = int((both.edges["in_a"] & both.edges["in_b"]).sum())
    total = len(both.edges)
    if not total:
        return "Neither graph has an edge."
    most = both.edges.loc[both.edges["difference"].abs().idxmax()]
    return (
        f"{shared} of {_number(total, 'edge')} are in both graphs; from {both.names[0]} to {both.names[1]} "
        f"{most['source']} → {most['target']} changes most, by {most['difference']:+.3f}."
    )


def of_change(metric: str, before: float, effect: float, first: tuple[str, str]) -> str:
    """What an intervention did to a metric and to the model's first choice."""
    verb = "raises" if effect > 0 else "lowers" if effect < 0 else "does not change"
    amount = f" by {abs(effect):.3f} (from {before:+.3f} to {before + effect:+.3f})" if effect else ""
    old, new = map(visible, first)
    choice = f"the first choice stays {old}" if old == new else f"the first choice becomes {new} instead of {old}"
    return f"The change {verb} {metric}{amount}; {choice}."


def of_claims(met: int, claims: int) -> str:
    """How many of a reproduction's claims meet their bar."""
    return f"{met} of {_number(claims, 'claim')} with a bar meet it."


def of_cards(features: int, dead: int, labelled: int) -> str:
    """How many features fired."""
    return f"{features - dead:,} of {_number(features, 'feature')} fired; {labelled:,} have a label."


def _number(count: int, what: str) -> str:
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"
