"""Claim: autograd's batched backward passes give the same rows as one target at a time, in less time."""

import time

import torch
from machine import write_table

import circuitsae as cs
from circuitsae.attribution.autograd import autograd_rows
from circuitsae.attribution.nodes import feature_targets

PROMPT = "When John and Mary went to the store, John gave a drink to"


def main() -> None:
    model = cs.ReplacementModel(cs.load_model("pocket"), cs.load_dictionaries("pocket"))
    trace = model.trace(PROMPT)
    targets = feature_targets(model, trace, torch.arange(min(128, len(trace.features.value))))
    table, reference = [], None
    with torch.no_grad(), autograd_rows(model, trace) as rows_of:
        rows_of(targets.take(slice(0, 2)))
        for batch in (1, 4, 16, 64, 128):
            start = time.perf_counter()
            found = torch.cat([rows_of(targets.take(slice(i, i + batch))) for i in range(0, len(targets.layer), batch)])
            elapsed = time.perf_counter() - start
            reference = (found, elapsed) if reference is None else reference
            error = (found - reference[0]).norm() / reference[0].norm()
            table.append([batch, f"{elapsed:.2f}", f"{reference[1] / elapsed:.1f}×", f"{error:.1e}"])
    print(
        write_table(
            "autograd",
            str(__doc__).strip(),
            ["targets a batch", f"seconds for {len(targets.layer)} targets", "against one at a time", "difference"],
            table,
        )
    )


if __name__ == "__main__":
    main()
