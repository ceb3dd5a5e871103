"""What the commands print: tables of a graph, of a validation and of an evaluation."""

from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from circuitsae.report.text import visible

if TYPE_CHECKING:
    from circuitsae.graph import AttributionGraph
    from circuitsae.validation import Validation
    from transcoders.evaluation import Evaluation

VERDICT_STYLE = {"confirmed": "green", "null": "yellow", "reversed": "red"}


def show_graph(console: Console, graph: "AttributionGraph", full: "AttributionGraph | None" = None) -> None:
    """Prompt, top logits, sizes and scores; `full` is the graph before pruning."""
    from circuitsae.graph import NodeKind

    console.print(f"[bold]{''.join(_visible(t) for t in graph.tokens)}[/bold]", highlight=False)
    logits = Table(title="Top logits", title_justify="left")
    for column in ("token", "probability", "centred logit"):
        logits.add_column(column, justify="left" if column == "token" else "right")
    for node in graph.top_logits():
        logits.add_row(
            _visible(node.text), f"{node.probability:.4f}", f"{node.pre_activation:+.2f}".replace("+nan", "")
        )
    console.print(logits)
    counts = ", ".join(f"{int(graph.mask(kind).sum())} {kind}" for kind in NodeKind)
    before = "" if full is None else f" of {len(full.nodes)}"
    edges_before = "" if full is None else f" of {full.weights.nnz}"
    console.print(f"Nodes kept: {len(graph.nodes)}{before} ({counts})", highlight=False)
    console.print(f"Edges kept: {graph.weights.nnz}{edges_before}", highlight=False)
    console.print(
        f"Replacement score {graph.scores.replacement:.3f}, completeness score {graph.scores.completeness:.3f}",
        highlight=False,
    )


def show_validation(console: Console, check: "Validation", graph: "AttributionGraph", rows: int = 10) -> None:
    """Predicted against measured for the strongest edges, agreement by class of edge, and the verdicts."""
    text = {node.id: f" {_visible(node.text)}" if node.text else "" for node in graph.nodes}
    table = Table(title=f"Strongest {min(rows, len(check.edges))} edges, source removed", title_justify="left")
    columns = [c for c in ("predicted", "frozen", "replacement", "measured", "control") if c in check.edges]
    table.add_column("source → target")
    for column in columns:
        table.add_column({"control": "random (95 %)"}.get(column, column), justify="right")
    if "verdict" in check.edges:
        table.add_column("verdict")
    for record in check.edges.head(rows).to_dict("records"):
        name = f"{record['source']}{text[record['source']]} → {record['target']}{text[record['target']]}"
        cells = [name, *(f"{record[c]:+.3f}" if c != "control" else f"±{record[c]:.3f}" for c in columns)]
        if "verdict" in record:
            cells.append(f"[{VERDICT_STYLE[record['verdict']]}]{record['verdict']}[/]")
        table.add_row(*cells)
    console.print(table)
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
    if "verdict" in check.edges:
        verdicts = ", ".join(f"{count} {name}" for name, count in check.verdicts().items())
        console.print(f"Verdicts on {len(check.edges)} edges: {verdicts}", highlight=False)


def _show_budget(console: Console, check: "Validation") -> None:
    table = Table(title="Edges that miss most: what the miss is made of", title_justify="left")
    table.add_column("source → target")
    columns = ("predicted", "measured", "norms", "patterns", "features", "reconstruction")
    for column in columns:
        table.add_column(column, justify="right")
    for record in check.budget.to_dict("records"):
        table.add_row(f"{record['source']} → {record['target']}", *(f"{record[c]:+.3f}" for c in columns))
    console.print(table)


def _show_agreement(console: Console, check: "Validation") -> None:
    table = Table(title="Measured in the model against predicted", title_justify="left")
    table.add_column("edges")
    for column in ("n", "Spearman", "same sign", "slope", "R²"):
        table.add_column(column, justify="right")
    for name, a in check.agreement().items():
        figures = (a.spearman, ".2f"), (a.sign, ".0%"), (a.slope, ".2f"), (a.r2, ".2f")
        table.add_row(name, str(a.n), *(_figure(value, form) for value, form in figures))
    console.print(table)


def show_evaluation(console: Console, evaluation: "Evaluation") -> None:
    """Sparsity and reconstruction by layer, what the model makes of it, and the model with everything replaced."""
    table = Table(title=f"On {evaluation.tokens:,} held-out tokens", title_justify="left")
    for column in ("layer", "L0", "FVU", "cosine", "size", "dead", "dense", "aligned"):
        table.add_column(column, justify="right")
    for layer in evaluation.layers:
        table.add_row(
            str(layer.layer), f"{layer.l0:.1f}", f"{layer.fvu:.3f}", f"{layer.cosine:.3f}", f"{layer.shrinkage:.3f}",
            f"{layer.dead:.1%}", f"{layer.dense:.1%}", f"{layer.alignment.mean:.3f}",
        )  # fmt: skip
    table.add_section()
    table.add_row("mean", f"{evaluation.l0:.1f}", f"{evaluation.fvu:.3f}", "", "", f"{evaluation.dead:.1%}", "", "")
    console.print(table)
    _show_replacements(console, evaluation)


def _show_replacements(console: Console, evaluation: "Evaluation") -> None:
    table = Table(title="With reconstructions in the place of the model's own writes", title_justify="left")
    for column in ("layer", "loss recovered (zero)", "(mean)", "top-1 agreement", "KL"):
        table.add_column(column, justify="right")
    replaced = evaluation.replaced
    for name, found in [*((str(layer.layer), layer) for layer in evaluation.layers), ("all", replaced)]:
        if name == "all":
            table.add_section()
        table.add_row(
            name, f"{found.recovered_zero:.3f}", f"{found.recovered_mean:.3f}", f"{found.top1_agreement:.1%}",
            f"{found.kl:.4f}",
        )  # fmt: skip
    console.print(table)
    origin = "" if replaced.features == "replaced" else ", features of the original model's stream"
    console.print(
        f"All layers replaced{origin}: top-1 agreement {replaced.top1_agreement:.1%}, KL {replaced.kl:.3f} nats, "
        f"loss {replaced.loss:.3f} (model {evaluation.loss:.3f})",
        highlight=False,
    )


def _figure(value: float, form: str) -> str:
    """A number, or a dash for one that was not measured or means nothing (a correlation of one edge)."""
    return "–" if value != value else format(value, form)


def _visible(token: str) -> str:
    """A token as a reader should see it, its brackets not taken for rich markup."""
    return escape(visible(token))
