"""Claim: the plain engine's batched backward passes give the same rows as one target at a time, in less time."""

import time

import torch
from machine import write_table

import circuitsae as cs
from circuitsae.attribution.plain import plain_rows
from circuitsae.attribution.sources import Sources
from circuitsae.attribution.targets import feature_readers

PROMPT = "When John and Mary went to the store, John gave a drink to"


def main() -> None:
    model = cs.ReplacementModel(cs.load_model("pocket"), cs.load_dictionaries("pocket"))
    trace = model.trace(PROMPT)
    readers = feature_readers(model, trace, torch.arange(min(128, len(trace.features.value))))
    table, reference = [], None
    with torch.no_grad(), plain_rows(model, trace, Sources(model, trace)) as rows:
        rows(readers.take(slice(0, 2)))
        for batch in (1, 4, 16, 64, 128):
            start = time.perf_counter()
            found = torch.cat([rows(readers.take(slice(i, i + batch))) for i in range(0, len(readers.layer), batch)])
            elapsed = time.perf_counter() - start
            reference = (found, elapsed) if reference is None else reference
            error = (found - reference[0]).norm() / reference[0].norm()
            table.append([batch, f"{elapsed:.2f}", f"{reference[1] / elapsed:.1f}×", f"{error:.1e}"])
    print(
        write_table(
            "plain_engine",
            str(__doc__).strip(),
            ["targets a batch", f"seconds for {len(readers.layer)} targets", "against one at a time", "difference"],
            table,
        )
    )


if __name__ == "__main__":
    main()
