"""Claim: the pocket model does the built-in tasks on combinations that it never saw, and cannot do docstring.

1,000 prompts each, seed 0 (induction over 24 words: 200); mean ± standard error, as
`circuitsae.tasks.behaviour` measures.
"""

import argparse
from collections.abc import Mapping
from typing import Any

from machine import write_table

from circuitsae.loading import POCKET, load_model
from circuitsae.tasks import behaviour, load_task, task_names
from circuitsae.tasks.ioi import PUBLISHED_TEMPLATES
from transcoders.language_model import LanguageModel

CASES = {
    "ioi, its own 18 templates": ("ioi", {}, ("logit_diff", "top1")),
    "ioi, the 15 published templates": (
        "ioi", {"templates": PUBLISHED_TEMPLATES}, ("logit_diff", "accuracy", "top1"),
    ),
    "greater-than": ("greater-than", {}, ("prob_diff", "sharpness")),
    "two-hop, held-out cities": ("two-hop", {}, ("logit_diff", "top1")),
    "induction": ("induction", {}, ("logit_diff",)),
    "induction, 24 words twice": (
        "induction", {"n": 200, "length": (24, 24), "total": 47}, ("first_copy_loss", "second_copy_loss"),
    ),
    "agreement": ("agreement", {}, ("logit_diff", "accuracy")),
    "docstring": ("docstring", {}, ("logit_diff", "accuracy")),
}  # fmt: skip
SHARES = ("accuracy", "top1")


def shown(row: dict, side: str) -> str:
    if row["measure"] in SHARES:
        return f"{row[side]:.1%}"
    digits = 2 if abs(row["clean"]) > 1 or row["measure"] == "logit_diff" else 3
    return f"{row[side]:.{digits}f} ± {row[f'{side}_se']:.{digits}f}"


Cases = Mapping[str, tuple[str, dict[str, Any], tuple[str, ...]]]


def measured(model: LanguageModel, cases: Cases, n: int) -> list[list[str]]:
    rows = []
    for name, (task, options, measures) in cases.items():
        given: dict[str, Any] = {"n": n, "seed": 0} | options
        prompts = load_task(task, model, **given)
        found = behaviour(model, prompts, measures=measures or (prompts.metric, "accuracy", "top1"))
        rows += [[name, row["measure"], shown(row, "clean"), shown(row, "corrupt")] for row in found.to_dict("records")]
        print(*rows[-len(found) :], sep="\n", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=POCKET, help="a hub name or a folder, whose tasks are measured instead")
    parser.add_argument("--name", help="what that model is called")
    parser.add_argument("--out", default="tasks_other", help="its table is results/OUT.md")
    parser.add_argument("--prompts", type=int, default=1000, help="of each task")
    given = parser.parse_args()
    model, columns = load_model(given.model), ["task", "measure", "clean", "corrupt"]
    if given.model == POCKET:
        write_table("tasks", str(__doc__).strip(), columns, measured(model, CASES, given.prompts))
        return
    name = given.name or model.name
    claim = (
        f"What {name} does on the built-in tasks, as its own tokenizer reads them: {given.prompts} prompts each, seed "
        "0; mean ± standard error, as `circuitsae.tasks.behaviour` measures. `known=True` keeps the accuracy's share "
        "of them."
    )
    rows = measured(model, {task: (task, {}, ()) for task in task_names()}, given.prompts)
    write_table(given.out, claim, columns, rows)


if __name__ == "__main__":
    main()
