"""What the commands print: tables of a graph, of a validation and of an evaluation."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from circuitsae.report.passing import answering
from circuitsae.report.text import visible
from circuitsae.sentences import of_evaluation
from circuitsae.tables import Column, show_table
from transcoders.progress import spoken_size, spoken_time
from transcoders.token_text import join_tokens

if TYPE_CHECKING:
    import pandas as pd

    from circuitsae.attribution.expansion import FullSize
    from circuitsae.graph import AttributionGraph, Node
    from circuitsae.validation import Calibration, Validation
    from transcoders.evaluation import Evaluation
    from transcoders.refining import Refinement
    from transcoders.training.planning import Plan

VERDICT_STYLE = {
    "confirmed": "green",
    "attention": "cyan",
    "norms": "cyan",
    "reversed": "red",
    "null": "yellow",
    "undecided": "dim",
}
_EDGE_COLUMNS = (
    ("predicted", "predicted", 6, "effect"),
    ("measured", "measured", 7, "effect"),
    ("verdict", "old verdict", 0, "verdict"),
    ("graph_predicted", "predicted", 6, "effect"),
    ("graph_measured", "measured", 7, "effect"),
    ("graph_ratio", "ratio", 9, "ratio"),
    ("graph_interval", "95 %", 5, "interval"),
    ("graph_verdict", "graph", 0, "verdict"),
    ("stability", "on other prompts", 6, "share"),
    ("direct_verdict", "direct", 0, "verdict"),
    ("model_measured", "model", 8, "effect"),
    ("graph_q", "graph q", 3, "chance"),
    ("graph_reason", "why undecided", 1, "text"),
    ("direct_predicted", "direct predicted", 2, "effect"),
    ("direct_measured", "direct measured", 2, "effect"),
    ("direct_patterns", "by patterns", 2, "effect"),
    ("direct_norms", "by norms", 2, "effect"),
    ("direct_head", "head", 4, "text"),
    ("direct_ratio", "direct ratio", 2, "ratio"),
    ("direct_interval", "direct 95 %", 2, "interval"),
    ("direct_q", "direct q", 2, "chance"),
    ("direct_reason", "direct why undecided", 1, "text"),
    ("model_ratio", "model ratio", 4, "ratio"),
    ("miss", "model misses by", 4, "text"),
    ("influence", "influence", 3, "share"),
)
"""Of the edges that were tested: column, heading, when it is left out (`Column.keep`), how its values are written."""
_IDENTITY = ("Frozen regime", "Effects of small changes")
_CLAIMS = {"graph": "graph claim", "direct": "direct edge", "model": "live model"}


def show_graph(console: Console, graph: "AttributionGraph", full: "FullSize | None" = None) -> None:
    """Prompt, top logits, sizes and scores; `full` is the size before pruning."""
    from circuitsae.graph import NodeKind

    prompt = visible(join_tokens(graph.tokens).replace(" ", "·"))
    console.print(Text(prompt, style="bold"), soft_wrap=True)
    tops = graph.top_logits()
    explained = any(node.explained for node in tops)
    values = [f"{node.pre_activation:+.2f}".replace("+nan", "") for node in tops]
    if explained:
        _show_explained(console, tops, values)
    else:
        rows = [(visible(n.text), f"{n.probability:.4f}", value) for n, value in zip(tops, values, strict=True)]
        columns = [Column("token", text=True), Column("probability"), Column("centred logit", 1)]
        show_table(console, "Top logits", columns, rows)
    names = {kind: "explained" if explained and kind is NodeKind.LOGIT else str(kind) for kind in NodeKind}
    counts = ", ".join(f"{int(graph.mask(kind).sum())} {name}" for kind, name in names.items())
    before = "" if full is None else f" of {full.nodes}"
    edges_before = "" if full is None else f" of {full.edges}"
    console.print(f"Nodes kept: {len(graph.nodes)}{before} ({counts})", highlight=False)
    console.print(f"Edges kept: {graph.weights.nnz}{edges_before}", highlight=False)
    console.print(
        f"Replacement score {graph.scores.replacement:.3f}, completeness score {graph.scores.completeness:.3f}",
        highlight=False,
    )
    if graph.scores.past is not None:
        way = "by errors that answer" if graph.errors == "linear" else "by skip terms"
        console.print(f"Past the features: {graph.scores.past:.1%} of all weight, {way}", highlight=False)
    if graph.derivatives:
        console.print(f"Edges are derivatives with {answering(graph.provenance)}", highlight=False)
    if (fit := _fit(graph)) is not None:
        console.print(f"Dictionaries on this prompt: {fit}", highlight=False)


def _show_explained(console: Console, nodes: Sequence["Node"], values: Sequence[str]) -> None:
    """A contrast with the probabilities of its tokens, a direction, or a feature."""
    names = [visible(node.text) if node.terms or node.vector else node.id for node in nodes]
    chances = [", ".join(f"{term.probability:.4f}" for term in node.terms) for node in nodes]
    own = [(Column("explained", text=True), names), (Column("value"), values)]
    if any(chances):
        own.append((Column("probabilities"), chances))
    show_table(console, "", [column for column, _ in own], list(zip(*(cells for _, cells in own), strict=True)))


def _fit(graph: "AttributionGraph") -> str | None:
    """L0 and FVU of the dictionaries on the prompt, as far as a graph, which a stranger may have written, has them."""
    found = graph.provenance.get("fit")
    fit = found if isinstance(found, Mapping) else {}
    named = (("L0", fit.get("l0"), ".1f"), ("FVU", fit.get("fvu"), ".3f"))
    return ", ".join(f"{name} {value:{form}}" for name, value, form in named if isinstance(value, float)) or None


def show_validation(console: Console, check: "Validation", graph: "AttributionGraph", rows: int = 10) -> None:
    """Claims of the edges that were tested first, verdicts and agreement by claim and class, and what must be equal."""
    text = {node.id: f" {visible(node.text)}" if node.text else "" for node in graph.nodes}
    first = check.edges.head(rows)
    ends = list(zip(first["source"], first["target"], strict=True))
    names = [f"{s}{text[s]} → {t}{text[t]}" for s, t in ends]
    title = (
        f"{len(first)} of {len(check.edges)} tested edges, source removed: verdicts by claim, effect in the live model"
    )
    show_edges(console, title, [(Column("source → target", text=True), names)], first)
    _show_verdicts(console, check)
    _show_agreement(console, check)
    console.print(
        f"{_IDENTITY[check.derivatives]}: largest difference {_figure(check.frozen_error, '.1e')} of the "
        "largest effect\n"
        "Replacement model with error nodes: "
        f"largest difference {_figure(check.logit_error, '.1e')} of the largest logit",
        highlight=False,
        soft_wrap=True,
    )


def show_calibration(console: Console, found: "Calibration") -> None:
    """How often claims known to be false, and planted edges, are confirmed."""
    rows = [
        (_CLAIMS[r["claim"]], r["what"], str(r["n"]), str(r["confirmed"]), f"{r['rate']:.1%}",
         f"{r['low']:.1%} to {r['high']:.1%}")
        for r in found.frame().to_dict("records")
    ]  # fmt: skip
    columns = [Column("claim", text=True), Column("what", text=True), Column("tested"), Column("confirmed")]
    show_table(console, "Calibration", [*columns, Column("rate"), Column("95 %", 1)], rows)


def show_edges(
    console: Console, title: str, own: Sequence[tuple[Column, Sequence[str]]], edges: "pd.DataFrame"
) -> None:
    """A row per edge: columns of one's own with their cells, and what validation found of the edge."""
    for claim in ("graph", "direct"):
        if f"{claim}_low" in edges:
            interval = list(zip(edges[f"{claim}_low"], edges[f"{claim}_high"], strict=True))
            edges = edges.assign(**{f"{claim}_interval": interval})
    chosen = [column for column in _EDGE_COLUMNS if column[0] in edges]
    columns = [column for column, _ in own]
    columns += [Column(name, keep, text=form in ("verdict", "text")) for _, name, keep, form in chosen]
    found = [[_cell(value, form) for value in edges[name].tolist()] for name, _, _, form in chosen]
    show_table(console, title, columns, list(zip(*(cells for _, cells in own), *found, strict=True)))


def _cell(value: Any, form: str) -> str | Text:
    if form == "interval":
        low, high = value
        return "" if low != low else f"[{low:.2f}, {high:.2f}]"
    if value is None or value != value:
        return ""
    match form:
        case "effect":
            return f"{value:+.3f}" if abs(value) < 1e5 else f"{value:+.1e}"
        case "verdict":
            return Text(value, style=VERDICT_STYLE[value])
        case "text":
            return visible(value) if value else ""
        case "share":
            return f"{value:.1%}"
    return f"{value:.3f}" if form == "chance" else f"{value:.2f}"


def _show_verdicts(console: Console, check: "Validation") -> None:
    from circuitsae.validation.result import by_kind

    found = {
        claim: {kind: Counter(rows["verdict"]) for kind, rows in by_kind(check.claim(claim)).items()}
        for claim in check.claims
        if claim != "model"
    }
    given = [name for name in VERDICT_STYLE if any(name in counts["all"] for counts in found.values())]
    columns = [Column("verdicts", text=True), Column("influence", 1)]
    columns += [Column(name, 2 if name == "norms" else 0) for name in given]
    rows: list[Sequence[str] | None] = []
    for claim, by_class in found.items():
        rows += [None] if rows else []
        for kind, counts in by_class.items():
            share = _figure(check.share if kind == "all" else check.shares[kind], ".0%")
            rows.append((_row_name(claim, kind), share, *(str(counts[name] or "") for name in given)))
    if rows:
        show_table(console, "Verdicts by claim and class, and the influence that the tested edges hold", columns, rows)


def _show_agreement(console: Console, check: "Validation") -> None:
    columns = [Column("agreement", text=True), Column("n", 2), Column("Spearman"), Column("same sign")]
    columns += [Column("in [½, 2]"), Column("slope", 3), Column("R²", 1)]
    rows: list[Sequence[str] | None] = []
    for claim in check.claims:
        rows += [None] if rows else []
        for kind, a in check.agreement(claim).items():
            figures = (a.spearman, ".2f"), (a.sign, ".0%"), (a.within, ".0%"), (a.slope, ".2f"), (a.r2, ".2f")
            rows.append((_row_name(claim, kind), str(a.n), *(_figure(value, form) for value, form in figures)))
    show_table(console, "Measured against predicted", columns, rows)


def _row_name(claim: str, kind: str) -> str:
    """The first column of a table by claim and class: the claim, below it the classes."""
    return _CLAIMS[claim] if kind == "all" else kind


def show_evaluation(console: Console, evaluation: "Evaluation") -> None:
    """Sparsity and reconstruction by layer, what the model makes of it, and the model with everything replaced."""
    columns = [Column("layer"), Column("L0"), Column("FVU"), Column("cosine", 5), Column("size", 4), Column("dead", 6)]
    columns += [Column("dense", 3), Column("aligned", 2), Column("aligned cos", 1)]
    found = evaluation.agreement
    columns += [] if found is None else [Column("J cosine", 7), Column("J ratio", 7)]
    rows: list[Sequence[str] | None] = [
        (
            str(layer.layer), f"{layer.l0:.1f}", f"{layer.fvu:.3f}", f"{layer.cosine:.3f}", f"{layer.shrinkage:.3f}",
            f"{layer.dead:.1%}", f"{layer.dense:.1%}",
            f"{layer.alignment.product:.3f}", f"{layer.alignment.cosine:.3f}",
            *([] if found is None else [_figure(layer.jacobian_cosine, ".3f"), _figure(layer.jacobian_ratio, ".3f")]),
        )
        for layer in evaluation.layers
    ]  # fmt: skip
    means = ("mean", f"{evaluation.l0:.1f}", f"{evaluation.fvu:.3f}", "", "", f"{evaluation.dead:.1%}", "", "", "")
    passed = () if found is None else (_figure(found.cosine, ".3f"), _figure(found.norm_ratio, ".3f"))
    rows += [None, (*means, *passed)]
    show_table(console, f"On {evaluation.tokens:,} held-out tokens", columns, rows)
    if evaluation.massive:
        worst = max(evaluation.layers, key=lambda layer: abs(layer.fvu_all - layer.fvu))
        console.print(
            f"Left out: {evaluation.massive:,} tokens of massive activations, which have no features. With them the "
            f"FVU of layer {worst.layer} is {worst.fvu_all:.3f}.",
            highlight=False, soft_wrap=True,
        )  # fmt: skip
    _show_replacements(console, evaluation)
    console.print(of_evaluation(evaluation), highlight=False, soft_wrap=True)


def show_refinement(console: Console, refined: "Refinement") -> None:
    """Each layer before and after, and what was done to it."""
    heads, rows = refined.table()
    keep = {"layer": 0, "FVU": 0, "cosine": 0, "norm ratio": 3, "L0": 2, "what": 1}
    columns = [Column(head, keep[head], text=head == "what") for head in heads]
    title = f"On {refined.held_out_tokens:,} held-out tokens, before → after; cosine and norm ratio of the derivative"
    show_table(console, title, columns, [*rows[:-1], None, rows[-1]])


def _show_replacements(console: Console, evaluation: "Evaluation") -> None:
    columns = [Column("layer"), Column("loss recovered (zero)", 2), Column("(mean)", 1), Column("top-1 agreement")]
    columns += [Column("KL", 3)]
    rows: list[Sequence[str] | None] = []
    for name, found in [*((str(layer.layer), layer) for layer in evaluation.layers), ("all", evaluation.replaced)]:
        if name == "all":
            rows.append(None)
        rows.append((
            name, f"{found.recovered_zero:.3f}", f"{found.recovered_mean:.3f}", f"{found.top1_agreement:.1%}",
            f"{found.kl:.4f}",
        ))  # fmt: skip
    title = f"With reconstructions in the place of the model's own writes, on {evaluation.loss_tokens:,} tokens"
    show_table(console, title, columns, rows)


def _figure(value: float, form: str) -> str:
    """A number, or a dash for one that was not measured or means nothing (a correlation of one edge)."""
    return "–" if value != value else format(value, form)


def show_plan(console: Console, plan: "Plan") -> None:
    """What a run of training would take, a line for each kind of thing."""
    lines = [
        ("Steps", f"{plan.steps:,}, {plan.tokens:,} tokens in all, {plan.threads} threads"),
        *_of_ranks(plan),
        ("Time", _with_parts(sum(plan.seconds.values()), plan.seconds, spoken_time)),
        ("Operations", _with_parts(sum(plan.flops.values()), plan.flops, "{:.1e}".format)),
        ("Memory", f"{_with_parts(plan.peak, plan.memory, spoken_size)}; {spoken_size(plan.memory_there)} are there"),
    ]
    if plan.disk_there is not None:
        disk = _with_parts(sum(plan.disk.values()), plan.disk, spoken_size)
        lines.append(("Disk", f"{disk}; {spoken_size(plan.disk_there)} are free"))
    by_kind: dict[str, list[tuple[str, int]]] = {}
    for site, hook in plan.sites.items():
        by_kind.setdefault(site.partition(".")[2], []).append(hook)
    for kind, hooks in by_kind.items():
        (first, width), last = hooks[0], hooks[-1][0]
        lines.append((kind, f"{first}{'' if first == last else f' … {last}'}, [batch, {width}]"))
    if plan.outliers is not None:
        lines.append(("Outliers", plan.outliers))
    for name, text in lines:
        console.print(Text(f"{name + ':':12}{text}"), soft_wrap=True)


def _of_ranks(plan: "Plan") -> list[tuple[str, str]]:
    """How many processes share the run, and what they say to each other."""
    if plan.ranks == 1:
        return []
    sent = spoken_size(plan.network)
    return [("Ranks", f"{plan.ranks}, each sends {sent} a step; time without waiting for them, memory of one")]


def _with_parts(total: float | int, parts: Mapping[str, Any], spoken: Callable[[Any], str]) -> str:
    listed = ", ".join(f"{name} {spoken(value)}" for name, value in parts.items())
    return f"about {spoken(total)} ({listed})" if parts else spoken(total)
