"""`circuitsae lens` and `fit-lens`: what the stream would say after each block, and translators that let it say it."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.console import Console

from circuitsae.commands.shared import (
    Bos,
    ChoiceOptions,
    Choices,
    CorpusPart,
    CorpusPartOptions,
    Dtype,
    WeightOptions,
    Weights,
    Wide,
    corpus_for,
    load_language_model,
    load_replacement,
    say,
    say_next,
)
from circuitsae.report.text import visible
from circuitsae.tables import Column, open_console, show_table
from transcoders.errors import InputError

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from circuitsae.lenses import DirectionLens, Lens


def lens(
    prompt: tyro.conf.Positional[str],
    /,
    *,
    lens: Path | None = None,
    node: tuple[str, ...] = (),
    position: int = -1,
    target: Annotated[str | None, tyro.conf.DisallowNone] = None,
    show: Literal["probability", "kl", "entropy", "target"] = "probability",
    top: int = 5,
    out: Path | None = None,
    model: str = "pocket",
    dictionaries: str | None = None,
    bos: Bos = None,
    device: str = "auto",
    dtype: Dtype = "float32",
    wide: Wide = False,
    weights: WeightOptions = Weights(),
    choices: ChoiceOptions = Choices(),
) -> None:
    """Read the stream after each block as if it were the last one: the logit lens, or a tuned one.

    With --node, features and error nodes are read instead: the tokens that each speaks for, by itself.

    Args:
        prompt: The text to run.
        lens: The file of a tuned lens, which `fit-lens` wrote; without, the plain logit lens.
        node: A feature that is active on the prompt, as LAYER.INDEX@POSITION, or an error node, 2.err@5; repeat it for
            several.
        position: After which token; counted from 0, or from the end with -1.
        target: A token to follow through the layers; default, the model's own first choice.
        show: What colours the picture.
        top: How many tokens to print of each.
        out: Where to write the picture of all positions, an offline HTML page.
        model: A hub name, a local Hugging Face folder, or "pocket".
        dictionaries: Of --node: a folder or hub name; the pocket model has its own.
        bos: Begin the prompt with the beginning-of-text token; default, as in the dictionaries' training, or as the
            model's own tokenizer does.
        device: auto (a GPU, but the CPU for what is faster there: see `doctor`), cpu, cuda, cuda:1 or mps.
        dtype: Precision of the model.
        weights: Which weights of the model.
        choices: Which of the dictionaries that the name offers.
    """
    if not node and dictionaries is not None:
        raise InputError("--dictionaries is for --node; a lens of the stream needs none.")
    from circuitsae.lenses import TunedLens, direction_lens, logit_lens

    console = open_console(wide)
    tuned = None if lens is None else TunedLens.load(lens)
    if node:
        loaded = load_replacement(model, dictionaries, device, dtype, bos, weights, choices)
        found = direction_lens(loaded, prompt, node, lens=tuned, top=top)
        _show_directions(console, found, top)
        _write(console, found.figure(), prompt, out)
        return
    language_model = load_language_model(model, device, dtype, weights).with_bos(bos)
    read = logit_lens(language_model, prompt, lens=tuned, target=target, top=top)
    _show_states(console, read, position)
    _write(console, read.figure(show), prompt, out)


def fit_lens(
    model: tyro.conf.Positional[str] = "pocket",
    /,
    *,
    out: Path,
    corpus: Annotated[str | None, tyro.conf.DisallowNone] = None,
    part: CorpusPartOptions = CorpusPart(),
    tokens: int = 100_000,
    held_out_tokens: int = 10_000,
    steps: int = 250,
    batch: int = 512,
    context: int = 128,
    separator: Annotated[str | None, tyro.conf.DisallowNone] = None,
    seed: int = 0,
    bos: Bos = None,
    device: str = "auto",
    dtype: Dtype = "float32",
    wide: Wide = False,
    weights: WeightOptions = Weights(),
) -> None:
    """Fit a tuned lens: of each state of the stream an affine map, trained to say what the model says in the end.

    Args:
        model: A hub name, a local Hugging Face folder, or "pocket".
        out: The file to write, .safetensors.
        corpus: A file or folder (.txt, .jsonl, .parquet), or a hub data set; the pocket model has its own.
        part: Which part of it.
        tokens: How many tokens to read and draw batches from.
        held_out_tokens: How many tokens of documents that are not fitted to judge it on.
        steps: Steps of training.
        batch: Tokens of a step.
        context: Tokens per row of text.
        separator: Text between documents; what the corpus has there unless given.
        seed: Of the order.
        bos: Begin each row with the beginning-of-text token; default, as the model's own tokenizer does.
        device: auto (a GPU, but the CPU for what is faster there: see `doctor`), cpu, cuda, cuda:1 or mps.
        dtype: Precision of the model.
        weights: Which weights of the model.
    """
    if out.suffix != ".safetensors":
        raise InputError(f"--out {out} is no .safetensors file; give it that suffix.")
    from circuitsae.lenses import fit_lens as fit
    from circuitsae.pocket.corpus import TRAINING

    console, text = open_console(wide), corpus_for(model, corpus, TRAINING, part)
    language_model = load_language_model(model, device, dtype, weights).with_bos(bos)
    found = fit(
        language_model, text, tokens=tokens, held_out_tokens=held_out_tokens, steps=steps, batch_tokens=batch,
        context=context, separator=separator, seed=seed, progress=True,
    )  # fmt: skip
    found.save(out)
    judged = found.frame()
    rows = [
        (_state(layer), f"{plain:.3f}", f"{tuned:.3f}")
        for layer, plain, tuned in judged.itertuples(index=False, name=None)
    ]
    show_table(console, "KL(model ‖ lens) per token held out, nats", _columns("state", "plain", "tuned"), rows)
    nearer = sum(tuned < plain for plain, tuned in zip(judged["plain"], judged["tuned"], strict=True))
    say(console, f"Tuned, {nearer} of {len(judged) - 1} states before the last are nearer to what the model says.")
    say(console, f"Written: {out.resolve()}")
    say_next(console, shlex.join(["circuitsae", "lens", "PROMPT", "--model", model, "--lens", str(out)]))


def _columns(first: str, *others: str) -> list[Column]:
    return [Column(first, text=True), *map(Column, others)]


def _state(layer: int) -> str:
    return "embeddings" if layer < 0 else f"after {layer}"


def _show_states(console: Console, read: "Lens", position: int) -> None:
    n = len(read.tokens)
    if not -n <= position < n:
        raise InputError(f"--position {position} is not on the prompt, which has {n} tokens.")
    pos = position % n
    of = visible(read.target_text or read.texts[int(read.top[-1, pos, 0])])
    columns = [Column("state", text=True), Column("says", text=True), Column("KL"), Column(f"P({of})"), Column("rank")]
    rows = []
    for row, name in enumerate(read.states):
        pairs = zip(read.top[row, pos], read.probabilities[row, pos], strict=True)
        says = ", ".join(f"{visible(read.texts[int(token)])} {p:.2f}" for token, p in pairs)
        figures = f"{read.kl[row, pos]:.3f}", f"{read.target[row, pos]:.4f}", str(int(read.rank[row, pos]) + 1)
        rows.append((name, says, *figures))
    show_table(console, f"after {pos} {visible(read.tokens[pos])}", columns, rows)
    first = (read.rank[:, pos] == 0).tolist()
    since = len(first) - next((i for i, leads in enumerate(reversed(first)) if not leads), len(first))
    where = f"leads from state {read.states[since]!r} on" if since < len(first) else "does not lead in the end"
    say(console, f"{of} {where} ({'tuned' if read.tuned else 'plain'} lens).")


def _show_directions(console: Console, found: "DirectionLens", top: int) -> None:
    names = {token: visible(text) for token, text in found.texts.items()}

    def listed(row: int, tokens: Any) -> str:
        return ", ".join(f"{names[int(token)]} {found.logits[row, token]:+.2f}" for token in tokens)

    columns = [Column("node", text=True), Column("promotes", text=True), Column("suppresses", 1, text=True)]
    rows = [
        (node, listed(row, found.promoted[row]), listed(row, found.suppressed[row]))
        for row, node in enumerate(found.nodes)
    ]
    show_table(console, "logits, by the straight path, less their mean", columns, rows)
    most = names[int(found.promoted[0, 0])]
    say(console, f"{found.nodes[0]} speaks most for {most}, of the {top} tokens shown of each node.")


def _write(console: Console, figure: "go.Figure", prompt: str, out: Path | None) -> None:
    if out is not None:
        say(console, f"HTML:  {page_of(figure, prompt, out).resolve()}")


def page_of(figure: "go.Figure", title: str, out: Path) -> Path:
    """An offline page with one figure."""
    from circuitsae.report.document import Document
    from transcoders.files import write_file

    document = Document(title)
    document.figure(figure)
    write_file(out, document.html().encode())
    return out
