"""Question: what does one crosscoder of all layers keep of what an autoencoder for each layer does? And which latents
of a crosscoder over two models are of one alone, where one was trained from the other?

The pocket model. *layers*: a BatchTopK crosscoder over resid_post of all four layers, 512 latents, 64 active per token,
beside four BatchTopK autoencoders of 512 features, 16 active per token each: equal parameters (but for biases), equal
active latents in all, the same 300,000 tokens, rate and batch. *FVU* and *recovered* (loss recovered against the mean,
one site replaced) on 4,000 tokens that no training used. A site's reconstruction by the crosscoder reads all layers,
later ones too. *latents at n*: shares of those that fire whose scaled decoder norm is a tenth of their largest at n
sites.

*diff*: pocket, and pocket after 100 steps on text half of which has its words in reverse order; crosscoders of 256
latents over resid_post of layer 2 in both, 16 active per token, 100,000 tokens of both texts: BatchTopK, and ReLU with
an L1 penalty steered to the same L0. *tuned alone*, *pocket alone*: live latents with ν > .9, ν < .1; *confirmed*: of
these by latent scaling; *on reversed text*: the share of reversed text among the tokens on which latents of *tuned
alone* fire, and beside it that of all live latents (means over latents). *shared*: live latents with ν from .4 to .6,
and the median cosine of their two decoders.

Mean (range) of three seeds, of weights and order; the tuned model is one.

    python benchmarks/crosscoders.py
"""

import argparse
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import machine, table_text
from trained_sets import BUFFER_MB, WORK, setting, trained_sets

from circuitsae.loading import load_model
from circuitsae.pocket.corpus import documents
from transcoders.crosscoders import (
    Crosscoder,
    ModelPair,
    diff_models,
    evaluate_crosscoder,
    load_crosscoder,
    train_crosscoder,
)
from transcoders.data import Corpus, take_rows
from transcoders.evaluation import evaluate
from transcoders.files import write_file
from transcoders.language_model import LanguageModel
from transcoders.training import SAEConfig

RESULTS = Path(__file__).parent / "results" / "crosscoders.md"
TOKENS, CONTEXT, STEPS, ROWS = 4_000, 96, 100, 12
COMMON: Mapping[str, Any] = {
    "batch": 512, "lr": 2e-3, "context": CONTEXT, "separator": "\n", "buffer_mb": BUFFER_MB, "checkpoint_every": 50,
    "keep_last": 1, "log_every": 50,
}  # fmt: skip
KINDS: Mapping[str, Mapping[str, Any]] = {
    "BatchTopK": {"activation": "batchtopk", "k": 16},
    "ReLU, L1": {"activation": "relu", "penalty": "l1", "target_l0": 16.0},
}


def trained(model: LanguageModel, text: Corpus, config: SAEConfig, out: Path) -> Crosscoder:
    """Trained once; a run that was killed goes on."""
    if (out / "crosscoder.json").is_file():
        return load_crosscoder(out)
    return train_crosscoder(model, text, config, out=out, resume=(out / "run" / "run.json").is_file(), progress=False)


def layers(sets: Path, work: Path, seed: int) -> list[dict[str, Any]]:
    """A row for the crosscoder and one for the autoencoders."""
    where = setting("pocket", TOKENS)
    saes = trained_sets("pocket", where, seed=seed, work=sets)["SAE BatchTopK"]
    config = SAEConfig(features=512, activation="batchtopk", k=64, tokens=300_000, seed=seed, **COMMON)
    assert isinstance(where.corpus, Corpus)
    crosscoder = trained(where.model, where.corpus, config, work / f"layers {seed}")
    found = evaluate_crosscoder(where.model, crosscoder, where.rows)
    apart = evaluate(where.model, saes, where.rows, jacobian_tokens=0)
    live = sum(found.spread)
    rows: list[dict[str, Any]] = [
        {"dictionary": "one crosscoder", "L0": found.l0, "dead": found.dead},
        {
            "dictionary": "four autoencoders", "L0": sum(layer.l0 for layer in apart.layers),
            "dead": float(np.mean([layer.dead for layer in apart.layers])),
        },
    ]  # fmt: skip
    for i in range(where.model.n_layers):
        sides = (found.sites[i].fvu, found.sites[i].recovered), (apart.layers[i].fvu, apart.layers[i].recovered_mean)
        for row, (fvu, recovered) in zip(rows, sides, strict=True):
            row[f"FVU, {i}"], row[f"recovered, {i}"] = fvu, recovered
    rows[0] |= {f"latents at {n}": count / live for n, count in enumerate(found.spread, start=1)}
    return rows


def reversed_words(seed: str) -> Iterator[str]:
    """Documents with their words in reverse order."""
    for text in documents(seed):
        yield " ".join(reversed(text.split(" ")))


def both_texts(seed: str) -> Iterator[str]:
    """Rows' worth of ordinary documents and of reversed ones by turns."""
    plain, backwards = documents(f"{seed}:plain"), reversed_words(f"{seed}:reversed")
    while True:
        yield "\n".join(islice(plain, 8))
        yield "\n".join(islice(backwards, 8))


def tuned_model(work: Path) -> LanguageModel:
    """Pocket after some steps on both texts; trained once."""
    model, path = load_model("pocket"), work / "tuned.pt"
    if not path.is_file():
        parameters = [p.requires_grad_(True) for p in model.bridge.parameters()]
        optimizer = torch.optim.Adam(parameters, lr=5e-4)
        rows = take_rows(model, list(islice(both_texts("tune"), STEPS * ROWS)), rows=STEPS * ROWS, context=CONTEXT)
        for step, batch in enumerate(rows.split(ROWS)):
            logits, _ = model.run(batch)
            loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % 20 == 0:
                print(f"step {step}: loss {float(loss):.3f}", flush=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.bridge.state_dict(), path)
    model.bridge.load_state_dict(torch.load(path, weights_only=True))
    model.bridge.requires_grad_(False)
    model.name = "tuned"
    return model


def diff(pair: ModelPair, kind: str, work: Path, seed: int) -> dict[str, Any]:
    """A row for one kind of crosscoder."""
    config = SAEConfig(features=256, tokens=100_000, seed=seed, **COMMON, **KINDS[kind])
    crosscoder = trained(pair, Corpus("both", lambda: both_texts("diff"), "\n"), config, work / f"{kind} {seed}")
    texts = [list(islice(stream, 8 * TOKENS // CONTEXT)) for stream in (documents("held"), reversed_words("held"))]
    sides = [take_rows(pair, ["\n".join(t)], rows=TOKENS // CONTEXT // 2, context=CONTEXT) for t in texts]
    found = diff_models(pair, crosscoder, torch.cat(sides))
    quality = evaluate_crosscoder(pair, crosscoder, torch.cat(sides), losses=False)
    live: Any = found.frame[found.frame["density"] > 0]
    fired = [diff_models(pair, crosscoder, rows).frame["density"][live.index] for rows in sides]
    reverse = fired[1] / (fired[0] + fired[1])
    of = {name: live[live["class"] == name] for name in ("first", "second", "shared")}
    return {
        "crosscoder": kind, "L0": quality.l0, "FVU, pocket": quality.sites[0].fvu, "FVU, tuned": quality.sites[1].fvu,
        "tuned alone": len(of["second"]), "confirmed": int(of["second"]["confirmed"].eq(True).sum()),
        "on reversed text": reverse[of["second"].index].mean(), "all on reversed text": reverse.mean(),
        "pocket alone": len(of["first"]), "confirmed there": int(of["first"]["confirmed"].eq(True).sum()),
        "shared": len(of["shared"]), "cosine": of["shared"]["cosine"].median(), "dead": 1 - len(live) / 256,
    }  # fmt: skip


@torch.no_grad()
def losses(pair: ModelPair) -> str:
    """Cross-entropy of both models on both texts."""
    said = []
    for name, stream in (("ordinary", documents("held")), ("reversed", reversed_words("held"))):
        rows = take_rows(pair, ["\n".join(islice(stream, 200))], rows=10, context=CONTEXT)
        for model in (pair.first, pair.second):
            logits, _ = model.run(rows)
            loss = torch.nn.functional.cross_entropy(logits[:, 1:-1].flatten(0, 1), rows[:, 2:].flatten())
            said.append(f"{model.name} on {name} text {float(loss):.2f}")
    return f"Cross-entropy per token, nats: {', '.join(said)}."


def spread(values: list[float]) -> str:
    """Mean and range of the seeds."""
    known = [value for value in values if value == value]
    if not known:
        return "–"
    form = ".0f" if all(float(value).is_integer() for value in known) else ".3f"
    mean, low, high = np.mean(known), min(known), max(known)
    return f"{mean:{form if form == '.3f' else '.1f'}} ({low:{form}}–{high:{form}})"


def rows_of(found: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """A table's columns, and a row for each name, over the seeds."""
    (name, *columns) = found[0]
    names = list(dict.fromkeys(row[name] for row in found))
    of = {each: [row for row in found if row[name] == each] for each in names}
    cells = [[each, *(spread([r.get(c, float("nan")) for r in of[each]]) for c in columns)] for each in names]
    return [name, *columns], cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=WORK.parent / "crosscoders", help="where crosscoders are kept")
    parser.add_argument("--sets", type=Path, default=WORK, help="where benchmarks/trained_sets.py keeps its sets")
    parser.add_argument(
        "--only", choices=("layers", "diff"), help="train what one of the parts needs, and write nothing"
    )
    given = parser.parse_args()
    torch.set_num_threads(1)
    of_layers: list[dict[str, Any]] = []
    of_diff: list[dict[str, Any]] = []
    said = ""
    if given.only != "layers":
        pair = ModelPair(load_model("pocket"), tuned_model(given.work))
        said = losses(pair)
        print(said, flush=True)
        for seed in range(given.seeds):
            of_diff += [diff(pair, kind, given.work, seed) for kind in KINDS]
            print(*of_diff[-len(KINDS) :], sep="\n", flush=True)
    if given.only != "diff":
        for seed in range(given.seeds):
            of_layers += layers(given.sets, given.work, seed)
            print(*of_layers[-2:], sep="\n", flush=True)
    if given.only is None:
        text = table_text("crosscoders", str(__doc__).strip(), machine(), *rows_of(of_layers))
        columns, rows = rows_of(of_diff)
        more = table_text("x", "", "", columns, rows).partition("| crosscoder")
        write_file(RESULTS, f"{text}\n{said}\n\n{more[1]}{more[2]}")


if __name__ == "__main__":
    main()
