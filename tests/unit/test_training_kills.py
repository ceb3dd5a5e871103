"""A run that is killed, interrupted or damaged goes on to the very same end; one that is complete says so."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import circuitsae
from circuitsae.cli import main
from tests.killed import RUNS, data, figures, source_of
from transcoders import SAEConfig, from_checkpoint, load_dictionaries, train
from transcoders.errors import FileFormatError, InputError, NotFiniteError, Stopped, WriteError
from transcoders.files import new_files, settle, write_file
from transcoders.training import Trainer
from transcoders.training.best import score
from transcoders.training.checkpoint import checkpoints, find_checkpoint
from transcoders.training.metrics import lines_after
from transcoders.training.run_folder import finished_dictionaries, identity_of
from transcoders.training.stopping import stop_requests

ROOT = Path(__file__).parents[2]
TOPK, SEVERAL = RUNS["sae-topk"], RUNS["several"]


@pytest.fixture(autouse=True)
def _hearing():
    """Python's own handler of Ctrl-C, which a shell turns off for what it starts in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def trained(out, configs=TOPK, **options) -> Any:
    return train(None, data(configs), configs, out=out, progress=False, **options)


def trainer_of(out, configs=TOPK, **options):
    return Trainer(source_of(configs), configs, out=out, **options)


def same(a: Any, b: Any) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def steps_of(out):
    return [int(folder.name[-8:]) for folder in checkpoints(out)]


# kills


def test_killed_at_any_touch_of_the_disk_a_run_goes_on_to_the_very_same_end(tmp_path):
    """Here before each thirteenth one; before all of them, and at random moments: tests/e2e/test_killed.py."""
    command = [sys.executable, "-m", "tests.killed", tmp_path, "disk", "--every", "13", "--first", "4", "sae-topk"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[1]) > 4


# a complete run


@pytest.mark.parametrize("configs", [TOPK, SEVERAL], ids=["one", "several"])
def test_a_complete_run_says_so_and_hands_out_what_it_saved(tmp_path, caplog, configs):
    first = trained(tmp_path, configs)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.name != ".training.lock"}
    again = trained(tmp_path, configs, resume=True)
    assert all(same(a, b) for a, b in zip(first, again, strict=True))
    assert {path: path.stat().st_mtime_ns for path in before} == before
    (record,) = caplog.records
    assert record.getMessage().startswith(f"The run in {tmp_path} is complete; ")


def test_a_complete_run_needs_no_checkpoint_and_one_that_is_not_complete_is_none(tmp_path):
    trainer = trainer_of(tmp_path)
    trainer.run(until=3, progress=False)
    trainer.finish()
    identity = identity_of(trainer.source, TOPK)
    assert finished_dictionaries(tmp_path, identity, torch.device("cpu")) is None
    (first,) = trained(tmp_path, resume=True)
    for folder in checkpoints(tmp_path):
        shutil.rmtree(folder)
    assert same(trained(tmp_path, resume=True)[0], first)
    with pytest.raises(InputError, match="belongs to another run: its lr is 0.01, this run's 0.5"):
        trained(tmp_path, [SAEConfig(**{**vars(TOPK[0]), "lr": 0.5})], resume=True)


def test_damaged_files_of_a_complete_run_are_made_again_and_others_are_not_touched(tmp_path, caplog):
    (first,) = trained(tmp_path)
    os.truncate(tmp_path / "weights.safetensors", 500)
    assert same(trained(tmp_path, resume=True)[0], first)
    assert same(load_dictionaries(tmp_path), first)
    assert "its files are damaged and made again" in caplog.text
    settings = tmp_path / "config.json"
    settings.write_text(settings.read_text() + " ")
    with pytest.raises(InputError, match="holds other dictionaries than it wrote; load them with load_dictionaries"):
        trained(tmp_path, resume=True)


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_again(tmp_path):
    (expected,) = trained(tmp_path / "whole")
    trainer_of(tmp_path / "killed").run(until=1, progress=False)
    assert not checkpoints(tmp_path / "killed")
    (found,) = trained(tmp_path / "killed", resume=True)
    assert same(found, expected)
    assert figures(tmp_path / "killed/metrics.jsonl") == figures(tmp_path / "whole/metrics.jsonl")


def test_a_start_that_fails_leaves_the_earlier_run_as_it_was(tmp_path):
    trainer_of(tmp_path).run(until=5, progress=False)
    spoilt = data(TOPK)
    spoilt[:] = torch.nan
    with pytest.raises(NotFiniteError, match="did not start"):
        train(None, spoilt, TOPK, out=tmp_path, progress=False)
    assert steps_of(tmp_path) == [2, 4]


def test_what_a_kill_left_half_written_is_swept_at_the_next_start(tmp_path):
    trainer_of(tmp_path).run(until=3, progress=False)
    left = tmp_path / f".checkpoint-00000004.{'0' * 32}.tmp"
    left.mkdir()
    (left / "state.safetensors").write_bytes(b"half")
    trained(tmp_path, resume=True)
    assert not left.exists()


# files that belong together


def test_files_that_belong_together_are_all_of_one_set_wherever_the_move_ends(tmp_path, monkeypatch):
    for moves in range(4):  # of what is written before them, then "a", then "b/c"
        folder = tmp_path / f"{moves}"
        for name in ("a", "b/c", "gone"):
            write_file(folder / name, "before")
        with pytest.raises(Killed):
            _killed_after(moves, folder, monkeypatch)
        settle(folder)
        expected = {"a": "after", "b/c": "after"} if moves else dict.fromkeys(("a", "b/c", "gone"), "before")
        there = {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}
        assert there == expected


class Killed(BaseException):
    """In the place of a kill: a process that is killed tidies nothing up."""


def _killed_after(moves, folder, monkeypatch):
    done, replace = [], Path.replace

    def until(path, target):
        if len(done) == moves:
            raise Killed
        done.append(path)
        return replace(path, target)

    with monkeypatch.context() as patch, new_files(folder, without=["gone"]) as temporary:
        write_file(temporary / "a", "after")
        write_file(temporary / "b" / "c", "after")
        patch.setattr(Path, "replace", until)
        if moves == 3:  # one more than there are to move
            patch.setattr(shutil, "rmtree", lambda path, **_: until(path, path))


# damage


def test_a_damaged_checkpoint_falls_back_to_the_one_before_it(tmp_path, caplog):
    (expected,) = trained(tmp_path / "whole")
    out = tmp_path / "out"
    trainer_of(out).run(until=5, progress=False)
    assert steps_of(out) == [2, 4]
    os.truncate(out / "checkpoint-00000004/state.safetensors", 2000)
    shutil.copytree(out, tmp_path / "both")
    (found,) = trained(out, resume=True)
    assert same(found, expected)
    assert steps_of(out) == [4, 6]
    assert "checkpoint-00000004/state.safetensors" in caplog.text
    assert f"Going on from the one before it, {out}/checkpoint-00000002." in caplog.text
    (tmp_path / "both/checkpoint-00000002/state.json").unlink()
    with pytest.raises(FileFormatError, match="There is no checkpoint before it, so leave out `resume` to train anew"):
        trained(tmp_path / "both", resume=True)


# which stay


@pytest.mark.parametrize(("keep_last", "stay"), [(1, [6]), (2, [4, 6]), (9, [2, 4, 6])])
def test_as_many_checkpoints_stay_as_are_asked(tmp_path, keep_last, stay):
    config = SAEConfig(**{**vars(TOPK[0]), "keep_last": keep_last, "keep_best": False})
    trained(tmp_path, [config])
    assert steps_of(tmp_path) == stay
    assert find_checkpoint(tmp_path).name.endswith("6")
    assert find_checkpoint(tmp_path, stay[0]) == checkpoints(tmp_path)[0]
    with pytest.raises(InputError, match="has no checkpoint 3; it has those of the steps"):
        find_checkpoint(tmp_path, 3)


def test_the_best_checkpoint_stays(tmp_path):
    config = SAEConfig(**{**vars(TOPK[0]), "keep_last": 1, "lr": 3.0, "warmup": 0.9, "decay": 0.0})  # ever worse
    trained(tmp_path, [config])
    metrics = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    means = {step: (metrics[step - 2]["fvu"] + metrics[step - 1]["fvu"]) / 2 for step in (2, 4, 6)}
    best = min(means, key=lambda step: means[step])
    assert best < 6
    assert steps_of(tmp_path) == [best, 6]
    folder = find_checkpoint(tmp_path, "best")
    assert json.loads((folder / "state.json").read_text())["score"] == pytest.approx(means[best], rel=1e-6)


def line(step, **values):
    return {
        "step": step,
        "loss": 0.5,
        "fvu": 0.4,
        "l0": 8.0,
        "sparsity": 2.0,
        "sparsity_weight": 0.05,
        "revival": 0.1,
    } | values


@pytest.mark.parametrize(
    ("settings", "lines", "expected"),
    [
        ({"activation": "topk"}, [line(1), line(2, loss=0.7)], 0.5),
        ({"activation": "topk", "k_start": 4.0}, [line(49), line(51)], None),  # k was still falling
        ({"activation": "topk", "k_start": 4.0}, [line(50), line(51)], 0.4),
        ({"activation": "jumprelu"}, [line(60)], 0.4),
        ({"activation": "jumprelu"}, [line(40)], None),  # the penalty's weight was still rising
        ({"activation": "jumprelu", "target_l0": 8.0}, [line(60, l0=7.8), line(61, l0=8.3)], 0.3),
        ({"activation": "jumprelu", "target_l0": 8.0}, [line(60, l0=8.5)], None),  # less sparse than asked
        ({"activation": "relu", "penalty": "p_anneal", "decay": 0.2}, [line(74)], None),
        ({"activation": "relu", "penalty": "p_anneal", "decay": 0.2}, [line(82)], 0.4),
        ({"activation": "topk"}, [], None),
    ],
)  # fmt: skip
def test_scores_compare_like_with_like(settings, lines, expected):
    config = SAEConfig(features=64, batch=10, tokens=1000, sparsity_warmup=0.5, **settings)
    found = score(config, lines)
    assert found == (None if expected is None else pytest.approx(expected))


def test_lines_after_a_step_are_read_back(tmp_path):
    trained(tmp_path)
    assert [found["step"] for found in lines_after(tmp_path / "metrics.jsonl", 4)] == [5, 6, 7]
    assert lines_after(tmp_path / "none.jsonl", 4) == []


def test_the_best_cannot_be_told_where_nothing_was_logged_in_between():
    with pytest.raises(InputError, match=r"log_every must be at most checkpoint_every \(10\); got 100"):
        SAEConfig(checkpoint_every=10, keep_best=True)


# a checkpoint as dictionaries


@pytest.mark.parametrize("name", ["sae-gated", "sae-ema", "plt-parts", "several"])
def test_a_checkpoint_gives_the_dictionaries_that_the_run_would_have_handed_out(tmp_path, name):
    configs = RUNS[name]
    trainer = trainer_of(tmp_path, configs)
    trainer.run(until=4, progress=False)
    for called, expected in zip(trainer.names, trainer.finish(), strict=True):
        found = from_checkpoint(tmp_path, name=called)
        assert same(found, expected)
        assert found.provenance.to_json() == json.loads(json.dumps(expected.provenance.to_json()))
        assert same(from_checkpoint(tmp_path / "checkpoint-00000004", name=called), expected)
        assert not same(from_checkpoint(tmp_path, which=2, name=called), expected)


def test_a_checkpoint_that_cannot_be_read_is_one_sentence(tmp_path):
    with pytest.raises(InputError, match="There is no checkpoint in"):
        from_checkpoint(tmp_path)
    trainer_of(tmp_path, SEVERAL).run(until=2, progress=False)
    with pytest.raises(InputError, match=r"no name was given; give name=… of 'clt-batchtopk', 'plt-gated-1'"):
        from_checkpoint(tmp_path)
    with pytest.raises(FileFormatError, match="holds checkpoints of training, and no dictionaries yet"):
        load_dictionaries(tmp_path)
    os.truncate(tmp_path / "checkpoint-00000002/state.safetensors", 2000)
    with pytest.raises(FileFormatError, match="may have been cut off"):
        from_checkpoint(tmp_path, name="plt-gated-1")


def test_every_command_takes_a_checkpoint_where_dictionaries_are_named(tmp_path):
    trainer = trainer_of(tmp_path, SEVERAL)
    trainer.run(until=2, progress=False)
    folder, expected = tmp_path / "checkpoint-00000002", trainer.finish()[1]
    assert same(circuitsae.load_dictionaries(folder, sae_id="plt-gated-1"), expected)
    found: Any = circuitsae.load_dictionaries(folder, sae_id="plt-gated-1", dtype="float64")
    assert {tensor.dtype for tensor in found.state_dict().values()} == {torch.float64}
    with pytest.raises(InputError, match="is a checkpoint, of which there is nothing to choose; leave out layers"):
        circuitsae.load_dictionaries(folder, sae_id="plt-gated-1", layers=[0])


def test_a_checkpoint_of_an_earlier_release_is_resumed_and_read(tmp_path):
    (expected,) = trained(tmp_path / "whole")
    out = tmp_path / "out"
    trainer_of(out).run(until=5, progress=False)
    (out / "run.json").unlink()
    for path in out.glob("checkpoint-*/state.json"):
        record = json.loads(path.read_text())
        for key in ("names", "provenance", "score"):
            del record[key]
        for config in record["run"]["config"]:
            config.pop("keep_last")
        path.write_text(json.dumps(record))
    read = from_checkpoint(out)
    assert read.provenance.tokens == 4 * 32
    assert read.provenance.model == "vectors"
    assert same(trained(out, resume=True)[0], expected)


# signals


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_run_after_a_step_with_a_checkpoint(tmp_path, number, code):
    (expected,) = trained(tmp_path / "whole")
    earlier, step = signal.getsignal(number), Trainer._train_step

    def interrupted(self, *args, **kwargs):
        if self.step == 2:
            signal.raise_signal(number)
        step(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_train_step", interrupted)
        with pytest.raises(
            Stopped, match=r"after step 3 of 7. The last good checkpoint is .*-00000003, from which"
        ) as raised:
            trained(tmp_path / "stopped")
    assert isinstance(raised.value, KeyboardInterrupt)
    assert raised.value.exit_code == code
    assert signal.getsignal(number) is earlier
    assert steps_of(tmp_path / "stopped") == [2, 3]
    (found,) = trained(tmp_path / "stopped", resume=True)
    assert same(found, expected)
    assert figures(tmp_path / "stopped/metrics.jsonl") == figures(tmp_path / "whole/metrics.jsonl")


def test_the_command_line_says_how_to_go_on_and_ends_as_a_shell_expects(tmp_path, monkeypatch, capsys):
    step = Trainer._train_step

    def interrupted(self, *args, **kwargs):
        signal.raise_signal(signal.SIGTERM)
        step(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "_train_step", interrupted)
    command = "train pocket --kind sae --features 8 --context 16 --tokens 64 --batch 32 --buffer-mb 1"
    with pytest.raises(SystemExit) as ended:
        main([*command.split(), "--out", str(tmp_path / "out"), "--evaluate-tokens", "0"])
    assert ended.value.code == 143
    said = capsys.readouterr().err
    assert "Training stopped after step 1 of 2. The last good checkpoint is" in said
    assert "--resume" in said


def test_a_second_signal_acts_at_once_and_handlers_of_others_stay():
    with stop_requests() as request:
        signal.raise_signal(signal.SIGINT)
        assert request.number == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    heard = []
    earlier = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        with stop_requests() as request:
            signal.raise_signal(signal.SIGTERM)
        assert (heard, request.number) == ([signal.SIGTERM], None)
    finally:
        signal.signal(signal.SIGTERM, earlier)


def test_in_another_thread_and_without_a_folder_signals_are_as_ever():
    found = []
    thread = threading.Thread(target=lambda: found.append(train(None, data(TOPK), TOPK, progress=False)))
    thread.start()
    thread.join()
    assert len(found) == 1
    with pytest.raises(KeyboardInterrupt) as raised, stop_requests(heard=False):
        signal.raise_signal(signal.SIGINT)
    assert not isinstance(raised.value, Stopped)


# a full disk


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 512 KB."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", place]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no file system may be mounted here")
    yield place
    subprocess.run(["umount", place], check=True)


def free(disk, n_bytes):
    """Fill a disk but for so many bytes; returns the file that does."""
    there = shutil.disk_usage(disk).free
    (disk / "filler").write_bytes(bytes(max(0, there - n_bytes)))
    return disk / "filler"


@pytest.mark.parametrize("left", [0, 4096, 12288, 24576])
def test_a_full_disk_is_one_error_and_the_run_goes_on_once_there_is_room(small_disk, tmp_path, left):
    """With no room for a line of metrics, for a checkpoint's record, for half of its tensors, for the final files."""
    (expected,) = trained(tmp_path / "whole")
    out = small_disk / "out"
    trainer = trainer_of(out)
    trainer.run(until=3, progress=False)
    filler = free(small_disk, left)

    def to_the_end():
        trainer.run(progress=False)
        trainer.finish()

    with pytest.raises(WriteError, match="is full; make room, or write to another place") as raised:
        to_the_end()
    assert str(raised.value).endswith("from which `resume` (--resume) goes on.")
    assert "\n" not in str(raised.value)
    assert not list(out.rglob("*.tmp"))
    filler.unlink()
    (found,) = trained(out, resume=True)
    assert same(found, expected)
    assert figures(out / "metrics.jsonl") == figures(tmp_path / "whole/metrics.jsonl")
