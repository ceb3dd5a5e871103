"""A task by its name or from a file, what a model does on it, and the examples that it gets right."""

import inspect
import json
import random
from collections.abc import Callable
from dataclasses import replace
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, get_args

import pandas as pd
import torch

from circuitsae.tasks.task import Known, PatchPair, Task, metric
from circuitsae.tasks.wording import Lexicon
from transcoders.errors import InputError
from transcoders.language_model import LanguageModel

DEFAULT_N = 200
_BUILT_IN = {
    "ioi": "ioi",
    "greater-than": "greater_than",
    "two-hop": "two_hop",
    "induction": "induction",
    "agreement": "agreement",
    "docstring": "docstring",
    "facts": "facts",
    "antonyms": "antonyms",
    "pronouns": "pronouns",
}


def task_names() -> tuple[str, ...]:
    """The built-in tasks."""
    return tuple(_BUILT_IN)


def load_task(
    task: str | Path,
    model: LanguageModel,
    n: int | None = None,
    seed: int = 0,
    *,
    unfit: Literal["raise", "drop"] = "raise",
    corrupt: str | None = None,
    known: bool = False,
    **options: Any,
) -> Task:
    """A built-in task, made for this model, or the pairs of a CSV or JSON file, checked against its tokenizer.

    A built-in task has `n` examples (200), a file all of its own or `n` drawn from them; the same seed gives the same
    examples. `options` are those of the task's own function, such as `corruption` of `ioi`. Of a file, `corrupt`
    names the field of the corrupt prompts, and `unfit="drop"` leaves out the examples that the tokenizer splits
    (`refused` lists them) where `"raise"` raises `PromptError` with the list. A JSON list of IOI templates
    (`…templates.json`) makes IOI prompts with the names, places and objects of the files beside it. `known=True` keeps
    of the `n` examples those that the model gets right, as `known_examples` does.

    Raises `InputError` for an unknown task or option, for more examples than a file has, and where none is known.
    """
    if n is not None and n < 1:
        raise InputError(f"A task of {n} examples has nothing to measure; give n of at least 1.")
    name = str(task).replace("_", "-")
    if name in _BUILT_IN:
        if corrupt is not None:
            raise InputError(f"corrupt={corrupt!r} names a field of a file; {name} takes corruption= at most.")
        found = _generate(name, model, DEFAULT_N if n is None else n, seed, options)
    else:
        found = _from_file(_file_of(task, name), model, n, seed, unfit, corrupt, options)
    return known_examples(model, found) if known else found


def _file_of(task: str | Path, name: str) -> Path:
    path = Path(task).expanduser()
    if not path.exists() and path.suffix.lower() not in (".csv", ".json"):
        near = get_close_matches(name, _BUILT_IN, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"the tasks are: {', '.join(_BUILT_IN)}; or give a file."
        raise InputError(f"There is no task {str(task)!r}; {hint}")
    return path


def _generate(name: str, model: LanguageModel, n: int, seed: int, options: dict[str, Any]) -> Task:
    module = _BUILT_IN[name]
    function: Callable[..., Task] = getattr(import_module(f"circuitsae.tasks.{module}"), module)
    _check_options(name, function, options)
    return function(model, n, seed, **options)


def _check_options(name: str, function: Callable[..., Task], options: dict[str, Any]) -> None:
    parameters = inspect.signature(function).parameters
    known = [p.name for p in parameters.values() if p.kind is p.KEYWORD_ONLY]
    for option, value in options.items():
        if option not in known:
            raise InputError(f"The task {name} has no option {option!r}; its options are: {', '.join(known)}.")
        choices = get_args(parameters[option].annotation) if option == "corruption" else (value,)
        if value not in choices:
            raise InputError(f"The task {name} has no {option} {value!r}; choose one of: {', '.join(choices)}.")


def _from_file(
    path: Path,
    model: LanguageModel,
    n: int | None,
    seed: int,
    unfit: Literal["raise", "drop"],
    corrupt: str | None,
    options: dict[str, Any],
) -> Task:
    from circuitsae.tasks.files import ioi_word_lists, read_examples

    if _holds_templates(path):
        lists, refused = dict(ioi_word_lists(path)), []
        if unfit == "drop":
            lexicon = Lexicon(model)
            kinds = [kind for kind in lists if kind != "templates"]
            lists |= {kind: lexicon.single(kind, None, lists[kind]) for kind in kinds}
            refused = lexicon.refused
        task = _generate("ioi", model, DEFAULT_N if n is None else n, seed, {**lists, **options})
        return replace(task, refused=(*refused, *task.refused))
    if options:
        raise InputError(f"A file of pairs takes no option {next(iter(options))!r}; options are for built-in tasks.")
    examples = tuple(read_examples(path, corrupt=corrupt))
    measures = ("log_prob", "top1")
    if all(example.boundary for example in examples):
        metric, measures = "prob_diff", ("prob_diff", "sharpness", "accuracy", "top1")
    elif all(example.wrong for example in examples):
        metric, measures = "logit_diff", ("logit_diff", "prob_diff", "accuracy", "top1")
    else:
        metric = "log_prob"
    task = Task(path.stem, examples, metric, measures)
    if unfit == "drop":
        task = task.fitting(model)
    else:
        task.tokens(model)
    return _drawn(task, n, seed, path)


def _drawn(task: Task, n: int | None, seed: int, path: Path) -> Task:
    if n is None:
        return task
    if n > len(task):
        raise InputError(f"{path} has {len(task)} examples that {n} cannot be drawn from; give a smaller n.")
    rows = sorted(random.Random(f"task file:{seed}").sample(range(len(task)), n))
    return replace(task, examples=tuple(task.examples[i] for i in rows))


def _holds_templates(path: Path) -> bool:
    from circuitsae.tasks.files import is_template_list

    if path.suffix.lower() != ".json" or not path.is_file():
        return False
    try:
        return is_template_list(json.loads(path.read_text(encoding="utf-8")))
    except (json.JSONDecodeError, UnicodeDecodeError):
        return False  # read_examples says what is wrong with it


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


RIGHT = ("accuracy", "top1", "logit_diff", "prob_diff", "sharpness")
"""Measures that are above 0 where the model is right."""


@torch.no_grad()
def known_examples(model: LanguageModel, task: Task, *, measure: str | None = None, batch_size: int = 64) -> Task:
    """The task with those of its examples that the model gets right; its `known` says how many of how many.

    Right is a clean prompt on which `measure` is above 0: unless named `accuracy`, the best answer above every wrong
    one, or `top1` where examples have no wrong answers. `behaviour` measures all examples.

    Raises `InputError` for another measure, and where the model gets no example right.
    """
    name = measure or ("accuracy" if all(example.wrong for example in task.examples) else "top1")
    if name not in RIGHT:
        raise InputError(f"{name!r} does not say what is right; choose one of: {', '.join(RIGHT)}.")
    right: list[int] = []
    for pair in task.tokens(model):
        for part in pair.split(batch_size):
            logits, _ = model.run(part.clean)
            right += part.index[task.score(part, name)(logits) > 0].tolist()
    if not right:
        raise InputError(
            f"{model.name} gets none of the {len(task)} examples of {task.name!r} right ({name} > 0); "
            "take more examples, another measure or another model."
        )
    return replace(task.take(sorted(right)), known=Known(len(right), len(task), name, model.name))


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
