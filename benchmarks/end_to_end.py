"""Claim: trained together in the place of all MLPs, dictionaries bring the replaced model nearer to the model.

Per-layer and cross-layer dictionaries of the embedded model, fine-tuned for a hundred steps of 768 tokens of the text
that they were trained on, and measured on held-out text: KL and the share of tokens with the same likeliest successor
when every MLP is replaced, attention patterns and norm scales held (what an attribution graph is made of) and live;
FVU and L0 as means over layers; how much of a small change is passed on (natural: cosine and ratio of norms, a layer;
carried: cosine of what reaches the last read through dictionaries in the place of all MLPs); and the relative error
of how logits change with an embedding, or with what a feature writes, of which the median over tokens is given.

    python benchmarks/end_to_end.py                                        # the embedded model
    python benchmarks/end_to_end.py --model M --dictionaries D --corpus T   # any other

"Each by itself" are as many steps on the same number of tokens by `train(start=…)`, with the derivative in the loss of
each layer alone. CPU-seconds are of a step of the whole, model included.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from jaxtyping import Int
from machine import write_table
from torch import Tensor
from torch.nn.functional import kl_div

from circuitsae import load_dictionaries, load_model
from circuitsae.pocket.corpus import TRAINING
from transcoders import DictionarySet, EndToEndConfig, LanguageModel, finetune, held_out_rows, train
from transcoders.data.corpora import CorpusSource
from transcoders.data.outliers import massive_tokens
from transcoders.evaluation import evaluate
from transcoders.evaluation.agreement import jacobian_agreement
from transcoders.evaluation.splice import Splice
from transcoders.held import HeldModel
from transcoders.kernels import keep_freed_memory
from transcoders.training.config_reading import config_of
from transcoders.training.end_to_end import logit_metric
from transcoders.training.end_to_end_run import EndToEndRun

REPOSITORY = Path(__file__).resolve().parents[1]
VARIANTS: dict[str, dict[str, Any] | None] = {
    "as trained": None,
    "each by itself, derivative .3": {},
    "KL alone": {"derivative": 0.0, "reconstruction": 0.0},
    "KL, FVU": {"derivative": 0.0},
    "KL, FVU, derivative .1": {"derivative": 0.1},
    "KL, FVU, derivative .3": {"derivative": 0.3},
    "KL, FVU, derivative 1": {"derivative": 1.0},
}
COLUMNS = (
    "dictionaries", "fine-tuned", "KL held", "same token", "KL live", "same token", "FVU", "L0", "natural cosine",
    "norm ratio", "carried cosine", "logits' change: error", "CPU-s a step",
)  # fmt: skip
Variant = Callable[[], DictionarySet]


@torch.no_grad()
def in_place(model: LanguageModel, d: DictionarySet, rows: Int[Tensor, "row pos"]) -> dict[str, float]:
    """KL and agreement with every MLP replaced, patterns and scales held and live."""
    first, found = d.provenance.first, {}
    sums = {name: [0.0, 0.0] for name in ("held", "live")}
    for group in rows.split(8):
        held = HeldModel(model, group, d.reads, d.writes)
        massive = massive_tokens(model, group, d.provenance.site_limits)
        finals = {
            "held": held.run(Splice(d, massive=massive).edits())[0],
            "live": model.run_to_unembedding(group, edits=Splice(d, massive=massive).edits())[0],
        }
        p = model.logits_of(held.final[:, first:].flatten(0, 1)).log_softmax(-1)
        for name, final in finals.items():
            q = model.logits_of(final[:, first:].flatten(0, 1)).log_softmax(-1)
            sums[name][0] += float(kl_div(q, p, reduction="sum", log_target=True))
            sums[name][1] += float((p.argmax(-1) == q.argmax(-1)).sum())
    tokens = rows[:, first:].numel()
    for name, (kl, same) in sums.items():
        found |= {f"{name}_kl": kl / tokens, f"{name}_same": same / tokens}
    return found


@torch.no_grad()
def logits_error(model: LanguageModel, d: DictionarySet, rows: Int[Tensor, "row pos"]) -> float:
    """Median over tokens of `‖Ĵ v − J v‖² / ‖J v‖²` of the centred logits."""
    from transcoders.training.end_to_end import derivative_errors, draw_changes

    run = EndToEndRun(model, d, rows, EndToEndConfig(rows=8))
    run.begin()
    errors, metric = [], logit_metric(model)
    for number, group in enumerate(rows.split(8)):
        held, usable = run.text(group)
        replacement = run.replacement
        reads = [replacement.normalised(layer, read[usable]) for layer, read in enumerate(held.clean.reads)]
        codes = [replacement.code(layer, x) for layer, x in enumerate(reads)]
        for again in range(4):
            generator = torch.Generator().manual_seed(10 * number + again)
            changed = draw_changes(replacement, held, usable, generator)
            error, reached = derivative_errors(replacement, held, usable, codes, changed, metric)
            errors.append(error[reached])
    return float(torch.cat(errors).median())


def measured(model: LanguageModel, d: DictionarySet, rows: Int[Tensor, "row pos"]) -> dict[str, float]:
    evaluation = evaluate(model, d, rows, loss_tokens=1)
    agreement = jacobian_agreement(model, d, rows[:: max(1, len(rows) // 16)][:16])
    carried = agreement.layers[-1].carried
    return in_place(model, d, rows) | {
        "fvu": mean(layer.fvu for layer in evaluation.layers),
        "l0": mean(layer.l0 for layer in evaluation.layers),
        "cosine": agreement.cosine,
        "ratio": agreement.norm_ratio,
        "carried": float("nan") if carried is None else carried.cosine,
        "logits": logits_error(model, d, rows[:32]),
    }


def by_itself(
    model: LanguageModel, d: DictionarySet, corpus: CorpusSource, config: EndToEndConfig, context: int
) -> DictionarySet:
    """As many steps on as many tokens, each layer for itself (a cross-layer transcoder: all on clean reads)."""
    batch = config.rows * context
    settings: dict[str, Any] = {
        "batch": batch, "tokens": config.tokens // batch * batch, "context": context, "derivative": 0.3,
        "derivative_share": 1.0, "warmup": config.warmup, "decay": config.decay, "log_every": 10_000,
        "sparsity_warmup": 0.0, "buffer_mb": 64, "remedy": "none", "separator": d.provenance.config.get("separator"),
    }  # fmt: skip
    run = EndToEndRun(model, d, corpus, config)
    run.begin()
    settings["lr"] = run.training.lr
    settings |= {"target_l0": run.training.target_l0}
    return train(model, corpus, config_of(d.kind, **settings), start=d, progress=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pocket")
    parser.add_argument("--dictionaries", nargs="*", default=["pocket-plt", "pocket-clt"])
    parser.add_argument("--corpus", help="Text; the embedded model has its own.")
    parser.add_argument("--tokens", type=int, default=76_800)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--held-out-tokens", type=int, default=6_000)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--only", nargs="*", default=list(VARIANTS))
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache" / "circuitsae-end-to-end.jsonl")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    model = load_model(arguments.model)
    corpus: CorpusSource = arguments.corpus or TRAINING
    kept: list[dict[str, Any]] = []
    if arguments.work.is_file():
        kept = [json.loads(line) for line in arguments.work.read_text().splitlines()]
    for name in arguments.dictionaries:
        d = load_dictionaries(name)
        context = int(d.provenance.config.get("context", 128))
        rows = held_out_rows(model, corpus, tokens=arguments.held_out_tokens, context=context)
        base = EndToEndConfig(tokens=arguments.tokens, rows=arguments.rows, lr=arguments.lr, context=context)
        for variant in arguments.only:
            key = [arguments.model, name, variant, arguments.tokens, arguments.rows, arguments.lr]
            if any(line["key"] == key for line in kept):
                continue
            began, settings = time.process_time(), VARIANTS[variant]
            if settings is None:
                made = d
            elif variant.startswith("each"):
                made = by_itself(model, d, corpus, base, context)
            else:
                made = finetune(model, d, corpus, replace(base, **settings), progress=False)
            steps = arguments.tokens // (arguments.rows * context)
            seconds = None if settings is None else (time.process_time() - began) / steps
            found = {**measured(model, made, rows), "seconds": seconds}
            kept.append({"key": key, "found": found})
            with arguments.work.open("a") as file:
                file.write(json.dumps(kept[-1]) + "\n")
            print(name, variant, {k: v if v is None else round(v, 3) for k, v in found.items()}, flush=True)
    write(kept, arguments)


def write(kept: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    digits = {
        "held_kl": 4, "held_same": 3, "live_kl": 4, "live_same": 3, "fvu": 4, "l0": 1, "cosine": 3, "ratio": 3,
        "carried": 3, "logits": 3, "seconds": 2,
    }  # fmt: skip
    rows = []
    for line in kept:
        _, name, variant, tokens, _, _ = line["key"]
        cells = ["" if (value := line["found"][key]) is None else f"{value:.{n}f}" for key, n in digits.items()]
        how = variant if line["found"]["seconds"] is None else f"{variant}, {tokens:,} tokens"
        rows.append((name, how, *cells))
    assert __doc__ is not None
    write_table("end_to_end", __doc__, COLUMNS, rows)


if __name__ == "__main__":
    main()
