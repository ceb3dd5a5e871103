"""`circuitsae patch` and `causal-trace`: a state of one run put into another, layer by layer and place by place."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
import tyro
from rich.console import Console

from circuitsae.commands.lens import page_of
from circuitsae.commands.shared import Bos, Dtype, WeightOptions, Weights, Wide, load_language_model, say
from circuitsae.tables import Column, open_console, show_table
from transcoders.errors import InputError

if TYPE_CHECKING:
    from circuitsae.lenses import Sweep

State = Literal["resid_post", "mlp_out", "attn_out"]


def patch(
    task: tyro.conf.Positional[str],
    /,
    *,
    prompts: int = 32,
    role: tuple[str, ...] = (),
    state: State = "resid_post",
    window: int = 1,
    direction: Literal["denoise", "noise"] = "denoise",
    metric: Annotated[str | None, tyro.conf.DisallowNone] = None,
    seed: int = 0,
    out: Path | None = None,
    model: str = "pocket",
    bos: Bos = None,
    device: str = "auto",
    dtype: Dtype = "float32",
    wide: Wide = False,
    weights: WeightOptions = Weights(),
) -> None:
    """Patch one state at a time between a task's clean and corrupt prompts: effects by layer and position or role.

    Args:
        task: A task's name, such as agreement, or a CSV or JSON file of pairs.
        prompts: Prompts of the task.
        role: A role of the task's prompts, such as S; repeat it for several. Prompts of several lengths need some.
        state: The stream after the block, or what its MLP or its attention gives.
        window: Layers that are patched together, of MLPs or attentions.
        direction: denoise: the clean state into the corrupt run. noise: the corrupt one into the clean run.
        metric: What is measured; default, the task's own.
        seed: Seed of the prompts.
        out: Where to write the picture, an offline HTML page.
        model: A hub name, a local Hugging Face folder, or "pocket".
        bos: Begin each prompt with the beginning-of-text token; default, as the model's own tokenizer does.
        device: auto (a GPU, but the CPU for what is faster there: see `doctor`), cpu, cuda, cuda:1 or mps.
        dtype: Precision of the model.
        weights: Which weights of the model.
    """
    if prompts < 1:
        raise InputError(f"--prompts {prompts} leaves nothing to patch; give at least 1.")
    from circuitsae.lenses import patch_sweep
    from circuitsae.tasks import load_task

    console = open_console(wide)
    loaded = load_language_model(model, device, dtype, weights).with_bos(bos)
    whole = load_task(task, loaded, prompts, seed)
    found = patch_sweep(
        loaded, whole, kind=state, direction=direction, window=window, roles=role, metric=metric
    )  # fmt: skip
    _show(console, found, f"{whole.name}, {len(whole)} prompts", out)


def causal_trace(
    prompt: tyro.conf.Positional[str],
    /,
    *,
    subject: str,
    answer: Annotated[str | None, tyro.conf.DisallowNone] = None,
    state: State = "resid_post",
    window: int = 1,
    noise: float = 3.0,
    samples: int = 10,
    seed: int = 0,
    out: Path | None = None,
    model: str = "pocket",
    bos: Bos = None,
    device: str = "auto",
    dtype: Dtype = "float32",
    wide: Wide = False,
    weights: WeightOptions = Weights(),
) -> None:
    """Drown the subject of a prompt in noise, put one state at a time back, and see where the answer comes back.

    Args:
        prompt: The text to run.
        subject: The part of it whose embeddings get noise.
        answer: The token whose probability is followed; default, the model's first choice.
        state: What is put back: the stream after the block, or what its MLP or its attention gives.
        window: Layers that are put back together, of MLPs or attentions.
        noise: Standard deviation of the noise, in those of the model's token embeddings.
        samples: How many times the noise is drawn.
        seed: Of the noise.
        out: Where to write the picture, an offline HTML page.
        model: A hub name, a local Hugging Face folder, or "pocket".
        bos: Begin the prompt with the beginning-of-text token; default, as the model's own tokenizer does.
        device: auto (a GPU, but the CPU for what is faster there: see `doctor`), cpu, cuda, cuda:1 or mps.
        dtype: Precision of the model.
        weights: Which weights of the model.
    """
    from circuitsae import lenses

    console = open_console(wide)
    loaded = load_language_model(model, device, dtype, weights).with_bos(bos)
    found = lenses.causal_trace(
        loaded, prompt, subject, answer=answer, kind=state, window=window, noise=noise, samples=samples, seed=seed
    )  # fmt: skip
    _show(console, found, prompt, out)


def _show(console: Console, found: "Sweep", title: str, out: Path | None) -> None:
    """The table, layers upwards, and what it says; where there is no room the columns of least effect are left out."""
    mean, low_high = found.mean, found.interval()
    strength = np.abs(mean).max(0).argsort().argsort()
    columns = [
        Column("layer"),
        *(Column(name, int(keep) + 1) for name, keep in zip(found.columns, strength, strict=True)),
    ]
    rows = [(str(layer), *(f"{value:+.3f}" for value in mean[layer])) for layer in reversed(range(len(mean)))]
    show_table(console, f"Change of {found.metric}, {found.direction}", columns, rows)
    before = slice(0, max(1, len(found.columns) - 1))
    layer, column = np.unravel_index(np.abs(mean[:, before]).argmax(), mean[:, before].shape)
    low, high = low_high[:, layer, column]
    interval = f" [{low:+.3f}, {high:+.3f}]" if np.isfinite(low) else ""
    ends = f"Mean {found.metric}: {found.base.mean():.3f}, and {found.source.mean():.3f} where states come from."
    most = f"layer {layer} at {found.columns[column]} does most: {mean[layer, column]:+.3f}{interval}"
    say(console, f"{ends} Before the last column {most} of {found.total:+.3f}.")
    if out is not None:
        say(console, f"HTML:  {page_of(found.figure(), title, out).resolve()}")
