"""Training under torchrun, from the command line: what one process comes to, and a rank that is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = "--kind clt --activation batchtopk --k 16 --features 64 --tokens 40k --log-every 20 --checkpoint-every 10"
pytestmark = pytest.mark.slow


def command(out, *more, ranks=2):
    """`torchrun … circuitsae train pocket …`."""
    start = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    train = ["-m", "circuitsae", "train", "pocket", *SETTINGS.split(), "--out", str(out), "--evaluate-tokens", "0"]
    return [sys.executable, *start, *train, *more]


def started(*arguments, **options):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command(*arguments, **options), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def run(*arguments, **options):
    process = started(*arguments, **options)
    printed, errors = process.communicate(timeout=280)
    assert process.returncode == 0, errors
    return printed


@pytest.mark.parametrize("how", ["data", "features"])
def test_two_processes_of_torchrun_come_to_what_one_does(tmp_path, how):
    run(tmp_path / "one", ranks=1)
    printed = run(tmp_path / "two", "--parallel", how)
    assert printed.count("Dictionaries:") == 1
    one, two = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    assert len(one) == len(two) > 2
    for first, second in zip(one, two, strict=True):
        for key in ("loss", "fvu", "l0", "dead"):
            assert second[key] == pytest.approx(first[key], rel=1e-4), key
    expected, found = (load_file(tmp_path / name / "weights.safetensors") for name in ("one", "two"))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-4 * float(tensor.abs().max()), msg=name)


def test_a_killed_rank_ends_torchrun_and_its_run_goes_on_to_the_very_weights(tmp_path):
    run(tmp_path / "unbroken")
    out = tmp_path / "killed"
    process = started(out)
    deadline = time.monotonic() + 200
    while not list(out.glob("checkpoint-*")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    (worker, *_) = [pid for pid in children(process.pid) if environment(pid).get("RANK") == "1"]
    os.kill(worker, signal.SIGKILL)
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "Rank 0 of 2 no longer hears the others" in " ".join(errors.split())
    assert "from which `resume` goes on" in " ".join(errors.split())
    run(out, "--resume")
    expected, found = (load_file(folder / "weights.safetensors") for folder in (tmp_path / "unbroken", out))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def environment(pid):
    pairs = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    return dict(pair.split("=", 1) for pair in pairs if "=" in pair)
