"""The folder of a run explains itself: README.md with what made it, its figures and how to go on, and a curve."""

import json
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from math import floor, log10
from pathlib import Path
from typing import Any

from transcoders.dictionaries.provenance import VECTORS
from transcoders.evaluation.result import Evaluation
from transcoders.files import write_file
from transcoders.training.config import TrainConfig

_CURVE = "curve.svg"
_EVALUATED, _NEXT = "## Evaluation", "## What next"
_WIDTH, _HEIGHT, _MARGIN = 640, 260, 44


def write_record(
    folder: Path, config: TrainConfig, *, step: int, identity: Mapping[str, Any], versions: Mapping[str, str]
) -> None:
    """Write `README.md` and `curve.svg` of a dictionary into its folder, each whole or not at all."""
    metrics = read_metrics(folder / "metrics.jsonl")
    if metrics:
        write_file(folder / _CURVE, loss_curve(metrics))
    write_file(folder / "README.md", readme(folder, config, metrics, step=step, identity=identity, versions=versions))


def readme(
    folder: Path,
    config: TrainConfig,
    metrics: Sequence[Mapping[str, Any]],
    *,
    step: int,
    identity: Mapping[str, Any],
    versions: Mapping[str, str],
) -> str:
    """What a run is, in Markdown. `identity`: model, fingerprint and corpus, as a checkpoint records them, and
    `data_hash`: of the rows read so far, or of the whole store.
    """
    finished = step >= config.steps
    state = "finished" if finished else f"at step {step:,} of {config.steps:,}; not finished"
    changed = [(f.name, getattr(config, f.name)) for f in fields(config) if getattr(config, f.name) != f.default]
    parts = [
        f"# {config.kind} of {identity['model']}, {state}",
        _table([
            ("model", identity["model"]),
            ("its weights' fingerprint", identity.get("fingerprint") or "none"),
            ("data", identity["corpus"]),
            ("hash of the data read", identity.get("data_hash") or "none"),
            ("tokens trained on", f"{step * config.batch:,}"),
            ("command", f"`{command_line()}`"),
            ("versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
        ]),
        "## Settings that are not defaults",
        _table([(f"`{name}`", f"`{value!r}`") for name, value in changed]) if changed else "None.",
    ]  # fmt: skip
    if metrics:
        parts += ["## Figures", _figures(metrics), f"![FVU at each step]({_CURVE})"]
    parts += [_NEXT, _next(folder, config, identity, finished=finished)]
    return "\n\n".join(parts) + "\n"


def command_line() -> str:
    """What was typed, or, from Python, the function that was called, and in which script."""
    program, script = Path(sys.argv[0]), Path(getattr(sys.modules["__main__"], "__file__", None) or "")
    if program.name == "circuitsae" or program.parts[-2:] == ("circuitsae", "__main__.py"):
        return shlex.join(["circuitsae", *sys.argv[1:]])
    if script.suffix == ".py" and script.name == program.name and script.name != "__main__.py":
        return f"transcoders.train, in {shlex.join(['python', *sys.argv])}"
    return "transcoders.train"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a `metrics.jsonl`; a last one that is not whole is left out."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line.endswith("}")]


def _figures(metrics: Sequence[Mapping[str, Any]]) -> str:
    last = metrics[-1]
    rows = [("all layers", last["fvu"], last["l0"], last["dead"])]
    layers = zip(last["fvu_per_layer"], last["l0_per_layer"], last["dead_per_layer"], strict=True)
    rows += [(f"layer {i}", *figures) for i, figures in enumerate(layers)]
    lines = ["|  | FVU | L0 | dead |", "|---|---|---|---|"]
    lines += [f"| {name} | {fvu:.4f} | {l0:.1f} | {dead:.1%} |" for name, fvu, l0, dead in rows]
    return f"Of the batch of step {last['step']:,}, in training.\n\n" + "\n".join(lines)


def record_evaluation(folder: Path, evaluation: Evaluation) -> None:
    """Put what an evaluation found into the `README.md` that a run wrote, in the place of an earlier one's."""
    path = folder / "README.md"
    if not path.is_file() or _NEXT not in (text := path.read_text(encoding="utf-8")):
        return
    before, after = text.split(_NEXT, 1)
    before = before.split(_EVALUATED, 1)[0].rstrip()
    write_file(path, f"{before}\n\n{_EVALUATED}\n\n{_evaluated(evaluation)}\n\n{_NEXT}{after}")


def _evaluated(evaluation: Evaluation) -> str:
    passed = "" if evaluation.agreement is None else " J cosine | J ratio |"
    lines = [f"|  | FVU | L0 | loss recovered |{passed}", "|---" * (4 + 2 * bool(passed)) + "|"]
    for layer in evaluation.layers:
        more = f" {layer.jacobian_cosine:.3f} | {layer.jacobian_ratio:.3f} |" if passed else ""
        lines.append(f"| layer {layer.layer} | {layer.fvu:.4f} | {layer.l0:.1f} | {layer.recovered_zero:.3f} |{more}")
    said = f"On {evaluation.tokens:,} held-out tokens.\n\n" + "\n".join(lines)
    if (found := evaluation.agreement) is not None:
        said += (
            f"\n\nJ: what dictionary and MLP make of a small change. On average {found.norm_ratio:.0%} of it is passed "
            f"on, with cosine {found.cosine:.2f}; through {found.reach} MLPs in a row the cosine stays above .9."
        )
    return said


def _next(folder: Path, config: TrainConfig, identity: Mapping[str, Any], *, finished: bool) -> str:
    if not finished:
        return "The command with `--resume` added (in Python `resume=True`) goes on from the last checkpoint."
    place = shlex.quote(str(folder))
    if identity["corpus"] == VECTORS:  # of no model, so there is nothing to run
        return f"`transcoders.load_dictionaries({str(folder)!r})` loads the dictionaries."
    lines = [f"circuitsae evaluate {place}"]
    if config.kind != "sae":
        lines.append(f'circuitsae trace "Some prompt" --model {identity["model"]} --dictionaries {place}')
    return "```bash\n" + "\n".join(lines) + "\n```"


def _table(rows: Iterable[tuple[str, str]]) -> str:
    return "\n".join(["|  |  |", "|---|---|", *(f"| {name} | {_cell(value)} |" for name, value in rows)])


def _cell(value: str) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def loss_curve(metrics: Sequence[Mapping[str, Any]]) -> str:
    """FVU at each measured step as an SVG: all layers together as a thick line, each layer as a thin one; log scale."""
    steps = [m["step"] for m in metrics]
    curves = list(zip(*(m["fvu_per_layer"] for m in metrics), strict=True))
    curves = [*curves, tuple(m["fvu"] for m in metrics)]
    values = [v for curve in curves for v in curve if 0 < v < float("inf")] or [1.0]
    low, high = floor(log10(min(values))), max(floor(log10(max(values))) + 1, floor(log10(min(values))) + 1)

    def x(step: int) -> float:
        return _MARGIN + (_WIDTH - 2 * _MARGIN) * step / steps[-1]

    def y(value: float) -> float:
        share = (log10(max(value, 10.0**low)) - low) / (high - low)
        return _HEIGHT - _MARGIN - (_HEIGHT - 2 * _MARGIN) * share

    def line(curve: Sequence[float], style: str) -> str:
        points = [f"{x(step):.1f},{y(value):.1f}" for step, value in zip(steps, curve, strict=True)]
        points *= 2 if len(points) == 1 else 1  # a dot: a line to itself, with a round end
        return f'<polyline fill="none" stroke-linecap="round" {style} points="{" ".join(points)}"/>'

    ticks = [
        f'<line x1="{_MARGIN}" x2="{_WIDTH - _MARGIN}" y1="{y(10.0**e):.1f}" y2="{y(10.0**e):.1f}" stroke="#ccc"/>'
        f'<text x="{_MARGIN - 6}" y="{y(10.0**e) + 4:.1f}" text-anchor="end">{10.0**e:g}</text>'
        for e in range(low, high + 1)
    ]
    lines = [line(curve, 'stroke="#888" stroke-width="0.6"') for curve in curves[:-1]]
    lines.append(line(curves[-1], 'stroke="#06c" stroke-width="2"'))
    below = f'<text x="{_WIDTH - _MARGIN}" y="{_HEIGHT - 14}" text-anchor="end">step {steps[-1]:,}</text>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" '
        f'font-size="12" role="img" aria-label="FVU at each step">'
        f'<rect width="100%" height="100%" fill="#fff"/><text x="{_MARGIN}" y="20">FVU</text>'
        + "".join([*ticks, *lines, below])
        + "</svg>\n"
    )
