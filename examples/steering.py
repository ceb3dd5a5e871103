"""Steering by a pronoun's features, on the pocket model and on a real Llama, with what it does besides.

Features are found on some names ("When Anna was seven years old," against "When David was …"), the strength is chosen
on others, and what it does is measured on others again. With --write the tables go to a file.

python examples/steering.py [--quick] [--out FOLDER] [--write FILE] [--llama FOLDER DICTIONARIES TEXT]
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import circuitsae as cs
from circuitsae.features import Claim, Label, check_label, contrast_features
from circuitsae.interventions import logit_diff
from circuitsae.interventions.steering import SteeringReport, difference_of_prompts, steer
from circuitsae.pocket.corpus import held_out_text
from circuitsae.pocket.words import MEN, NAMES
from transcoders.data import held_out_rows, take_rows
from transcoders.files import write_file

POCKET_PHRASE = "When {name} was seven years old,"
STORY_PHRASE = "Once upon a time, there was a little {kind} named {name}. One day, "
GIRLS = ("Lily", "Sue", "Mia", "Anna", "Lucy", "Amy", "Sara", "Jane", "Molly", "Emma", "Kate", "Mary")
BOYS = ("Tim", "Tom", "Ben", "Max", "Sam", "Jack", "John", "Bob", "Billy", "Timmy", "Joe", "Fred")
FEMALE = rf"\b([Ss]he|[Hh]er|girl|Mom|mom|{'|'.join(sorted({*GIRLS, *NAMES} - set(MEN) - set(BOYS)))})\b"


@dataclass(frozen=True)
class Case:
    """A model, prompts about women and about men, ordinary text, and the two pronouns as tokens."""

    title: str
    model: cs.ReplacementModel
    women: list[str]
    men: list[str]
    text: list
    tokens: tuple[str, str]
    paraphrase: tuple[str, str]
    """What to replace in a prompt, and by what, to say the same in other words."""
    at: int
    """Where the model is pushed: the last token, or the name."""
    layers: tuple[int, ...] | None
    """Layers whose features are looked at; None for all."""
    k: int
    """How many features."""


def pocket() -> Case:
    model = cs.ReplacementModel(cs.load_model("pocket"), cs.load_dictionaries("pocket"))
    women, men = ([n for n in NAMES if (n in MEN) == is_man] for is_man in (False, True))
    women, men = ([POCKET_PHRASE.format(name=name) for name in names[:36]] for names in (women, men))
    text = list(take_rows(model.model, held_out_text(4000), rows=32, context=96))
    return Case("The pocket model", model, women, men, text, (" she", " he"), ("seven", "nine"), -1, None, 5)


def llama(folder: str, dictionaries: str, text: str) -> Case:
    model = cs.ReplacementModel(cs.load_model(folder), cs.load_dictionaries(dictionaries))
    women, men = (
        [STORY_PHRASE.format(kind=kind, name=name) for name in names]
        for kind, names in (("girl", GIRLS), ("boy", BOYS))
    )
    rows = list(held_out_rows(model.model, text, tokens=4000, context=96))
    title = "A 656k-parameter Llama trained on TinyStories"
    return Case(title, model, women, men, rows, ("she ", "he "), ("One day", "Every day"), 8, (0,), 1)


def reports(case: Case, *, quick: bool, command: str) -> dict[str, SteeringReport]:
    """Towards `she` on prompts about men: by features, and by the difference of prompts."""
    model, women, men, tokens = case.model, case.women, case.men, case.tokens
    third = len(men) // 3
    found = contrast_features(model, women[:third], men[:third], at=case.at, layers=case.layers, k=case.k)
    layer = model.model.n_layers - 1
    directions = {"features": found.features(), "difference of prompts": difference_of_prompts(
            model, women[:third], men[:third], layer=layer, read_at=case.at, at=case.at)}  # fmt: skip
    ids = [model.model.token_id(token) for token in tokens]
    return {
        name: steer(
            model, direction, metric=logit_diff(*ids), metric_name=f"logit({tokens[0]!r}) − logit({tokens[1]!r})",
            prompts=men[third : 2 * third], held_out=men[2 * third :], unrelated_text=case.text[: 4 if quick else None],
            strengths=(-1.0, 1.0, 4.0) if quick else (-4.0, -2.0, -1.0, -0.5, 0.25, 0.5, 1.0, 1.5, 2.0, 4.0),
            controls=2 if quick else 10, n_generate=8 if quick else 20, command=command,
            units=found.mean.tolist() if name == "features" else None,
        )
        for name, direction in directions.items()
    }  # fmt: skip


def markdown(report: SteeringReport) -> str:
    """The side-effect table, the recommendation and continuations."""
    columns = {
        "strength": "strength", "effect": "effect", "control": "largest control", "held_out_effect": "held out",
        "held_out_control": "largest control ", "kl": "KL, unrelated", "control_kl": "controls",
        "loss_rise": "loss, unrelated", "control_loss_rise": "controls ", "broken": "breaks the model",
    }  # fmt: skip
    lines = ["| " + " | ".join(columns.values()) + " |", "|" + "---|" * len(columns)]
    for row in report.table.to_dict("records"):
        cells = [f"{row[c]:g}" if c == "strength" else row[c] if c == "broken" else f"{row[c]:+.3f}" for c in columns]
        lines.append("| " + " | ".join(cells) + " |")
    best = report.recommended
    lines += ["", f"Recommended: **{'none' if best is None else format(best, 'g')}** ({report.reason}).", ""]
    lines += ["| prompt | before | after |", "|---|---|---|"]
    for row in report.side_by_side().to_dict("records"):
        lines.append("| " + " | ".join(f"`{row[c].replace(chr(10), ' ').replace('|', '/')}`" for c in row) + " |")
    n, units = report.n, ", ".join(f"{unit:.2f}" for unit in report.units)
    what = f"`{report.direction}`" + (f" (strength 1 adds {units})" if units else "")
    lead = (
        f"{what} on {report.metric}; {n['prompts']} prompts, {n['held_out']} held out, {n['unrelated']} unrelated "
        f"texts (clean loss {report.clean_loss:.3f} nats per token), {n['controls']} controls."
    )
    return "\n".join([lead, "", *lines, ""])


def tested_label(case: Case, *, quick: bool, command: str) -> Label:
    """A label for the strongest feature of the contrast, with every row measured."""
    third = len(case.men) // 3
    found = contrast_features(case.model, case.women[:third], case.men[:third], at=case.at, layers=case.layers, k=1)
    best = found.features()[0]
    prompts = case.women[third : 2 * third]
    few = 8 if quick else len(case.text) // 2
    claim = Claim(
        fires_on=FEMALE,
        metric=logit_diff(*(case.model.model.token_id(token) for token in case.tokens)),
        metric_name=f"logit({case.tokens[0]!r}) − logit({case.tokens[1]!r})",
        texts=case.text[:few],
        held_out_texts=case.text[few : 2 * few],
        prompts=prompts,
        steer_on=case.men[third : 2 * third],
        held_out=case.men[2 * third :],
        paraphrases=[[prompt.replace(*case.paraphrase)] for prompt in prompts],
    )
    label = Label("the person spoken of is female", (f"{best.layer}.{best.index}",))
    return check_label(case.model, label, claim, controls=3 if quick else 20, command=command)


def main(given: argparse.Namespace) -> None:
    command = "python examples/steering.py" + (f" --llama {' '.join(given.llama)}" if given.llama else "")
    cases = [pocket(), *([llama(*given.llama)] if given.llama else [])]
    parts = []
    for case in cases:
        parts.append(f"## {case.title}\n")
        made = reports(case, quick=given.quick, command=command)
        for name, report in made.items():
            parts.append(f"### By {name}\n\n{markdown(report)}")
            if given.out:
                folder = Path(given.out) / f"{case.model.model.name} {name}".replace(" ", "-")
                print("HTML:", report.save(folder))
        parts.append(ledger_rows(tested_label(case, quick=given.quick, command=command)))
    print("\n".join(parts))
    if given.write:
        head = f"# Steering\n\nWritten by `{command} --write {given.write}`."
        write_file(given.write, "\n\n".join([head, "\n".join(parts)]))


def ledger_rows(label: Label) -> str:
    """The label as it is displayed, and its rows."""
    lines = [
        f"### The ledger of the strongest feature\n\n`{label}`\n",
        "| row | verdict | measurement |",
        "|---|---|---|",
    ]
    for kind, row in label.rows.items():
        numbers = {k: v for k, v in row.measurement.items() if k not in ("examples", "reason", "fires_on", "metric")}
        said = ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in numbers.items())
        lines.append(f"| {kind} | {row.verdict} | {said} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few strengths, controls and texts")
    parser.add_argument("--out", help="folder for HTML and JSON reports")
    parser.add_argument("--write", type=Path, help="file for the tables")
    parser.add_argument("--llama", nargs=3, metavar=("FOLDER", "DICTIONARIES", "TEXT"), help="a TinyStories model too")
    main(parser.parse_args())
