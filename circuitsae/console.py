"""What the commands print: tables of a graph, of a validation and of an evaluation."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from circuitsae.report.text import visible
from circuitsae.sentences import of_evaluation
from circuitsae.tables import Column, show_table
from transcoders.token_text import join_tokens

if TYPE_CHECKING:
    from circuitsae.attribution.expansion import FullSize
    from circuitsae.graph import AttributionGraph
    from circuitsae.validation import Validation
    from transcoders.evaluation import Evaluation

_KEEP = {"replacement": 1, "frozen": 2, "control": 3, "predicted": 4, "measured": 0}
"""Columns of edges, from the first that is left out where there is no room."""
VERDICT_STYLE = {"confirmed": "green", "null": "yellow", "reversed": "red"}


def show_graph(console: Console, graph: "AttributionGraph", full: "FullSize | None" = None) -> None:
    """Prompt, top logits, sizes and scores; `full` is the size before pruning."""
    from circuitsae.graph import NodeKind

    prompt = visible(join_tokens(graph.tokens).replace(" ", "·"))
    console.print(Text(prompt, style="bold"), soft_wrap=True)
    rows = [
        (visible(node.text), f"{node.probability:.4f}", f"{node.pre_activation:+.2f}".replace("+nan", ""))
        for node in graph.top_logits()
    ]
    show_table(
        console, "Top logits", [Column("token", text=True), Column("probability"), Column("centred logit", 1)], rows
    )
    counts = ", ".join(f"{int(graph.mask(kind).sum())} {kind}" for kind in NodeKind)
    before = "" if full is None else f" of {full.nodes}"
    edges_before = "" if full is None else f" of {full.edges}"
    console.print(f"Nodes kept: {len(graph.nodes)}{before} ({counts})", highlight=False)
    console.print(f"Edges kept: {graph.weights.nnz}{edges_before}", highlight=False)
    console.print(
        f"Replacement score {graph.scores.replacement:.3f}, completeness score {graph.scores.completeness:.3f}",
        highlight=False,
    )


def show_validation(console: Console, check: "Validation", graph: "AttributionGraph", rows: int = 10) -> None:
    """Predicted against measured for the strongest edges, agreement by class of edge, and the verdicts."""
    text = {node.id: f" {visible(node.text)}" if node.text else "" for node in graph.nodes}
    columns = [c for c in ("predicted", "frozen", "replacement", "measured", "control") if c in check.edges]
    with_verdict = "verdict" in check.edges
    table = []
    for record in check.edges.head(rows).to_dict("records"):
        name = f"{record['source']}{text[record['source']]} → {record['target']}{text[record['target']]}"
        cells: list[str | Text] = [name]
        cells += [f"{record[c]:+.3f}" if c != "control" else f"±{record[c]:.3f}" for c in columns]
        if with_verdict:
            cells.append(Text(record["verdict"], style=VERDICT_STYLE[record["verdict"]]))
        table.append(cells)
    shown = [Column("source → target", text=True)]
    shown += [Column("random (95 %)" if c == "control" else c, _KEEP[c]) for c in columns]
    shown += [Column("verdict", text=True)] if with_verdict else []
    show_table(console, f"Strongest {min(rows, len(check.edges))} edges, source removed", shown, table)
    if "measured" in check.edges:
        _show_agreement(console, check)
    if len(check.budget):
        _show_budget(console, check)
    console.print(
        f"Frozen regime: largest difference {_figure(check.frozen_error, '.1e')} of the largest effect\n"
        "Replacement model with error nodes: "
        f"largest difference {_figure(check.logit_error, '.1e')} of the largest logit",
        highlight=False,
        soft_wrap=True,
    )


def _show_budget(console: Console, check: "Validation") -> None:
    parts = ("predicted", "measured", "norms", "patterns", "features", "reconstruction")
    columns = [Column("source → target", text=True), Column("predicted", 1), Column("measured", 2)]
    columns += [Column(name, 3) for name in parts[2:]]
    rows = [
        (f"{record['source']} → {record['target']}", *(f"{record[c]:+.3f}" for c in parts))
        for record in check.budget.to_dict("records")
    ]
    show_table(console, "Edges that miss most: what the miss is made of", columns, rows)


def _show_agreement(console: Console, check: "Validation") -> None:
    columns = [Column("edges", text=True), Column("n", 2), Column("Spearman", 4), Column("same sign")]
    columns += [Column("slope", 3), Column("R²", 1)]
    rows = []
    for name, a in check.agreement().items():
        figures = (a.spearman, ".2f"), (a.sign, ".0%"), (a.slope, ".2f"), (a.r2, ".2f")
        rows.append((name, str(a.n), *(_figure(value, form) for value, form in figures)))
    show_table(console, "Measured in the model against predicted", columns, rows)


def show_evaluation(console: Console, evaluation: "Evaluation") -> None:
    """Sparsity and reconstruction by layer, what the model makes of it, and the model with everything replaced."""
    columns = [Column("layer"), Column("L0"), Column("FVU"), Column("cosine", 4), Column("size", 3), Column("dead", 5)]
    columns += [Column("dense", 2), Column("aligned", 1)]
    rows: list[Sequence[str] | None] = [
        (
            str(layer.layer), f"{layer.l0:.1f}", f"{layer.fvu:.3f}", f"{layer.cosine:.3f}", f"{layer.shrinkage:.3f}",
            f"{layer.dead:.1%}", f"{layer.dense:.1%}", f"{layer.alignment.mean:.3f}",
        )
        for layer in evaluation.layers
    ]  # fmt: skip
    rows += [None, ("mean", f"{evaluation.l0:.1f}", f"{evaluation.fvu:.3f}", "", "", f"{evaluation.dead:.1%}", "", "")]
    show_table(console, f"On {evaluation.tokens:,} held-out tokens", columns, rows)
    _show_replacements(console, evaluation)
    console.print(of_evaluation(evaluation), highlight=False, soft_wrap=True)


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
    show_table(console, "With reconstructions in the place of the model's own writes", columns, rows)


def _figure(value: float, form: str) -> str:
    """A number, or a dash for one that was not measured or means nothing (a correlation of one edge)."""
    return "–" if value != value else format(value, form)
