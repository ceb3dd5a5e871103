"""SIGKILL before every touch of the disk, and at random moments: what `make test-slow` and a release ask."""

import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.killed import RUNS

ROOT = Path(__file__).parents[2]


def killed(*arguments):
    command = [sys.executable, "-m", "tests.killed", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=3600)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def kills(printed):
    return [int(number) for number in re.findall(r"(\d+) kills", printed)]


@pytest.mark.slow
def test_killed_before_every_touch_of_the_disk(tmp_path):
    assert min(kills(killed(tmp_path, "disk", "sae-topk", "several"))) > 50


@pytest.mark.slow
def test_killed_before_some_touches_of_the_disk_for_every_kind_and_activation(tmp_path):
    assert min(kills(killed(tmp_path, "disk", "--every", 11, "--first", random.randint(1, 11), *RUNS))) > 4


@pytest.mark.slow
def test_killed_at_ten_random_moments(tmp_path):
    """Also while a checkpoint or the last files are written, as the number of such kills says."""
    seed = random.randrange(10**6)
    printed = killed(tmp_path, "time", "--kills", 10, "--seed", seed, "sae-topk", "sae-jumprelu", "clt", "several")
    assert min(kills(printed)) >= 5, f"seed {seed}"
    assert sum(map(int, re.findall(r"(\d+) of them", printed))) > 0, f"seed {seed}"
