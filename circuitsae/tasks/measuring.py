"""What a model does on a task, measured."""

import pandas as pd
import torch

from circuitsae.tasks.base import PatchPair, Task
from circuitsae.tasks.metrics import metric
from transcoders.language_model import LanguageModel


def behaviour(
    model: LanguageModel, task: Task, *, measures: tuple[str, ...] | None = None, batch_size: int = 64
) -> pd.DataFrame:
    """A row per measure: its mean on the clean and on the corrupt prompts, with standard errors.

    Columns: `task`, `measure`, `clean`, `clean_se`, `corrupt`, `corrupt_se`, `n`. The answers are the clean prompt's
    in both; `kl` compares with the clean run. The standard error is that of a mean over examples drawn independently.
    """
    names = task.measures if measures is None else measures
    found: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {name: [] for name in names}
    for pair in task.tokens(model):
        for part in pair.split(batch_size):
            for name, values in _measure(model, part, names).items():
                found[name].append(values)
    rows = []
    for name, parts in found.items():
        clean, corrupt = (torch.cat(values).double() for values in zip(*parts, strict=True))
        rows.append(
            {
                "task": task.name,
                "measure": name,
                "clean": clean.mean().item(),
                "clean_se": _standard_error(clean),
                "corrupt": corrupt.mean().item(),
                "corrupt_se": _standard_error(corrupt),
                "n": len(clean),
            }
        )
    return pd.DataFrame(rows)


@torch.no_grad()
def _measure(
    model: LanguageModel, pair: PatchPair, names: tuple[str, ...]
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    clean, _ = model.run(pair.clean)
    corrupt, _ = model.run(pair.corrupt)
    scores = {name: metric(name, pair, reference=clean) for name in names}
    return {name: (score(clean), score(corrupt)) for name, score in scores.items()}


def _standard_error(values: torch.Tensor) -> float:
    return (values.std() / len(values) ** 0.5).item() if len(values) > 1 else float("nan")
