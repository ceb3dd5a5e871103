"""Claims: on prompts never used while building, a graph's claims hold in the model as far as these tables say.

1. Agreement of T̂ with an independent forward pass in float64, written out here: true MLPs (position 0's output held, as
   in the graph), attention patterns and norm scales overwritten with the clean run's, the source's contribution taken
   out. T̂ comes from the dense matrices of the complete graph. 30 edges of each class and prompt, once the most
   influential of every layer distance (as `validate` chooses), once those of largest |weight|; and both together, an
   edge with the same effect in several prompts (these begin alike) counted once.
2. Why edges to logits miss: the same at a dose of 1 %, where nothing switches; and against the path-integrated
   prediction, the effect with features recomputed all the way (`frozen-replacement`), which has features that come on.
3. Verdicts of the edges that hold 80 % of the influence of each graph (pruned to 90 %), with the default options; also
   the share of these edges' influence that is confirmed, for a feature that misses ten logits is ten edges.
4. What it costs: 500 edges of a pocket graph, three claims, doses and controls, on all threads; the same with one run a
   forward pass, and the largest difference of a measured effect, over the largest one.

    python benchmarks/claims.py --tinystories-clt DIR --tinystories-plt DIR

Prompts: {n} of each of the pocket model's five tasks, seed {seed}; of TinyStories and of a random model (a GPT-2 of 3
layers whose transcoders were trained on its own activations) {others} in all, seed {others_seed}.
"""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import tyro
from machine import write_table
from scipy import sparse
from scipy.sparse.linalg import spsolve
from torch import Tensor

import circuitsae as cs
from circuitsae.graph import AttributionGraph, Node, NodeKind
from circuitsae.interventions import Recording, node_change
from circuitsae.interventions.forward import MEMORY
from circuitsae.pocket import prompts as pocket
from circuitsae.pocket.corpus import held_out_text
from circuitsae.replacement import Trace
from circuitsae.validation import agreement
from circuitsae.validation.choice import choose_edges
from circuitsae.validation.claims import Pairs
from circuitsae.validation.measuring import Targets, effects
from transcoders.errors import InputError
from transcoders.sites import Site
from transcoders.training import TranscoderConfig, train

CLASSES = ("feature→feature", "token→feature", "feature→logit", "token→logit", "error→feature", "error→logit")
EDGES = 30
REPOSITORY = Path(__file__).resolve().parents[1]
TINYSTORIES = REPOSITORY.parent / "shared" / "data" / "models" / "tinystories-656k"
STORIES = REPOSITORY.parent / "shared" / "data" / "corpora" / "tiny_stories_944k.txt"


@dataclass
class Options:
    """What to measure."""

    tinystories_clt: Path | None = None
    """Cross-layer transcoders of the 656k-parameter TinyStories model, as `circuitsae train` writes them."""
    tinystories_plt: Path | None = None
    """Per-layer ones."""
    n: int = 12
    """Prompts of each task of the pocket model."""
    seed: int = 20261130
    """Of these prompts."""
    others: int = 20
    """Prompts of each of the other models."""
    others_seed: int = 20261129
    """Of these."""
    agreement: bool = True
    """Also tables 1 and 2."""


@dataclass
class Setting:
    """A model with dictionaries, in float64 and as users load it, and prompts."""

    name: str
    exact: cs.ReplacementModel
    usual: cs.ReplacementModel
    prompts: list[str | Tensor]


def settings(options: Options) -> Iterator[Setting]:
    """Pocket with both kinds of dictionary, TinyStories with those that were given, a random model."""
    prompts = pocket_prompts(options.n, options.seed)
    for name in ("pocket", "pocket-plt"):
        exact, usual = (
            cs.ReplacementModel(cs.load_model("pocket", dtype=d), cs.load_dictionaries(name)) for d in DTYPES
        )
        yield Setting({"pocket": "pocket, CLT", "pocket-plt": "pocket, PLT"}[name], exact, usual, prompts)
    for kind, folder in (("CLT", options.tinystories_clt), ("PLT", options.tinystories_plt)):
        if folder is not None:
            exact, usual = (
                cs.ReplacementModel(cs.load_model(str(TINYSTORIES), dtype=d), cs.load_dictionaries(folder))
                for d in DTYPES
            )
            yield Setting(f"tinystories-656k, {kind}", exact, usual, stories(options.others, options.others_seed))
    yield random_setting(options.others, options.others_seed)


DTYPES = ("float64", "float32")


def pocket_prompts(n: int, seed: int) -> list[str | Tensor]:
    cities = pocket.two_hop_prompts(held_out_cities=True, seed=seed)
    texts = [" ".join(text.split()[:14]) for text in held_out_text(400 * n, seed=seed)]
    return [
        *(p.text for p in pocket.ioi_prompts(n, seed)),
        *(p.text for p in pocket.greater_than_prompts(n, seed)),
        *(p.text for p in pocket.agreement_prompts(n, seed)),
        *(p.text for p in cities[:n]),
        *texts[:n],
    ]


def stories(n: int, seed: int) -> list[str | Tensor]:
    """The first fourteen words of stories."""
    paragraphs = [p for p in STORIES.read_text().split("\n") if len(p.split()) > 20]
    chosen = np.random.default_rng(seed).choice(len(paragraphs), n, replace=False)
    return [" ".join(paragraphs[i].split()[:14]) for i in chosen]


def random_setting(n: int, seed: int) -> Setting:
    """A random GPT-2 with transcoders trained on its activations on random tokens."""
    tokens = torch.randint(1, 64, (8000, 16), generator=torch.Generator().manual_seed(seed))
    exact, usual = (cs.random_model("gpt2", n_layers=3, d_model=32, seed=1, dtype=getattr(torch, d)) for d in DTYPES)
    config = TranscoderConfig(features=256, activation="topk", k=16, tokens=128_000, lr=2e-3, context=16)
    dictionaries = train(usual, tokens[n:], config, progress=False)
    both = cs.ReplacementModel(exact, dictionaries), cs.ReplacementModel(usual, dictionaries)
    return Setting("random GPT-2, PLT", *both, list(tokens[:n]))


# predictions and measurements that share nothing with `circuitsae.validation`


def total_effects(graph: AttributionGraph, pairs: Pairs) -> np.ndarray:
    """T̂ of some pairs, from the matrices of the complete graph: −((I − B)⁻¹ A) and its logits."""
    features = np.flatnonzero(graph.mask(NodeKind.FEATURE))
    activation = np.array([graph.nodes[i].activation for i in features])
    s, t = ([graph.position[node.id] for node in nodes] for nodes in (pairs.sources, pairs.targets))
    within = graph.weights[features][:, features] @ sparse.diags_array(1 / activation)
    direct = graph.weights[features][:, s].toarray()
    answers = spsolve((sparse.eye_array(len(features)) - within).tocsc(), direct)
    of_features = graph.weights[t][:, features] @ sparse.diags_array(1 / activation)
    total = graph.weights[t][:, s].toarray() + of_features @ answers.reshape(direct.shape)
    return -total[pairs.target, pairs.source]


class Model:
    """The model with patterns and norm scales overwritten, position 0's MLP output held, all MLPs its own."""

    def __init__(self, model: cs.ReplacementModel, trace: Trace) -> None:
        self.model, self.trace = model, trace
        self.layers = range(model.model.n_layers)
        self.clean = self._reads({})

    def effects(self, pairs: Pairs, dose: float = 1.0) -> np.ndarray:
        """Per dose taken out: (value after − value before) / dose of every pair, one run for each source."""
        after = [self._reads(self._written(node, -dose)) for node in pairs.sources]
        read = [self._reader(node) for node in pairs.targets]
        values = [read[t](*after[s]) - read[t](*self.clean) for s, t in zip(pairs.source, pairs.target, strict=True)]
        return np.array(values) / dose

    def _written(self, node: Node, factor: float) -> dict[int, Tensor]:
        """What is added to the embeddings (−1) and the MLP outputs, at the node's position."""
        trace, dictionaries = self.trace, self.model.dictionaries
        if node.kind is NodeKind.TOKEN:
            vectors = {-1: trace.frozen.writes.embed[node.pos]}
        elif node.kind is NodeKind.ERROR:
            vectors = {node.layer: trace.errors[node.layer, node.pos]}
        else:
            index = torch.tensor([node.index])
            vectors = {
                at: node.activation * dictionaries.decoder_rows(node.layer, index, at)[0].detach()
                for at in dictionaries.write_layers(node.layer)
            }
        added = {}
        for layer, vector in vectors.items():
            added[layer] = torch.zeros_like(trace.frozen.writes.embed)
            added[layer][node.pos] = factor * vector
        return added

    @torch.no_grad()
    def _reads(self, added: dict[int, Tensor]) -> tuple[dict[int, Tensor], Tensor]:
        """What every MLP reads, and the logits of the last position."""
        frozen = self.trace.frozen
        hooks: dict[str, Any] = {name: (lambda _, v=value: v) for name, value in frozen.constants.items()}
        hooks["embed.hook_out"] = lambda value: value + added.get(-1, 0)

        def mlp_out(value: Tensor, layer: int) -> Tensor:
            held = torch.cat([frozen.writes.mlp_out[layer][None, :1], value[:, 1:]], dim=1)
            return held + added.get(layer, 0)

        for layer in self.layers:
            hooks[Site(layer, "mlp_out").hooks[0]] = lambda value, layer=layer: mlp_out(value, layer)
        names = [Site(layer, "mlp_in").hooks[0] for layer in self.layers]
        logits, cache = self.model.model.run_hooked(self.trace.tokens[None], read=names, write=hooks)
        return {layer: cache[name][0] for layer, name in zip(self.layers, names, strict=True)}, logits[0, -1]

    def _reader(self, node: Node) -> Any:
        """A target's value in a run."""
        if node.kind is NodeKind.LOGIT:
            return lambda _, logits: float(logits[node.index] - logits.mean())
        encoder = self.model.dictionaries.encoder_rows(node.layer, torch.tensor([node.index]))[0].detach()
        return lambda reads, _: float(reads[node.layer][node.pos] @ encoder)


# tables


def chosen(graph: AttributionGraph, by: str) -> Pairs:
    """The edges of a complete graph to look at: `EDGES` of each class."""
    parts = []
    for name in CLASSES:
        try:
            rows = choose_edges(graph, name).rows
        except InputError:
            continue
        if by == "|weight|":
            rows = rows.iloc[np.argsort(-rows["weight"].abs().to_numpy(), kind="stable")]
        parts.append(rows[:EDGES])
    rows = pd.concat(parts)
    return Pairs.of([(graph.nodes[s], graph.nodes[t]) for s, t in rows[["s", "t"]].to_numpy()])


def agreements(where: Setting) -> tuple[list[list[str]], list[list[str]]]:
    """Rows of tables 1 and 2."""
    found: dict[str, list[pd.DataFrame]] = {"influence": [], "|weight|": []}
    for prompt in where.prompts:
        graph = cs.attribute(where.exact, prompt)
        trace = where.exact.trace(prompt)
        oracle, recording = Model(where.exact, trace), Recording(where.exact, trace)
        for by in found:
            pairs = chosen(graph, by)
            frame = pairs.frame().assign(predicted=total_effects(graph, pairs), measured=oracle.effects(pairs))
            if by == "influence":
                removed = [[-1.0 * node_change(where.exact, trace, node)] for node in pairs.sources]
                targets = Targets(where.exact, trace, pairs.targets)
                along = effects(where.exact, recording, removed, targets, "frozen-replacement")
                frame["path"], frame["small"] = along[pairs.source, pairs.target], oracle.effects(pairs, 0.01)
            found[by].append(frame)
    tables = {by: pd.concat(frames) for by, frames in found.items()}
    tables["either, once"] = once(pd.concat(list(tables.values())))
    first = [
        [where.name, by, kind, *figures(rows, "predicted", "measured")]
        for by, t in tables.items()
        for kind, rows in split(t)
    ]
    second = [
        [where.name, kind, said, *figures(rows, *columns)]
        for kind, rows in split(tables["influence"])
        if kind in ("token→logit", "feature→logit")
        for said, *columns in (
            ("T̂, full removal", "predicted", "measured"),
            ("T̂, dose 1 %", "predicted", "small"),
            ("path-integrated, full removal", "path", "measured"),
        )
    ]
    return first, second


def once(edges: pd.DataFrame) -> pd.DataFrame:
    """Without those that recur: prompts begin alike, and so do their graphs."""
    return edges.loc[~edges[["kind", "predicted", "measured"]].round(9).duplicated()]


def split(table: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    return [(kind, pd.DataFrame(rows)) for kind in CLASSES if len(rows := table[table["kind"] == kind])]


def weighted(edges: pd.DataFrame) -> str:
    """The share of the influence of some edges that the confirmed ones hold."""
    influence = edges["influence"].to_numpy(float)
    return f"{influence[edges['graph_verdict'] == 'confirmed'].sum() / influence.sum():.1%}"


def figures(rows: pd.DataFrame, predicted: str, measured: str) -> list[str]:
    """n, Spearman, same sign, ratios in [½, 2], median ratio."""
    x, y = rows[predicted].to_numpy(float), rows[measured].to_numpy(float)
    known = np.isfinite(y)
    agreed = agreement(x[known], y[known])
    ratio = np.median(y[known & (x != 0)] / x[known & (x != 0)])
    return [f"{len(rows):,}", *(f"{v:.3f}" for v in (agreed.spearman, agreed.sign, agreed.within)), f"{ratio:.2f}"]


def verdicts(where: Setting) -> list[list[str]]:
    """Rows of table 3."""
    start, frames, share = time.perf_counter(), [], []
    for prompt in where.prompts:
        check = cs.validate(where.usual, cs.attribute(where.usual, prompt).prune(nodes=0.9), edges=0.8)
        frames.append(check.edges)
        share.append(check.share)
    seconds, table = time.perf_counter() - start, pd.concat(frames)
    rows = []
    for kind, part in split(table):
        given = part["graph_verdict"].tolist()
        shares = [f"{given.count(name) / len(part):.1%}" for name in ("confirmed", "undecided", "null", "reversed")]
        model = float(np.mean(np.sign(part["model_measured"]) == np.sign(part["model_predicted"])))
        carried = part["direct_verdict"].isin(["attention", "norms"]).mean()
        rows.append([where.name, kind, f"{len(part):,}", *shares, weighted(part), f"{carried:.1%}", f"{model:.1%}"])
    said = f"hold {np.mean(share):.0%}, {seconds / len(where.prompts):.1f} s a prompt"
    confirmed = f"{(table['graph_verdict'] == 'confirmed').mean():.1%}"
    rows.append([where.name, f"all ({said})", f"{len(table):,}", confirmed, "", "", "", weighted(table), "", ""])
    return rows


def cost() -> list[list[str]]:
    """Rows of table 4."""
    model = cs.ReplacementModel(cs.load_model("pocket"), cs.load_dictionaries("pocket"))
    graph = cs.attribute(model, pocket.DEMONSTRATION).prune(nodes=0.95)
    cs.validate(model, graph, edges=5)  # what is loaded on first use
    rows, tables = [], []
    for said, memory in (("batched", MEMORY), ("one run a pass", 1)):
        wall, processor = time.perf_counter(), time.process_time()
        tables.append(cs.validate(model, graph, edges=500, memory=memory).edges)
        wall, processor = time.perf_counter() - wall, time.process_time() - processor
        sources, n = tables[-1]["source"].nunique(), len(tables[-1])
        rows.append([said, f"{n} from {sources} sources", f"{wall:.1f}", f"{processor:.1f}"])
    columns = [c for c in tables[0] if c.endswith("_measured")]
    ours, theirs = (table[columns].to_numpy(float) for table in tables)
    same = np.mean([(tables[0][c] == tables[1][c]).mean() for c in ("graph_verdict", "direct_verdict")])
    far = np.abs(ours - theirs).max() / np.abs(theirs).max()
    return [[*rows[0], "", ""], [*rows[1], f"{far:.1e}", f"{same:.1%}"]]


def main(options: Options) -> None:
    torch.set_num_threads(os.cpu_count() or 1)
    costs = cost()
    torch.set_num_threads(1)
    agreed, why, judged = [], [], []
    for where in settings(options):
        judged += verdicts(where)
        if options.agreement:
            first, second = agreements(where)
            agreed, why = agreed + first, why + second
    claim = str(__doc__).strip()
    claim = claim.format(**{name: getattr(options, name) for name in ("n", "seed", "others", "others_seed")})
    numbers = ["n", "Spearman", "same sign", "ratio in [½, 2]", "median ratio"]
    if options.agreement:
        print(write_table("claims_agreement", claim, ["model", "edges by", "class", *numbers], agreed))
        print(write_table("claims_logits", claim, ["model", "class", "prediction", *numbers], why))
    columns = ["model", "class", "n", "confirmed", "undecided", "null", "reversed", "confirmed, by influence"]
    columns += ["direct: carried", "model: same sign"]
    print(write_table("claims_verdicts", claim, columns, judged))
    columns = ["how", "edges", "wall s", "CPU s", "difference", "same verdict"]
    print(write_table("claims_cost", claim, columns, costs))


if __name__ == "__main__":
    main(tyro.cli(Options))
