"""What a command found, in a sentence: from the values of graphs, validations and evaluations, without a model."""

from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np

from circuitsae.report.text import visible

if TYPE_CHECKING:
    from circuitsae.graph import AttributionGraph
    from transcoders.evaluation import Evaluation


def of_graph(graph: "AttributionGraph") -> str:
    """What the first choice's logit is made of, and what validation said of the edges, where it was run."""
    said = of_logit(graph)
    if graph.edge_notes is not None and "verdict" in graph.edge_notes:
        said += f" {of_verdicts(graph.edge_notes['verdict'].dropna().tolist())}"
    return said


def of_logit(graph: "AttributionGraph") -> str:
    """The shares of features, tokens and errors in Σ|weight| of the edges into the most probable logit."""
    from circuitsae.graph import NodeKind

    logits = graph.top_logits()
    if not logits:
        return "The graph has no logit."
    shares = graph.shares[[graph.position[logits[0].id]]].toarray()[0]
    of_kind = {kind: shares[graph.mask(kind)] for kind in (NodeKind.FEATURE, NodeKind.TOKEN, NodeKind.ERROR)}
    features, tokens, errors = (f"{100 * part.sum():.0f} %" for part in of_kind.values())
    count = int(np.count_nonzero(of_kind[NodeKind.FEATURE]))
    pruned = 1 - sum(part.sum() for part in of_kind.values())
    return (
        f"Of the logit of {visible(logits[0].text)}, {features} comes through {_number(count, 'feature')}, {tokens} "
        f"from tokens directly and {errors} from what the dictionaries miss"
        + (f"; {100 * pruned:.0f} % is pruned." if pruned >= 0.005 else ".")
    )


def of_size(graph: "AttributionGraph") -> str:
    """How much a graph holds."""
    return f"The graph has {_number(len(graph.nodes), 'node')} and {_number(graph.weights.nnz, 'edge')}."


def of_verdicts(verdicts: list[str]) -> str:
    """How many of the tested edges hold in the model."""
    counts = Counter(verdicts)
    if not verdicts:
        return "No edge was tested in the model."
    return (
        f"{counts['confirmed']} of {_number(len(verdicts), 'tested edge')} hold in the model; {counts['reversed']} "
        f"act the other way, and {counts['null']} do no more than random stand-ins."
    )


def of_evaluation(evaluation: "Evaluation") -> str:
    """Sparsity, what is unexplained, and the model's first choice with everything replaced."""
    replaced = evaluation.replaced
    features = "" if replaced.features == "replaced" else ", features of the original model's stream"
    return (
        f"{evaluation.l0:.1f} features are active per layer and token and leave {evaluation.fvu:.1%} of the variance "
        f"unexplained; with all layers replaced{features} the first choice stays at {replaced.top1_agreement:.1%} of "
        f"the tokens, KL {replaced.kl:.3f} nats, loss {replaced.loss:.3f} instead of {evaluation.loss:.3f}."
    )


def of_comparison(both: Any, names: tuple[str, str]) -> str:
    """How many edges two graphs have in common, and which changes most."""
    shared = int((both.edges["in_a"] & both.edges["in_b"]).sum())
    total = len(both.edges)
    if not total:
        return "Neither graph has an edge."
    most = both.edges.loc[both.edges["weight"].abs().idxmax()]
    return (
        f"{shared} of {_number(total, 'edge')} are in both graphs; from {names[0]} to {names[1]} "
        f"{most['source']} → {most['target']} changes most, by {most['weight']:+.3f}."
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
