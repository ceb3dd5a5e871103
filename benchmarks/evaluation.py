"""Peak memory and CPU time of `evaluate` on SmolLM2-135M beside what `evaluation_cost` says beforehand; Linux only.

Run from the repository's root, with OMP_NUM_THREADS=1 and the folder of the model, which the shared folder's
`tools/smollm2_to_hf.py` makes. Writes benchmarks/results/evaluation.md.
"""

import ctypes
import gc
import json
import resource
import subprocess
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.machine import write_table
from benchmarks.trace_memory import resident

SHARED = Path(__file__).resolve().parents[2] / "shared/data"
DICTIONARIES = SHARED / "dictionaries/smollm2-135m-plt"
CORPUS = SHARED / "corpora/english_news_prose_speeches.txt"
CASES = ((10_000, 256),)
"""Tokens, and how many of them for losses."""
CONTEXT = 128
COLUMNS = (
    "tokens", "of them for losses", "peak MB above the model", "MB said beforehand", "CPU-seconds",
    "TFLOP said beforehand", "GFLOP/s", "mean FVU", "loss", "all layers replaced",
)  # fmt: skip
CLAIM = (
    "`evaluate` of per-layer transcoders (30 layers × 2,048 features) of SmolLM2-135M (vocabulary 49,152) on held-out "
    "English text in rows of 128 tokens, float32, by `benchmarks/evaluation.py`: memory of the process above what it "
    "holds with model and dictionaries loaded."
)


def measure(model_folder: str, tokens: int, loss_tokens: int) -> list[str]:
    """One row of the table."""
    from transcoders import evaluate, held_out_rows, load_dictionaries, load_model
    from transcoders.evaluation import evaluation_cost

    torch.set_num_threads(1)
    model, dictionaries = load_model(model_folder), load_dictionaries(DICTIONARIES)
    rows = held_out_rows(model, CORPUS, tokens=tokens, context=CONTEXT)
    said = evaluation_cost(model, dictionaries, tokens, context=CONTEXT, loss_tokens=loss_tokens)
    model.run(rows[:1])  # weights that are mapped from a file count once they have been read
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, used = resident("VmRSS"), resource.getrusage(resource.RUSAGE_SELF)
    found = evaluate(model, dictionaries, rows, loss_tokens=loss_tokens)
    now = resource.getrusage(resource.RUSAGE_SELF)
    seconds = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
    return [
        f"{tokens:,}", f"{loss_tokens:,}", f"{resident('VmHWM') - before:.0f}", f"{said.bytes / 2**20:.0f}",
        f"{seconds:.0f}", f"{said.flops / 1e12:.1f}", f"{said.flops / seconds / 1e9:.0f}", f"{found.fvu:.3f}",
        f"{found.loss:.3f}", f"{found.replaced.loss:.3f}",
    ]  # fmt: skip


def measured_apart(model_folder: str, tokens: int, loss_tokens: int) -> list[str]:
    """`measure` in a process of its own."""
    command = [sys.executable, __file__, model_folder, str(tokens), str(loss_tokens)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    if len(sys.argv) == 4:
        print(json.dumps(measure(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
    elif len(sys.argv) == 2 and SHARED.is_dir():
        torch.set_num_threads(1)
        print(write_table("evaluation", CLAIM, COLUMNS, [measured_apart(sys.argv[1], *case) for case in CASES]))
    else:
        print("Left out: give the folder of SmolLM2-135M, beside the shared folder's dictionaries.")
