"""Claim: in a real model of thirty layers a few hundred nodes do most of a task, and its features alone little of it.

Feature circuits of SmolLM2-135M with its published per-layer transcoders (30 × 2,048 features, TopK 32, no skip
terms). Prompts of a task have one template and one length, so that positions are roles, and the model gets them right.

*Faithfulness*: features and error nodes are ranked by their mean |effect| on the task's metric on the first half of
the prompts (by the gradient, against the corrupt prompt); on the other half f = (m(C) − m(∅)) / (m(M) − m(∅)), with
everything outside the strongest k nodes set to its mean over clean and corrupt prompts, by position, the model's own
MLPs and all else live. *At random*: as many of the 2,048 strongest. Brackets: 95 %, by bootstrap over prompts.
*Edges*: pruned graphs of the answer, put together by role (`aggregate`); of the edges on half of the prompts or more
those of most influence, between features and to the answer, with both ends at roles (the strongest of the others lie
at the first word, and are the same in every task), each tested on every prompt that has it: on how many the claims
`direct` (what the source writes, MLPs held) and `graph` (what its removal does, by the mechanism drawn) are confirmed,
other verdicts by number; *model*: what the removal does with all live, over what the graph says, the median with
quartiles. *Label*: tokens of held-out text on which the feature is most active, and those that it raises.

    python benchmarks/feature_circuits_smollm2.py MODEL DICTIONARIES CORPUS [--tasks ioi …] [--work FOLDER]

goes on where it was stopped; writes results/feature_circuits_smollm2.md, docs/images/circuit-smollm2-TASK.svg.
"""

import argparse
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from feature_circuits import of_one_length, table
from machine import RESULTS, machine

import circuitsae as cs
from circuitsae.attribution import LogitTargets, attribute_pruned
from circuitsae.attribution.effect_edges import METRIC
from circuitsae.features.collection.assemble import written_directions
from circuitsae.graph import AttributionGraph
from circuitsae.graph.aggregate import aggregate
from circuitsae.interventions import Prompt
from circuitsae.report.circuit_of_effects import effects_picture
from circuitsae.tasks import Task, load_task
from circuitsae.tasks.cases import prompt_task
from circuitsae.tasks.load import known_examples
from circuitsae.validation import Circuit, PromptTask, circuit_edges, faithfulness, rank_nodes
from circuitsae.validation.ablation import Errors
from transcoders.data import held_out_rows
from transcoders.files import write_file, write_json
from transcoders.formats.files import read_json

TASKS: dict[str, dict[str, Any]] = {
    "ioi": {}, "greater-than": {}, "agreement": {}, "facts": {"relations": ("capital",)},
}  # fmt: skip
IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
DRAWN, HALF, GRAPHS = 400, 8, 3
SIZES = (0, 8, 32, 128, 512, 2048)
EDGES = {"feature→feature": 8, "feature→logit": 4}
CONTROLS, NAMED, PICTURED, ROWS = 80, 12, 12, 12
FIRES, RAISES = 3, 2
PARTS = ("about", "nodes", "curves", "edges", "effects", "labels")
Document = dict[str, Any]


@dataclass(frozen=True)
class Subject:
    """One task of the model."""

    model: cs.ReplacementModel
    name: str

    @cached_property
    def task(self) -> Task:
        """Prompts of one template and length that the model gets right, half of them to choose on."""
        drawn = load_task(self.name, self.model.model, DRAWN, 0, **TASKS[self.name])
        template, _ = Counter(example.template for example in drawn.examples).most_common(1)[0]
        of_it = tuple(example for example in drawn.examples if example.template == template)
        alike = of_one_length(self.model.model, replace(drawn, examples=of_it), 4 * HALF)
        return known_examples(self.model.model, alike).take(slice(0, 2 * HALF))

    @cached_property
    def chosen(self) -> tuple[PromptTask, list[Prompt]]:
        return prompt_task(self.model.model, self.task.take(slice(0, len(self.task) // 2)))

    @cached_property
    def held(self) -> tuple[PromptTask, list[Prompt]]:
        return prompt_task(self.model.model, self.task.take(slice(len(self.task) // 2, None)))


def nodes(subject: Subject) -> Document:
    """The strongest nodes."""
    task, corrupt = subject.chosen
    ranking = rank_nodes(subject.model, task, method="gradient", corrupted=corrupt)
    circuit = ranking.circuit(SIZES[-1])
    column = {node: i for i, node in enumerate(ranking.nodes)}
    mean = [float(ranking.scores[:, column[node]].mean()) for node in circuit.nodes]
    return {"nodes": circuit.ids, "scores": circuit.scores, "mean": mean, "active": len(ranking.nodes)}


def curves(subject: Subject, found: Document) -> Document:
    """f on held-out prompts."""
    circuit = Circuit(Circuit.of(found["nodes"]).nodes, tuple(found["scores"]))
    features = circuit.features_only()
    shuffled = np.random.default_rng(0).permutation(len(circuit))
    at_random = Circuit(tuple(circuit.nodes[i] for i in shuffled))
    task, others = subject.held
    ways: dict[str, tuple[Circuit, Errors]] = {
        "features and error nodes": (circuit, "ranked"),
        "features, all error nodes": (features, "keep"),
        "features, no error nodes": (features, "ablate"),
        "the first, at random": (at_random, "ranked"),
    }
    lines = {}
    for name, (kept, errors) in ways.items():
        sizes = [size for size in SIZES if size <= len(kept)]
        how: dict[str, Any] = {"errors": errors, "sizes": sizes}
        curve = faithfulness(subject.model, kept, task, regime="model", by="position", others=others, **how)
        rows = curve.frame()[["f", "f_low", "f_high"]].to_numpy().tolist()
        lines[name] = {"sizes": sizes, "f": rows, "empty": curve.empty.mean(), "full": curve.full.mean()}
    return {"lines": lines, "prompts": len(task.examples)}


def edges(subject: Subject) -> Document:
    """The graphs of some prompts as one, and its strongest edges tested on each."""
    graphs, roles, answers = [], [], []
    for pair in subject.task.take(slice(0, GRAPHS)).tokens(subject.model.model):
        for tokens, right, prompt in zip(pair.clean, pair.answers, pair.prompts(), strict=True):
            right = right[right >= 0]
            best = int(right[subject.model.trace(tokens).logits[-1][right].argmax()])
            graphs.append(attribute_pruned(subject.model, tokens, targets=LogitTargets([best]))[0])
            roles.append(prompt.roles)
            answers.append({best: "answer"})
    whole = aggregate(graphs, roles, logits=answers, min_frequency=0.5)
    kind = dict(zip(whole.nodes["id"], whole.nodes["kind"], strict=True))
    counts = dict(zip(whole.nodes["id"], whole.nodes["mean"], strict=True))
    counts |= {node: 1.0 for node in kind if kind[node] == "logit"}  # it starts there, and none comes back
    found = whole.edges_frame()
    found["kind"] = [f"{kind[s]}→{kind[t]}" for s, t in zip(found["source"], found["target"], strict=True)]
    found["influence"] = found["share"] * [counts[target] for target in found["target"]]
    named = [node for node, place in zip(whole.nodes["id"], whole.nodes["place"], strict=True) if place in roles[0]]
    both = np.isin(found["source"].to_numpy(str), named) & np.isin(found["target"].to_numpy(str), named)
    found = pd.DataFrame(found[both])
    found = found.iloc[np.argsort(-found["influence"].to_numpy(), kind="stable")]
    strongest = pd.DataFrame(pd.concat([found[found["kind"] == name].head(n) for name, n in EDGES.items()]))
    tested = [claims(subject.model, graph, where, strongest) for graph, where in zip(graphs, roles, strict=True)]
    size = {"nodes": len(whole.nodes), "edges": len(whole.edges), "graphs": len(graphs), **whole.scores}
    columns = ["source", "target", "kind", "frequency", "mean", "low", "high", "influence"]
    return {"size": size, "edges": pd.DataFrame(strongest[columns]).to_dict("records"), "tested": tested}


def claims(model: cs.ReplacementModel, graph: AttributionGraph, roles: Any, wanted: pd.DataFrame) -> Document:
    """What one prompt says of each edge that it has, by the edge's name in the graph of all."""
    length, role_at = len(graph.token_ids), {pos % len(graph.token_ids): role for role, pos in roles.items()}
    own = {}
    for node in graph.nodes:
        name = node.id.partition("@")[0] if str(node.kind) != "logit" else "logit.answer"
        own[f"{name}@{role_at.get(node.pos, str(node.pos - length))}"] = node.id
    pairs = {}
    for source, target in wanted[["source", "target"]].to_numpy().tolist():
        if source in own and target in own:
            s, t = own[source], own[target]
            if graph.weights[graph.position[t], graph.position[s]] != 0:
                pairs[f"{s} → {t}"] = f"{source} → {target}"
    if not pairs:
        return {}
    seen = cs.validate(model, graph, edges=list(pairs), controls=CONTROLS, heads=0).edges
    names = ["direct_verdict", "direct_ratio", "graph_verdict", "graph_ratio", "model_predicted", "model_measured"]
    rows = zip(seen["source"], seen["target"], pd.DataFrame(seen[names]).to_dict("records"), strict=True)
    return {pairs[f"{s} → {t}"]: record for s, t, record in rows}


def effects(subject: Subject, found: Document) -> Document:
    """Edges between the strongest features, by their effects on the metric."""
    task, corrupt = subject.chosen
    circuit = Circuit.of(found["nodes"]).features_only().first(PICTURED)
    few = PromptTask(task.examples[:GRAPHS], task.name)
    graph = circuit_edges(subject.model, circuit, few, corrupted=corrupt[:GRAPHS])
    layers = dict(zip(graph.nodes["id"].tolist(), graph.nodes["layer"].tolist(), strict=True))
    return {"triples": graph.triples(), "layers": layers}


@torch.no_grad()
def labels(model: cs.ReplacementModel, corpus: str, wanted: Sequence[str]) -> Document:
    """What each feature fires on in held-out text, and what it raises."""
    rows = held_out_rows(model.model, corpus, tokens=ROWS * 128, context=128)
    places = sorted({(int(layer), int(index)) for layer, index in (name.split(".") for name in wanted)})
    by_layer: dict[int, list[int]] = defaultdict(list)
    for layer, index in places:
        by_layer[layer].append(index)
    best: dict[str, dict[str, float]] = defaultdict(dict)
    for row in rows:
        text = model.model.token_strings(row)
        read = model.model.activations(row[None], [model.dictionaries.reads[layer] for layer in by_layer])
        for layer, index in by_layer.items():
            active = model.dictionaries.activations(layer, read[model.dictionaries.reads[layer]][0])[:, index]
            for pos, column in active[1:].nonzero().tolist():  # the first token has activations of its own
                name, token = f"{layer}.{index[column]}", shown(text[pos + 1])
                best[name][token] = max(best[name].get(token, 0.0), float(active[pos + 1, column]))
    said = {}
    for layer, index in by_layer.items():
        for i, tokens in zip(index, raised(model, layer, index), strict=True):
            at = best[f"{layer}.{i}"]
            fires = sorted(at, key=lambda token, at=at: -at[token])[:FIRES]
            said[f"{layer}.{i}"] = [fires, [shown(model.model.token_strings(token[None])[0]) for token in tokens]]
    return said


def raised(model: cs.ReplacementModel, layer: int, index: Sequence[int]) -> torch.Tensor:
    """The tokens whose logits each feature raises most by what it writes."""
    written, final = written_directions(model.model, model.dictionaries, layer), model.model.parts.final_norm
    assert written is not None
    assert final is not None
    logits = final.linear(written[index]) @ model.model.W_U
    return (logits - logits.mean(1, keepdim=True)).topk(RAISES).indices


def shown(token: str) -> str:
    return token.replace(" ", "·").replace("\n", "⏎").replace("|", "¦").replace("`", "'")


def feature_of(name: str) -> str | None:
    """`layer.index` of a feature's id, None for other nodes."""
    place = name.partition("@")[0]
    return None if place.startswith(("logit", "tok", METRIC)) or place.endswith("err") else place


def named(found: Document) -> list[str]:
    """The features that tables and picture show."""
    ids = [name for name in found["nodes"]["nodes"] if feature_of(name)][: max(NAMED, PICTURED)]
    ids += [end for edge in found["edges"]["edges"] for end in (edge["source"], edge["target"])]
    return sorted({feature for name in ids if (feature := feature_of(name))})


def said_of(name: str, words: Document) -> str:
    fires, raises = words.get(feature_of(name) or "", [[], []])
    return " ".join(fires) + (f" (raises {' '.join(raises)})" if raises else "")


def kept(path: Path, measure: Callable[[], Document]) -> Document:
    """What was measured before, or is now, with its CPU-seconds."""
    if not path.is_file():
        start = time.process_time()
        found = measure()
        write_json(path, {**found, "seconds": time.process_time() - start})
    return read_json(path)


def measured(model: cs.ReplacementModel, name: str, corpus: str, work: Path) -> Document:
    """All of one task."""
    subject, found = Subject(model, name), {}
    measures: dict[str, Callable[[], Document]] = {
        "nodes": lambda: nodes(subject),
        "curves": lambda: curves(subject, found["nodes"]),
        "edges": lambda: edges(subject),
        "effects": lambda: effects(subject, found["nodes"]),
        "labels": lambda: labels(model, corpus, named(found)),
        "about": lambda: about(subject),
    }
    for part in PARTS:
        found[part] = kept(work / f"{name}-{part}.json", measures[part])
    return found


def whole(work: Path, name: str) -> bool:
    """Whether all of a task is there."""
    return len(there(work, name)) == len(PARTS)


def there(work: Path, name: str) -> Document:
    """What was measured of a task."""
    paths = {part: work / f"{name}-{part}.json" for part in PARTS}
    return {part: read_json(path) for part, path in paths.items() if path.is_file()}


def about(subject: Subject) -> Document:
    first = subject.task.examples[0]
    return {
        "clean": first.clean, "corrupt": first.corrupt, "answers": [str(a) for a in first.answers],
        "metric": subject.task.metric, "prompts": len(subject.task),
    }  # fmt: skip


def section(name: str, found: Document) -> str:
    """One task as a page's section."""
    about, first, lines = found["about"], found["nodes"], found["curves"]["lines"]
    line = lines["features and error nodes"]
    seconds = ", ".join(f"{part} {found[part]['seconds']:.0f}" for part in PARTS[1:] if part in found)
    text = (
        f"*{about['clean']}* →{about['answers'][0].replace(' ', ' ·')}, against *{about['corrupt']}*, metric "
        f"`{about['metric']}`. {about['prompts'] - found['curves']['prompts']} prompts to choose on, "
        f"{found['curves']['prompts']} held out; m(M) {line['full']:.2f}, m(∅) {line['empty']:.2f}. "
        f"{first['active']:,} nodes are active on some prompt or its corrupt twin. CPU-seconds: {seconds}."
    )
    shown = [f"## {name}", text, faithful_table(lines), "The strongest features, by role:", roles_table(found)]
    if "edges" in found:
        shown += [said_graphs(found["edges"]["size"]), edges_table(found["edges"], found.get("labels", {}))]
    return "\n\n".join(shown)


def said_graphs(size: Document) -> str:
    return (
        f"The graphs of {size['graphs']} prompts as one: {size['nodes']:,} nodes and {size['edges']:,} edges on half "
        f"of them or more; replacement score {size['replacement']:.2f}, completeness {size['completeness']:.2f}."
    )


def faithful_table(lines: Document) -> str:
    rows = [[f"{size:,}", *(faithful_at(line, size) for line in lines.values())] for size in SIZES]
    return table(["nodes", *lines], rows)


def faithful_at(line: Document, size: int) -> str:
    """f of the strongest `size` nodes with its interval; nothing where the circuit has not so many."""
    return "{:.2f} [{:.2f}, {:.2f}]".format(*line["f"][line["sizes"].index(size)]) if size in line["sizes"] else ""


def roles_table(found: Document) -> str:
    """The features of largest effect, those of one role together."""
    first, by_role = found["nodes"], defaultdict(list)
    features = [row for row in zip(first["nodes"], first["scores"], first["mean"], strict=True) if feature_of(row[0])]
    for node, score, mean in features[:NAMED]:
        by_role[node.partition("@")[2]].append([node.partition("@")[0], f"{score:.2f}", f"{mean:+.2f}", node])
    rows = [
        [role, *row[:3], said_of(row[3], found.get("labels", {}))] for role, group in by_role.items() for row in group
    ]
    return table(["role", "feature", "mean size of effect", "mean effect", "label"], rows)


def edges_table(graph: Document, words: Document) -> str:
    """The edges of the graph of all, and what each prompt says of them."""
    rows = []
    for edge in graph["edges"]:
        name = f"{edge['source']} → {edge['target']}"
        tested = [one[name] for one in graph["tested"] if name in one]
        ratios = [one["model_measured"] / one["model_predicted"] for one in tested if one["model_predicted"]]
        low, middle, high = np.quantile(ratios, (0.25, 0.5, 0.75)) if ratios else (np.nan,) * 3
        verdicts = [said_verdicts([one[f"{claim}_verdict"] for one in tested]) for claim in ("direct", "graph")]
        ends = [said_of(edge[end], words) for end in ("source", "target")]
        label = " → ".join(filter(None, ends))
        rows.append([name, f"{edge['mean']:+.3f}", *verdicts, f"{middle:.2f} [{low:.2f}, {high:.2f}]", label])
    return table(["edge", "mean", "direct", "graph", "model", "labels"], rows)


def said_verdicts(found: Sequence[str]) -> str:
    """How many are confirmed of how many, and what the others are."""
    others = [f"{n} {verdict}" for verdict, n in Counter(found).items() if verdict != "confirmed"]
    return f"{found.count('confirmed')} of {len(found)}" + (f" ({', '.join(others)})" if others else "")


def verdicts_of(found: Document, claim: str, kind: str) -> str:
    if "edges" not in found:
        return "not run"
    names = [f"{edge['source']} → {edge['target']}" for edge in found["edges"]["edges"] if edge["kind"] == kind]
    seen = [one[name][f"{claim}_verdict"] for one in found["edges"]["tested"] for name in names if name in one]
    return f"{seen.count('confirmed')} of {len(seen)}"


def summary(studies: dict[str, Document]) -> str:
    """A row a task."""
    columns = ["task", "f of 128 nodes", "of 512", "features alone, 512", "128 at random"]
    columns += [f"{claim}: {kind}" for claim in ("direct", "graph") for kind in EDGES]
    rows = []
    for name, found in studies.items():
        lines = found["curves"]["lines"]
        asked = (("features and error nodes", 128), ("features and error nodes", 512))
        asked += (("features, no error nodes", 512), ("the first, at random", 128))
        cells = [faithful_at(lines[way], size) for way, size in asked]
        rows.append([name, *cells, *(verdicts_of(found, c, kind) for c in ("direct", "graph") for kind in EDGES)])
    return table(columns, rows)


def image(name: str) -> Path:
    return IMAGES / f"circuit-smollm2-{name}.svg"


def draw(name: str, found: Document) -> None:
    effects, line = found["effects"], found["curves"]["lines"]["features and error nodes"]
    words = {node: said_of(node, found["labels"]).partition(" (")[0] for node in effects["layers"]}
    said = f"On held-out prompts 128 nodes, errors among them, do {line['f'][SIZES.index(128)][0]:.2f} of it."
    triples = [(source, target, float(effect)) for source, target, effect in effects["triples"]]
    metric = (METRIC, found["about"]["metric"].replace("_", " "))
    effects_picture(triples, effects["layers"], metric, last=said, labels=words).save(image(name))


def write(studies: dict[str, Document]) -> str:
    """The page of the tasks of which faithfulness is there."""
    page = ["# feature_circuits_smollm2", str(__doc__).strip(), f"Machine: {machine()}", summary(studies)]
    text = "\n\n".join([*page, *(section(name, found) for name, found in studies.items())]) + "\n"
    write_file(RESULTS / "feature_circuits_smollm2.md", text)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("dictionaries")
    parser.add_argument("corpus")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--work", type=Path, default=Path("feature_circuits_smollm2"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.work.mkdir(parents=True, exist_ok=True)
    dictionaries = cs.load_dictionaries(given.dictionaries, dtype="float32")
    model = cs.ReplacementModel(cs.load_model(given.model, dtype="float32"), dictionaries)
    for name in given.tasks:
        measured(model, name, given.corpus, given.work)
        every = {task: there(given.work, task) for task in TASKS}
        draw(name, every[name])
        print(write({task: found for task, found in every.items() if "curves" in found}), flush=True)


if __name__ == "__main__":
    main()
