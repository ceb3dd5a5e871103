"""How a node reads that is explained and is no token's logit, as JSON: a contrast's tokens, a direction's vector."""

from collections.abc import Mapping
from typing import Any

from circuitsae.graph.checking import MalformedError, present, sequence, share, shown, whole
from circuitsae.graph.nodes import Node, NodeKind, Term

READING = ("explained", "terms", "vector")
"""Fields of a node that only such nodes have."""
MOST_TERMS, MOST_NUMBERS = 10_000, 1_000_000


def reading_of(node: Node) -> dict[str, Any]:
    """`explained`, and `terms` (token, weight and probability of each) or `vector`; nothing for other nodes."""
    found: dict[str, Any] = {"explained": True} if node.explained else {}
    if node.terms:
        found["terms"] = [list(term) for term in node.terms]
    if node.vector:
        found["vector"] = list(node.vector)
    return found


def read_reading(fields: Mapping[str, Any], what: str) -> dict[str, Any]:
    """The same fields of a node, as far as they are stated. Raises `MalformedError` where they make no sense."""
    explained = fields.get("explained", False)
    if not isinstance(explained, bool):
        raise MalformedError(f"explained of {what} is {shown(explained)}; expected true or false")
    terms = sequence(fields.get("terms", []), f"terms of {what}")
    vector = sequence(fields.get("vector", []), f"vector of {what}")
    if len(terms) > MOST_TERMS or len(vector) > MOST_NUMBERS:
        raise MalformedError(f"{what} has {len(terms):,} terms and a vector of {len(vector):,} numbers; expected fewer")
    kind = fields.get("kind")
    if explained and kind not in (NodeKind.FEATURE, NodeKind.LOGIT):
        raise MalformedError(f"{what} is explained, but it is {shown(kind)}; expected a feature or a logit")
    if bool(terms) + bool(vector) != (explained and kind == NodeKind.LOGIT):
        raise MalformedError(f"{what} must have terms or a vector if it is a logit that is explained, and else neither")
    return {
        "explained": explained,
        "terms": tuple(_term(term, f"a term of {what}") for term in terms),
        "vector": tuple(present(number, f"a number of the vector of {what}") for number in vector),
    }


def _term(value: Any, what: str) -> Term:
    parts = sequence(value, what)
    if len(parts) != len(Term._fields):
        raise MalformedError(f"{what} has {len(parts)} values; expected {', '.join(Term._fields)}")
    token, weight, probability = parts
    return Term(
        whole(token, f"the token of {what}"),
        present(weight, f"the weight of {what}"),
        share(probability, f"the probability of {what}"),
    )
