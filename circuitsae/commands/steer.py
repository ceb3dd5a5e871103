"""`circuitsae steer`: push features or a direction with many strengths, and print what that does, and what else."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import tyro
from rich.console import Console
from rich.text import Text

from circuitsae.commands.shared import (
    Bos,
    ChoiceOptions,
    Choices,
    Dtype,
    WeightOptions,
    Weights,
    Wide,
    load_replacement,
    say,
)
from circuitsae.report.text import visible
from circuitsae.tables import Column, open_console, show_table
from transcoders.errors import InputError

if TYPE_CHECKING:
    from circuitsae.interventions.steering import Direction, SteeringReport
    from circuitsae.replacement import ReplacementModel

T = TypeVar("T")


def steer(
    prompt: tyro.conf.Positional[tuple[str, ...]] = (),
    /,
    *,
    feature: tuple[str, ...] = (),
    toward: tuple[str, ...] = (),
    away: tuple[str, ...] = (),
    layer: int | None = None,
    top_features: int = 0,
    held_out: tuple[str, ...] = (),
    target: str | None = None,
    against: str | None = None,
    want: Literal["up", "down"] = "up",
    strengths: tuple[float, ...] = (),
    push: Literal["add", "set", "scale"] = "add",
    text: Path | None = None,
    texts: int | None = None,
    context: int = 64,
    controls: int = 5,
    generate: int = 20,
    seed: int = 0,
    out: Path | None = None,
    json: bool = False,
    model: str = "pocket",
    dictionaries: str | None = None,
    bos: Bos = None,
    device: str = "auto",
    dtype: Dtype = "float32",
    wide: Wide = False,
    weights: WeightOptions = Weights(),
    choices: ChoiceOptions = Choices(),
) -> None:
    """Push a feature, several, or a difference of prompts with many strengths: what it does, and what random ones do.

    Name features with --feature, or give --toward and --away: their difference at --layer is the direction, or, with
    --top-features, that many of the features that tell them apart. Prompts may be files, one prompt a
    line; options that take several are repeated.

    Args:
        prompt: Prompts to steer; the strength is chosen on these.
        feature: Features to push, together: LAYER.INDEX, or LAYER.INDEX@POSITION (negative: from the end).
        toward: Prompts to steer towards.
        away: Prompts to steer away from.
        layer: Layer whose input the direction is added to, or whose features are taken; for features default any.
        top_features: Steer by this many features of the contrast of --toward and --away instead of a direction.
        held_out: Other prompts, on which the chosen strength must hold.
        target: The token whose logit is the metric; default, the model's first choice on the first prompt.
        against: A token whose logit is subtracted.
        want: Should the metric go up or down?
        strengths: Strengths to try; 1 is the largest activation seen (or the direction once). Default from -4 to 4.
        push: add: strength times the unit is added. set: the activation becomes that. scale: it is multiplied.
        text: A text file, or the hub name of a data set, for side effects; the pocket model has its own.
        texts: How many pieces of unrelated text; default 16 where there is a text, 0 for no side effects.
        context: Tokens of each.
        controls: Random stand-ins of the same written norm.
        generate: Tokens to write on, before and after.
        seed: Of the stand-ins.
        out: Folder for steering.json and steering.html.
        json: Print JSON instead of tables.
        model: A hub name, a local Hugging Face folder, or "pocket".
        dictionaries: A folder or hub name of transcoders; the pocket model has its own.
        bos: Begin each prompt with the beginning-of-text token; default, as in the dictionaries' training.
        device: auto (a GPU, but the CPU for what is faster there: see `doctor`), cpu, cuda, cuda:1 or mps.
        dtype: Precision of the model.
        weights: Which weights of the model.
        choices: Which of the dictionaries that the name offers.
    """
    import json as json_

    prompts, kept, near, far = (_prompts(given) for given in (prompt, held_out, toward, away))
    _refuse(feature, near, far, layer, top_features, prompts, kept)
    from circuitsae import interventions as module
    from circuitsae.interventions import steering

    console = open_console(wide)
    loaded = load_replacement(model, dictionaries, device, dtype, bos, weights, choices)
    lm = loaded.model
    right = lm.token_id(target) if target is not None else _first_choice(loaded, prompts[0])
    wrong = None if against is None else lm.token_id(against)
    report = steering.steer(
        loaded,
        _what(loaded, feature, near, far, layer, top_features),
        metric=module.logit(right) if wrong is None else module.logit_diff(right, wrong),
        metric_name=" − ".join(f"logit({visible(lm.token_string(t))})" for t in (right, wrong) if t is not None),
        prompts=prompts, held_out=kept, unrelated_text=_unrelated(loaded, model, text, texts, context),
        strengths=strengths or steering.STRENGTHS, push=push, want=want, controls=controls, n_generate=generate,
        seed=seed, command=shlex.join(["circuitsae", *sys.argv[1:]]), progress=True,
    )  # fmt: skip
    page = None if out is None else report.save(out)
    if json:
        console.print_json(json_.dumps(report.to_json(), ensure_ascii=False))
        return
    show(console, report)
    if page is not None:
        say(console, f"HTML: {page.resolve()}")


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
    if not prompts:
        raise InputError("There is no prompt to steer; give one, or a file with one a line.")
    if both := set(prompts) & set(held_out):
        raise InputError(f"{next(iter(both))!r} is steered and held out; held-out prompts must be others.")


def _first_choice(model: "ReplacementModel", prompt: str) -> int:
    logits, _ = model.model.run(model.model.to_tokens(prompt)[None])
    return int(logits[0, -1].argmax())


def _what(
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


def _unrelated(model: "ReplacementModel", name: str, text: Path | None, n: int | None, context: int) -> list[Any]:
    from circuitsae.loading import POCKET
    from circuitsae.pocket.corpus import held_out_text
    from transcoders.data import held_out_rows, take_rows

    if n == 0 or (n is None and text is None and name != POCKET):
        return []
    n = 16 if n is None else n
    if n < 0 or context < 2:
        raise InputError(f"--texts {n} --context {context}: side effects need a text of two tokens at least.")
    if text is not None:
        return list(held_out_rows(model.model, str(text), tokens=n * context, context=context))
    if name != POCKET:
        raise InputError(f"Give --text FILE, ordinary text on which side effects in {name} are measured.")
    return list(take_rows(model.model, held_out_text(n * context), rows=n, context=context))


def show(console: Console, report: "SteeringReport") -> None:
    """The table of strengths, the recommendation, and continuations side by side."""
    n = report.n
    columns = [Column("strength"), Column("effect"), Column("held out", 4), Column("KL", 3), Column("loss", 2)]
    columns += [Column("breaks", 5)]
    pairs = (("effect", "control"), ("held_out_effect", "held_out_control"), ("kl", "control_kl"),
             ("loss_rise", "control_loss_rise"))  # fmt: skip
    measured = (True, bool(n["held_out"]), bool(n["unrelated"]), bool(n["unrelated"]))
    shown = [True, *measured, True]
    rows = []
    for row in report.table.to_dict("records"):
        style = "red" if row["broken"] else "bold green" if row["strength"] == report.recommended else ""
        cells = [f"{row[own]:+.2f} ({row[control]:.2f})" for own, control in pairs]
        line = [f"{row['strength']:g}", *cells, "yes" if row["broken"] else ""]
        rows.append([Text(cell, style=style) for cell in _only(line, shown)])
    show_table(console, f"{report.direction} on {report.metric}, wanted {report.want}", _only(columns, shown), rows)
    side = (
        f"; KL and loss per token of {n['unrelated']} unrelated texts (clean loss {report.clean_loss:.3f})"
        if n["unrelated"]
        else "; side effects not measured, for which give --text FILE"
    )
    say(
        console,
        f"(…): largest effect of {n['controls']} controls of the same norm, or the mean of what they do besides. "
        f"Prompts: {n['prompts']}, and {n['held_out']} held out{side}.",
    )
    for row in report.table.to_dict("records"):
        if row["broken"]:
            say(console, f"Strength {row['strength']:g} breaks the model: {row['broken']}.")
    for row in report.side_by_side().to_dict("records"):
        console.print(Text(visible(row["prompt"], most=None), style="dim"), soft_wrap=True)
        for name in ("before", "after"):
            console.print(Text.assemble(f"  {name} ", (visible(row[name], most=None), "bold")), soft_wrap=True)
    best = report.recommended
    verdict = f"Recommended strength: {best:g}" if best is not None else "No strength is recommended"
    console.print(Text.assemble((verdict, "bold"), f": {report.reason}."), soft_wrap=True)


def _only(items: Sequence[T], wanted: Sequence[bool]) -> list[T]:
    return [item for item, want in zip(items, wanted, strict=True) if want]
