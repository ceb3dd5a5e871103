"""`circuitsae steer`: push features or a direction with many strengths, and print what that does, and what else."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from circuitsae.commands.shared import Dtype, load_replacement
from circuitsae.report.text import visible
from transcoders.errors import InputError

if TYPE_CHECKING:
    from circuitsae.interventions.steering import Direction, SteeringReport
    from circuitsae.replacement import ReplacementModel


def steer(
    *,
    feature: tuple[str, ...] = (),
    toward: tuple[str, ...] = (),
    away: tuple[str, ...] = (),
    layer: int | None = None,
    top_features: int = 0,
    prompt: tuple[str, ...] = (),
    held_out: tuple[str, ...] = (),
    target: str,
    against: str | None = None,
    want: Literal["up", "down"] = "up",
    strengths: tuple[float, ...] = (-4.0, -2.0, -1.0, -0.5, 0.5, 1.0, 2.0, 4.0),
    push: Literal["add", "set", "scale"] = "add",
    text: Path | None = None,
    texts: int = 16,
    context: int = 64,
    controls: int = 5,
    generate: int = 20,
    seed: int = 0,
    out: Path | None = None,
    json: bool = False,
    model: str = "pocket",
    dictionaries: str | None = None,
    device: str = "cpu",
    dtype: Dtype = "float32",
) -> None:
    """Push a feature, several, or a difference of prompts: effect, held-out prompts, side effects, controls.

    Name features with --feature, or give --toward and --away: their difference at --layer is the direction, or, with
    --top-features, that many of the features that tell them apart. Prompts may be files, one prompt a line.

    Args:
        feature: Features to push, together: LAYER.INDEX, or LAYER.INDEX@POSITION (negative: from the end).
        toward: Prompts to steer towards.
        away: Prompts to steer away from.
        layer: Layer whose input the direction is added to, or whose features are taken; for features default any.
        top_features: Steer by this many features of the contrast of --toward and --away instead of a direction.
        prompt: Prompts to steer; the strength is chosen on these.
        held_out: Other prompts, on which the chosen strength must hold.
        target: The token whose logit is the metric.
        against: A token whose logit is subtracted.
        want: Should the metric go up or down?
        strengths: Strengths to try; 1 is the largest activation seen (or the direction once).
        push: add: strength times the unit is added. set: the activation becomes that. scale: it is multiplied.
        text: A text file, or the hub name of a data set, for side effects; the pocket model has its own.
        texts: How many pieces of unrelated text.
        context: Tokens of each.
        controls: Random stand-ins of the same written norm.
        generate: Tokens to write on, before and after.
        seed: Of the stand-ins.
        out: Folder for steering.json and steering.html.
        json: Print JSON instead of tables.
        model: A hub name, a local Hugging Face folder, or "pocket".
        dictionaries: A folder or hub name of transcoders; the pocket model has its own.
        device: cpu, cuda, cuda:1, mps.
        dtype: Precision of the model.
    """
    import json as json_

    prompts, kept, near, far = (_prompts(given) for given in (prompt, held_out, toward, away))
    _refuse(feature, near, far, layer, top_features, prompts, kept)
    from circuitsae import interventions as module
    from circuitsae.interventions import steering

    console = Console()
    loaded = load_replacement(model, dictionaries, device, dtype)
    lm = loaded.model
    right, wrong = lm.token_id(target), None if against is None else lm.token_id(against)
    report = steering.steer(
        loaded,
        _handle(loaded, feature, near, far, layer, top_features),
        metric=module.logit(right) if wrong is None else module.logit_diff(right, wrong),
        metric_name=f"logit({visible(target)})" + ("" if against is None else f" − logit({visible(against)})"),
        prompts=prompts, held_out=kept, unrelated_text=_unrelated(loaded, model, text, texts, context),
        strengths=strengths, push=push, want=want, controls=controls, n_generate=generate, seed=seed,
        command=shlex.join(["circuitsae", *sys.argv[1:]]),
    )  # fmt: skip
    page = None if out is None else report.save(out)
    if json:
        console.print_json(json_.dumps(report.to_json(), ensure_ascii=False))
        return
    show(console, report)
    if page is not None:
        console.print(f"HTML: {page.resolve()}", highlight=False, soft_wrap=True)


def _prompts(given: Sequence[str]) -> list[str]:
    """Each is a prompt, or a file with one prompt a line."""
    found: list[str] = []
    for item in given:
        is_file = len(item) < 4096 and Path(item).is_file()
        found += [line for line in Path(item).read_text("utf-8").splitlines() if line.strip()] if is_file else [item]
    return found


def _refuse(
    feature: Sequence[str], toward: list[str], away: list[str], layer: int | None, top_features: int,
    prompts: list[str], held_out: list[str],
) -> None:  # fmt: skip
    if bool(feature) == bool(toward or away) or bool(toward) != bool(away):
        raise InputError(
            "Steer by --feature LAYER.INDEX, or by --toward PROMPTS and --away PROMPTS; give one of the two."
        )
    if toward and layer is None and not top_features:
        raise InputError("A difference of prompts is added at some layer; give --layer N, or --top-features N.")
    if not prompts or not held_out:
        raise InputError(
            f"Give --prompt and --held-out, texts or files; got {len(prompts)} and {len(held_out)} prompts."
        )
    if both := set(prompts) & set(held_out):
        raise InputError(f"{next(iter(both))!r} is among --prompt and --held-out; held-out prompts must be others.")


def _handle(
    model: "ReplacementModel", named: Sequence[str], toward: list[str], away: list[str], layer: int | None, k: int
) -> Any:
    from circuitsae.features import contrast_features
    from circuitsae.interventions import Feature, parse_target
    from circuitsae.interventions.steering import difference_of_prompts

    if toward and k:
        found = contrast_features(model, toward, away, k=k, layers=None if layer is None else [layer])
        return [Feature(f.layer, f.index) for f in found.features()]
    if toward:
        assert layer is not None
        direction: Direction = difference_of_prompts(model, toward, away, layer=layer)
        return direction
    targets = [parse_target(name) for name in named]
    for name, target in zip(named, targets, strict=True):
        if not isinstance(target, Feature):
            raise InputError(f"--feature {name!r} is no feature; write LAYER.INDEX, or use --toward and --away.")
    return targets


def _unrelated(model: "ReplacementModel", name: str, text: Path | None, n: int, context: int) -> list[Any]:
    from circuitsae.loading import POCKET
    from circuitsae.pocket.corpus import held_out_text
    from transcoders.data import held_out_rows, take_rows

    if n < 1 or context < 2:
        raise InputError(f"--texts {n} --context {context}: side effects need a text of two tokens at least.")
    if text is not None:
        return list(held_out_rows(model.model, str(text), tokens=n * context, context=context))
    if name != POCKET:
        raise InputError(f"Give --text FILE, ordinary text on which side effects in {name} are measured.")
    return list(take_rows(model.model, held_out_text(n * context), rows=n, context=context))


def show(console: Console, report: "SteeringReport") -> None:
    """The table of strengths, the recommendation, and continuations side by side."""
    n = report.n
    table = Table(title=escape(f"{report.handle} on {report.metric}, wanted {report.want}"), title_justify="left")
    for column in ("strength", "effect", "held out", "KL", "loss", "breaks"):
        table.add_column(column, justify="right")
    pairs = (("effect", "control"), ("held_out_effect", "held_out_control"), ("kl", "control_kl"),
             ("loss_rise", "control_loss_rise"))  # fmt: skip
    for row in report.table.to_dict("records"):
        style = "red" if row["broken"] else "bold green" if row["strength"] == report.recommended else None
        cells = (f"{row[own]:+.2f} ({row[control]:.2f})" for own, control in pairs)
        table.add_row(f"{row['strength']:g}", *cells, "yes" if row["broken"] else "", style=style)
    console.print(table)
    console.print(
        f"(…): largest effect of {n['controls']} controls of the same norm, or the mean of what they do besides. "
        f"{n['prompts']} prompts, {n['held_out']} held out; KL and loss per token of {n['unrelated']} unrelated texts "
        f"(clean loss {report.clean_loss:.3f}).",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    for row in report.table.to_dict("records"):
        if row["broken"]:
            said = f"Strength {row['strength']:g} breaks the model: {escape(row['broken'])}."
            console.print(said, highlight=False, soft_wrap=True)
    best = report.recommended
    verdict = f"Recommended strength: {best:g}" if best is not None else "No strength is recommended"
    console.print(f"[bold]{verdict}[/]: {escape(report.reason)}", highlight=False, soft_wrap=True)
    for row in report.side_by_side().to_dict("records"):
        console.print(escape(visible(row["prompt"], most=None)), style="dim", highlight=False, soft_wrap=True)
        for name in ("before", "after"):
            console.print(f"  [bold]{name}[/] {escape(visible(row[name], most=None))}", highlight=False, soft_wrap=True)
