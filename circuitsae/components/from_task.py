"""A task's examples as problems."""

from collections.abc import Sequence

import torch

from circuitsae.components.problem import Ablation, PatchingProblem
from circuitsae.tasks.base import END, PatchPair, Task
from transcoders.errors import InputError
from transcoders.language_model import LanguageModel

_EVERYWHERE = ("first_copy_loss", "second_copy_loss")


def problems_of(
    model: LanguageModel,
    task: Task,
    *,
    metric: str | None = None,
    ablation: Ablation = "resample",
    roles: Sequence[str] = (),
) -> list[PatchingProblem]:
    """One problem for each length of prompt; with `roles`, the positions of these roles (and all others) apart.

    The metric is the task's own unless named; `kl` compares with the clean run. Means are taken within a template.
    Raises `InputError` for a role that the examples do not have.
    """
    found = []
    for pair in task.tokens(model):
        name = metric or task.metric
        reference = None
        if name == "kl":
            with torch.no_grad():
                reference = model.run(pair.clean)[0]
        length = pair.clean.shape[1]
        templates = {template: i for i, template in enumerate(dict.fromkeys(pair.templates))}
        found.append(
            PatchingProblem(
                model,
                pair.clean,
                pair.corrupt,
                task.score(pair, name, reference=reference),
                ablation,
                groups=torch.tensor([templates[t] for t in pair.templates], device=pair.clean.device),
                read=None if name in _EVERYWHERE else pair.clean.new_full((len(pair),), length - 1),
                spans=_spans(pair, roles) if roles else None,
                span_names=(*roles, "other") if roles else (),
            )
        )
    return found


def _spans(pair: PatchPair, roles: Sequence[str]) -> torch.Tensor:
    unknown = [role for role in roles if role not in pair.roles]
    if unknown:
        raise InputError(f"The examples have no role {unknown[0]!r}; they have {', '.join(pair.roles)} ({END} always).")
    at = torch.arange(pair.clean.shape[1], device=pair.clean.device)
    spans = [at == pair.roles[role][:, None] for role in roles]
    return torch.stack([*spans, ~torch.stack(spans).any(0)])
