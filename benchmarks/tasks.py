"""Claim: the pocket model does the built-in tasks on combinations that it never saw, and cannot do docstring.

1,000 prompts each, seed 0 (induction over 24 words: 200); mean ± standard error, as
`circuitsae.tasks.behaviour` measures.
"""

from machine import write_table

from circuitsae.loading import load_model
from circuitsae.tasks import behaviour, load_task
from circuitsae.tasks.ioi import PUBLISHED_TEMPLATES

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


def main() -> None:
    model = load_model("pocket")
    rows = []
    for name, (task, options, measures) in CASES.items():
        found = behaviour(model, load_task(task, model, **{"n": 1000, "seed": 0} | options), measures=measures)
        rows += [[name, row["measure"], shown(row, "clean"), shown(row, "corrupt")] for row in found.to_dict("records")]
    print(write_table("tasks", str(__doc__).strip(), ["task", "measure", "clean", "corrupt"], rows))


if __name__ == "__main__":
    main()
