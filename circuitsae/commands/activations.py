"""`circuitsae activations`: a model's activations on a text, written once for any number of trainings."""

import re
import shlex
from pathlib import Path
from typing import Annotated, Literal, get_args

import tyro

from circuitsae.commands.shared import (
    Bos,
    CorpusPart,
    CorpusPartOptions,
    WeightOptions,
    Weights,
    corpus_for,
    load_language_model,
    say,
    say_next,
)
from circuitsae.tables import open_console
from transcoders.errors import InputError
from transcoders.sites import Site, SiteKind
from transcoders.training.config import Documents


def activations(
    model: tyro.conf.Positional[str],
    /,
    *,
    corpus: str | None = None,
    part: CorpusPartOptions = CorpusPart(),
    out: Path,
    site: tuple[str, ...] = (),
    tokens: Annotated[int | None, tyro.conf.DisallowNone] = None,
    context: int = 128,
    documents: Documents = "packed",
    separator: Annotated[str | None, tyro.conf.DisallowNone] = None,
    bos: Bos = None,
    first: int = 1,
    outliers: float = 20.0,
    dtype: Literal["float32", "bf16", "int8"] = "float32",
    shard_mb: int = 512,
    seed: int = 0,
    job: str = "1/1",
    device: str = "auto",
    weights: WeightOptions = Weights(),
) -> None:
    """Write a model's activations on a text to a folder, which `train --corpus FOLDER` reads, again and again.

    A job that was stopped goes on where it was when it is started again.

    Args:
        model: A hub name, a local Hugging Face folder, or "pocket".
        corpus: A file or folder (.txt, .jsonl, .parquet), or a hub data set; the pocket model has its own text.
        part: Which part of a data set.
        out: Folder for the shards.
        site: What is written: resid_post, or mlp_in and mlp_out for transcoders, of every layer; or of one, 3.mlp_in.
        tokens: As many rows of text as hold so many tokens; all of the text unless given.
        context: Tokens per row of text.
        documents: What becomes of the ends of documents, as in `train`.
        separator: Text between documents; what the corpus has there unless given.
        bos: Begin each row with the beginning-of-text token, or not; as the model's own tokenizer does unless given.
        first: The first position of each row that is kept; those before are outliers in most models.
        outliers: A token is left out where its norm is more than this many times the site's median; 0 for none.
        dtype: float32, bf16, or int8: 8 bits with a scale for each 64 coordinates, then zstd.
        shard_mb: Memory for the activations that are shuffled together and written as one file.
        seed: Of the order.
        job: 2/8 writes the second of eight shares; the job that ends last completes the folder.
        device: auto (a GPU, but the CPU for what is faster there: see `doctor`), cpu, cuda, cuda:1 or mps.
        weights: Which weights of the model.
    """
    share = _share(job)
    if not site:
        raise InputError("No site was named; give --site resid_post, or --site mlp_in --site mlp_out for transcoders.")
    places: list[Site | SiteKind] = [_place(name) for name in site]
    if corpus is None and tokens is None and model == "pocket":
        raise InputError("The pocket model's own text has no end; say how much of it is read, such as --tokens 2M.")

    from circuitsae.pocket.corpus import TRAINING
    from transcoders.data import write_activations

    console = open_console()
    text = corpus_for(model, corpus, TRAINING, part)
    language_model = load_language_model(model, device, "float32", weights)
    store = write_activations(
        language_model, text, out, sites=places, tokens=tokens, context=context, documents=documents,
        separator=separator, bos=bos, first=first, outliers=outliers, dtype=dtype, shard_mb=shard_mb, seed=seed,
        job=share,
    )  # fmt: skip
    if store is None:
        say(console, f"Job {job} has written its shards to {out}; the folder is complete when all jobs have ended.")
        return
    say(
        console,
        f"Activations: {out}, {store.tokens:,} tokens at {len(store.sites)} sites, {store.bytes / 1e6:,.1f} MB, "
        f"{store.smaller:.1f} times smaller than float32",
    )
    kind = "sae" if len({place.kind for place in store.sites}) == 1 else "clt"
    how = ["--kind", kind, *(["--site", store.sites[0].kind] if kind == "sae" else []), *weights.words()]
    say_next(console, f"circuitsae train {shlex.join([model, '--corpus', str(out), *how, '--out', 'FOLDER'])}")


def _place(name: str) -> Site | SiteKind:
    return next((kind for kind in get_args(SiteKind) if kind == name), None) or Site.parse(name)


def _share(job: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", job)
    if found is None:
        raise InputError(f"--job {job!r} names no share; write it like 2/8, the second of eight.")
    return int(found[1]), int(found[2])
