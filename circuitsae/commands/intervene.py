"""`circuitsae intervene`: change something on one prompt, and print what the model says before and after."""

import json as json_
from typing import TYPE_CHECKING, Any, Literal

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
    from circuitsae.interventions import Generation, Intervention, Operation, Outcome
    from circuitsae.replacement import ReplacementModel


def intervene(
    prompt: tyro.conf.Positional[str],
    /,
    *,
    feature: tuple[str, ...] = (),
    zero: bool = False,
    scale: float | None = None,
    set: float | None = None,
    add: float | None = None,
    replace: str | None = None,
    target: str | None = None,
    against: str | None = None,
    regime: Literal["frozen", "direct", "frozen-replacement", "replacement", "frozen-attention", "model"] = "model",
    until: int | None = None,
    generate: int = 0,
    top: int = 10,
    audit: bool = False,
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
    """Change features (or other parts) on a prompt, all at once, and print the model's answer before and after.

    Give one of --zero, --scale, --set, --add, --replace: it is done to everything named by --feature.

    Args:
        prompt: The text to run.
        feature: What to change: a feature as LAYER.INDEX@POSITION, without @ at every position from 1 on; or another
            part: 2.err@5 (error node), tok@5 (token), 2.head3@5, 2.mlp@5, 2.resid_pre@5. Repeat it for several.
        zero: Remove it.
        scale: Multiply it by this.
        set: Set a feature's activation to this.
        add: Add this to a feature's activation.
        replace: Put this feature (LAYER.INDEX) at the activation of the one named, which is removed; for a token:
            the token to put in its place.
        target: A token whose logit is the metric; default, the model's first choice.
        against: A token whose logit is subtracted from the target's.
        regime: What is recomputed after the change; see the documentation of regimes.
        until: In the regime replacement: features stand in for the MLPs of layers below this one only.
        generate: Write this many tokens on, with and without the change (regime model).
        top: How many of the most probable tokens to print.
        audit: Prove that what the regime holds did not move; exit code 1 if it did.
        json: Print JSON instead of tables.
        model: A hub name, a local Hugging Face folder, or "pocket".
        dictionaries: A folder or hub name of transcoders; the pocket model has its own.
        bos: Begin the prompt with the beginning-of-text token; default, as in the dictionaries' training.
        device: auto (a GPU, but the CPU for what is faster there: see `doctor`), cpu, cuda, cuda:1 or mps.
        dtype: Precision of the model.
        weights: Which weights of the model.
        choices: Which of the dictionaries that the name offers.
    """
    if not feature:
        raise InputError("Nothing was named to change; give --feature LAYER.INDEX@POSITION, such as 2.713@5.")
    if top < 1 or generate < 0:
        raise InputError(f"--top {top} --generate {generate}: print at least one token, and write 0 or more.")
    if generate and regime != "model":
        raise InputError(f"--generate writes in the regime model, where new positions have a clean run; not {regime}.")
    from circuitsae import interventions as module
    from circuitsae.sentences import of_change

    chosen = _interventions(feature, {"zero": zero or None, "scale": scale, "set": set, "add": add, "replace": replace})
    console = open_console(wide)
    loaded = load_replacement(model, dictionaries, device, dtype, bos, weights, choices)
    outcome = module.intervene(loaded, prompt, chosen, regime=regime, until=until, audit=audit, reads=False)
    written = module.generate(loaded, prompt, chosen, n=generate) if generate else None
    name, metric = _metric(loaded, outcome, target, against)
    before, effect = float(outcome.before(metric)[0]), float(outcome.effect(metric)[0, 0])
    if json:
        document = outcome.to_json(top) | {"metric": {"name": name, "before": before, "effect": effect}}
        document |= {"generation": written and written.to_json()}
        console.print_json(json_.dumps(document, ensure_ascii=False))
        return
    _show(console, outcome, top)
    say(
        console,
        f"{name}: {before:+.4f} → {before + effect:+.4f} (effect {effect:+.4f})",
        f"KL(before ‖ after) at the last position: {float(outcome.kl()[0, 0, -1]):.4f} nats",
    )
    if outcome.audit is not None:
        far = max([0.0, *outcome.audit["moved"].tolist()])
        say(console, f"Audit: {len(outcome.audit)} frozen values, none moved by more than {far:.1e}")
    if written is not None:
        _show_texts(console, written)
    say(console, of_change(name, before, effect, _first(loaded, outcome)))


def _interventions(named: tuple[str, ...], operations: dict[str, Any]) -> "list[Intervention]":
    from circuitsae.interventions import Intervention, parse_target

    given = {name: value for name, value in operations.items() if value is not None}
    if len(given) != 1:
        flags = ", ".join(f"--{name}" for name in given) or "none"
        raise InputError(f"Give exactly one of --zero, --scale, --set, --add, --replace; got {flags}.")
    ((name, value),) = given.items()
    targets = [parse_target(text) for text in named]
    return [Intervention(target, _operation(target, name, value)) for target in targets]


def _operation(target: Any, name: str, value: Any) -> "Operation":
    from circuitsae.interventions import Add, Feature, Replace, ReplaceToken, Scale, Set, Token, Zero, parse_target

    match name:
        case "zero":
            return Zero()
        case "scale":
            return Scale(value)
        case "replace" if isinstance(target, Token):
            return ReplaceToken(value)
        case "replace":
            by = parse_target(value)
            if not isinstance(by, Feature):
                raise InputError(f"--replace {value!r} is no feature; write it as LAYER.INDEX.")
            return Replace(by)
    if not isinstance(target, Feature):
        raise InputError(f"--{name} takes a number, but only features have numbers; others take --zero or --scale.")
    return Set(value) if name == "set" else Add(value)


def _metric(model: "ReplacementModel", outcome: "Outcome", target: str | None, against: str | None) -> tuple[str, Any]:
    from circuitsae.interventions import logit, logit_diff

    lm = model.model
    right = int(outcome.clean[0, -1].argmax()) if target is None else lm.token_id(target)
    shown = visible(lm.token_string(right))
    if against is None:
        return f"logit({shown})", logit(right)
    wrong = lm.token_id(against)
    return f"logit({shown}) − logit({visible(lm.token_string(wrong))})", logit_diff(right, wrong)


def _first(model: "ReplacementModel", outcome: "Outcome") -> tuple[str, str]:
    """The most probable token before and after."""
    before, after = outcome.clean[0, -1].argmax(), outcome.changed[0, 0, -1].argmax()
    return model.model.token_string(int(before)), model.model.token_string(int(after))


def _show(console: Console, outcome: "Outcome", top: int) -> None:
    columns = [Column("token", text=True), Column("probability before", 4), Column("after"), Column("logit before", 2)]
    columns += [Column("after", 3), Column("rank before", 1), Column("after", 1)]
    rows = [
        (
            visible(row["text"]), f"{row['probability_before']:.4f}", f"{row['probability_after']:.4f}",
            f"{row['logit_before']:+.2f}", f"{row['logit_after']:+.2f}", str(row["rank_before"] + 1),
            str(row["rank_after"] + 1),
        )
        for row in outcome.top(top).to_dict("records")
    ]  # fmt: skip
    show_table(console, "; ".join(map(str, outcome.alternatives[0])), columns, rows)


def _show_texts(console: Console, written: "Generation") -> None:
    for label, text in zip(("before", "after"), written.texts, strict=True):
        console.print(Text.assemble((label, "bold"), f" {visible(text, most=None)}"), soft_wrap=True)
