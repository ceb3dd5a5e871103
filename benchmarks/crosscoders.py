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

*planted*: vectors of 64 directions in 32 dimensions, each active on 5 % of 40,000 tokens: 40 alike in both models, 8
with .25 of their size in the first, 8 of the first alone and 8 of the second alone; crosscoders of 80 latents, 4 active
per token. Columns: of the 16 directions of one model alone, the 8 weak ones and the 40 alike, how many the longer
decoder of a live exclusive latent is nearest to, and of how many such a latent is confirmed.

Mean (range) of three seeds, of weights and order, of *planted* of the vectors too; the tuned model is one.

    python benchmarks/crosscoders.py
"""

import argparse
import json
from collections.abc import Callable, Iterator, Mapping
from functools import cache
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
from transcoders.files import write_file, write_json
from transcoders.language_model import LanguageModel
from transcoders.training import SAEConfig

RESULTS = Path(__file__).parent / "results" / "crosscoders.md"
TOKENS, CONTEXT, STEPS, ROWS = 4_000, 96, 100, 12
WEAK = 0.25
"""Size of a weak direction in the first model."""
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
        "ν, 1 %": live["nu"].quantile(0.01), "ν, 99 %": live["nu"].quantile(0.99),
    }  # fmt: skip


def planted(kind: str, seed: int) -> dict[str, Any]:
    """A row for one kind of crosscoder, on directions that are known."""
    groups = {"shared": range(40), "weak": range(40, 48), "first": range(48, 56), "second": range(56, 64)}
    generator = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(64, 32, generator=generator), dim=1)
    a = torch.rand(40_000, 64, generator=generator) + 0.5
    a *= torch.rand(a.shape, generator=generator) < 0.05
    size = torch.ones(2, 64)
    size[0, list(groups["second"])], size[1, list(groups["first"])], size[0, list(groups["weak"])] = 0, 0, WEAK
    x = torch.stack([(a * each) @ directions for each in size], dim=1)
    how = {"k": 4} if KINDS[kind]["activation"] == "batchtopk" else {"target_l0": 4.0}
    config = SAEConfig(features=80, tokens=200_000, batch=256, lr=5e-3, seed=seed, **{**KINDS[kind], **how})
    crosscoder = train_crosscoder(None, x, config, progress=False)
    found = diff_models(None, crosscoder, x)
    live: Any = found.frame[found.frame["density"] > 0]
    exclusive = live[live["class"].isin(["first", "second"])]
    side = (exclusive["class"] == "second").astype(int)
    longer = torch.nn.functional.normalize(crosscoder.W_dec[side.tolist(), exclusive["latent"].tolist()], dim=1)
    of = (longer @ directions.T).argmax(dim=1).tolist() if len(exclusive) else []
    confirmed = [each is True for each in exclusive["confirmed"]]
    row: dict[str, Any] = {"crosscoder": kind, "FVU": float((x - crosscoder(x)).square().sum() / x.square().sum())}
    for name, which in (("alone in one", ("first", "second")), ("weak in one", ("weak",)), ("in both", ("shared",))):
        true = {i for group in which for i in groups[group]}
        row[f"{name}: exclusive"] = len({i for i in of if i in true})
        row[f"{name}: confirmed"] = len({i for i, sure in zip(of, confirmed, strict=True) if i in true and sure})
    return row


def kept(path: Path, measure: Callable[[], Any]) -> Any:
    """What was measured, once."""
    if not path.is_file():
        write_json(path, {"found": measure()})
    return json.loads(path.read_text())["found"]


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
        "--only", choices=("layers", "diff", "planted"), help="train what one of the parts needs, and write nothing"
    )
    given = parser.parse_args()
    torch.set_num_threads(1)
    seeds, work = range(given.seeds), given.work
    of_planted, of_layers, of_diff = [], [], []
    said = ""
    if given.only in (None, "planted"):
        for seed in seeds:
            of_planted += [kept(work / f"planted {k} {seed}.json", lambda k=k, s=seed: planted(k, s)) for k in KINDS]
    if given.only in (None, "diff"):
        pair = cache(lambda: ModelPair(load_model("pocket"), tuned_model(work)))
        said = kept(work / "losses.json", lambda: losses(pair()))
        for seed in seeds:
            of_diff += [kept(work / f"{k} {seed}.json", lambda k=k, s=seed: diff(pair(), k, work, s)) for k in KINDS]
    if given.only in (None, "layers"):
        for seed in seeds:
            of_layers += kept(work / f"layers {seed}.json", lambda s=seed: layers(given.sets, work, s))
    if given.only is None:
        parts = [table_text("crosscoders", str(__doc__).strip(), machine(), *rows_of(of_layers))]
        for found in (of_diff, of_planted):
            parts.append(table_text("", "", "", *rows_of(found)).partition("\n\nMachine: \n\n")[2])
        write_file(RESULTS, f"{parts[0]}\n{said}\n\n{parts[1]}\n{parts[2]}")


if __name__ == "__main__":
    main()
