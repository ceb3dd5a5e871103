"""Behaviour, with the figures that papers print for GPT-2 small."""

from dataclasses import dataclass

import pandas as pd

from circuitsae.reproduce.result import Reproduction
from circuitsae.tasks import Task, behaviour
from transcoders.language_model import LanguageModel


@dataclass(frozen=True)
class Published:
    """A figure of GPT-2 small on clean prompts."""

    value: float
    source: str


_WANG = "Wang et al. 2022, arXiv:2211.00593, section 2"
_HANNA = "Hanna et al. 2023, arXiv:2305.00586, section 2"
GPT2_SMALL: dict[tuple[str, str], Published] = {
    ("ioi", "logit_diff"): Published(3.56, _WANG),
    ("ioi", "accuracy"): Published(0.993, _WANG),
    ("greater-than", "prob_diff"): Published(0.817, _HANNA),
    ("greater-than", "sharpness"): Published(0.059, _HANNA),
}
"""By task and measure."""


def behaviour_stage(report: Reproduction, model: LanguageModel, task: Task, *, gpt2_small: bool) -> pd.DataFrame:
    """What the model does on clean and corrupt prompts; published figures beside it where they are this model's."""
    table = behaviour(model, task)
    for row in table.to_dict("records"):
        printed = GPT2_SMALL.get((report.task, str(row["measure"]))) if gpt2_small else None
        report.add(
            f"{row['measure']} on clean prompts",
            float(row["clean"]),
            published=printed.value if printed else None,
            source=printed.source if printed else "",
            note=f"± {row['clean_se']:.3f}; corrupt {row['corrupt']:.3f}; {row['n']} prompts",
        )
    refused = f" Left out, for the tokenizer splits them: {', '.join(task.refused[:8])}." if task.refused else ""
    report.section("Behaviour", f"Means over {len(task)} prompts, with standard errors.{refused}", table)
    return table
