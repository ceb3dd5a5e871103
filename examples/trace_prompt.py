"""A prompt becomes a graph whose edges were tested: the path from text to HTML in Python.

python examples/trace_prompt.py [--quick] [OUTPUT.html]
"""

import sys

import networkx as nx

import circuitsae as cs

PROMPT = "When John and Mary went to the store, John gave a drink to"


def main(arguments: list[str]) -> None:
    quick = "--quick" in arguments
    paths = [a for a in arguments if not a.startswith("--")]
    model = cs.ReplacementModel(cs.load_model("pocket"), cs.load_dictionaries("pocket"))

    full = cs.attribute(model, PROMPT, max_features=150 if quick else None)
    graph = full.prune(nodes=0.8, edges=0.98)
    check = cs.validate(model, graph, edges=10 if quick else 100)
    print(graph)
    print(check.claim("graph")[["source", "target", "predicted", "measured", "ratio", "verdict"]].head(10).to_string())

    g = check.annotate(graph).to_networkx()
    confirmed = nx.DiGraph((s, t, d) for s, t, d in g.edges(data=True) if d.get("graph_verdict") == "confirmed")
    print(f"{confirmed.number_of_edges()} of {len(check.edges)} tested edges have their graph claim confirmed")
    print("HTML:", graph.write_html(paths[0] if paths else "graph.html", validation=check))


if __name__ == "__main__":
    main(sys.argv[1:])
