"""Bad numbers, full disks, damaged checkpoints, a second training: one sentence, and nothing half-written."""

import errno
import json
import logging
import os
import shutil
from typing import Any

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file

import transcoders.files
from transcoders import SAEConfig, TranscoderConfig, random_model, train
from transcoders.data.activations import ActivationStream, sites_of
from transcoders.data.tokens import TokenRows
from transcoders.errors import CheckFailedError, FileFormatError, InputError, NotFiniteError, WriteError
from transcoders.files import file_hash
from transcoders.sites import Site
from transcoders.training import Trainer, VectorSource
from transcoders.training.checkpoint import _LOCK
from transcoders.training.metrics import MetricsFile

COMMON: dict[str, Any] = {"features": 24, "batch": 16, "tokens": 640, "k": 3, "log_every": 5, "checkpoint_every": 10,
                          "keep_last": 1}  # fmt: skip
SAE = SAEConfig(activation="jumprelu", **COMMON)
N = 600


def vectors(seed=0):
    return torch.randn(N, 8, generator=torch.Generator().manual_seed(seed))


def later_row(step):
    """A row that is first seen in a step, counted from one."""
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    return int(order[(step - 1) * 16 + 3])


def partly_trained(out, until=25, config=SAE):
    Trainer(VectorSource(vectors(), None, seed=0), [config], out=out).run(until=until, progress=False)


# numbers


def test_a_row_that_is_not_a_number_stops_training_with_its_place_and_the_last_good_checkpoint(tmp_path):
    x = vectors()
    x[later_row(27), 5] = torch.nan
    with pytest.raises(NotFiniteError) as caught:
        train(None, x, SAE, progress=False, out=tmp_path)
    assert isinstance(caught.value, CheckFailedError)  # exit code 1
    message = str(caught.value)
    assert message.startswith("Training stopped at step 27: the activations at 0.resid_post are not finite (row 3 of")
    assert f"row {later_row(27)} of the vectors" in message
    assert f"The last good checkpoint is {tmp_path / 'checkpoint-00000020'}" in message
    assert all(t.isfinite().all() for t in load_file(tmp_path / "checkpoint-00000020/state.safetensors").values())
    assert not (tmp_path / "config.json").exists()
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()][-1] == 25


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("kernels", ["dense", "sparse"])
def test_neither_kernels_nor_the_side_hide_a_row_that_is_not_a_number(side, kernels):
    pair = vectors(), vectors(1)
    pair[side][later_row(12)] = torch.inf
    with pytest.raises(
        NotFiniteError, match=rf"step 12: the activations at 0\.mlp_{('in', 'out')[side]}.*no checkpoint"
    ):
        train(None, pair, TranscoderConfig(activation="jumprelu", kernels=kernels, **COMMON), progress=False)


def test_an_infinite_loss_stops_training_and_is_not_exported(tmp_path):
    x = vectors()
    x[later_row(12)] = 1e30  # finite, but its square is not
    trainer = Trainer(VectorSource(x, None, seed=0), [SAE], out=tmp_path)
    with pytest.raises(
        NotFiniteError, match="step 12: the loss of sae-jumprelu or its gradient is not finite; .*00010"
    ):
        trainer.run(progress=False)
    with pytest.raises(NotFiniteError):
        trainer.finish()
    assert not (tmp_path / "config.json").exists()


def test_a_sample_that_is_not_finite_stops_training_before_it_starts(tmp_path):
    x = vectors()
    x[later_row(1)] = torch.nan
    with pytest.raises(NotFiniteError, match=r"did not start: the activations at 0\.resid_post .* 1 of the first 128"):
        train(None, x, SAE, progress=False, out=tmp_path)


def test_weights_that_are_not_finite_are_not_written(tmp_path):
    trainer = Trainer(VectorSource(vectors(), None, seed=0), [SAE], out=tmp_path)
    trainer.run(until=9, progress=False)
    trainer.runs[0].weights.b_dec.data[0, 0] = torch.nan
    with pytest.raises(
        NotFiniteError, match="dictionary sae-jumprelu has numbers in trainee.b_dec that are not finite"
    ):
        trainer.finish()
    assert not (tmp_path / "config.json").exists()


def test_a_row_of_a_batch_is_traced_to_its_text():
    model = random_model(n_layers=1, d_model=8, n_heads=2, d_vocab=20, context=8, seed=1)
    rows = torch.randint(0, 20, (7, 5), generator=torch.Generator().manual_seed(0))
    sites = (Site(0, "resid_post"),)
    stream = ActivationStream(model, TokenRows(rows), reads=sites, writes=(), batch=6, chunk_tokens=12, seed=2)
    batches = iter(stream)
    for _ in range(5):
        batch = next(batches).reads
        for i in range(6):
            words = stream.place(i).split()
            position, row = int(words[1]), int(words[4]) % 7
            expected = sites_of(model, rows[row : row + 1], sites, ()).reads[position - 1]
            torch.testing.assert_close(batch[i], expected)


# target_l0


def test_a_target_l0_that_was_missed_is_said_at_the_end(caplog):
    config = SAEConfig(activation="relu", target_l0=2.0, start_l0=12.0, **{**COMMON, "tokens": 64})
    saes: Any = train(None, vectors(), config, progress=False)
    l0 = float((saes[0].encode(vectors()) > 0).sum(1).float().mean())
    assert l0 > 3
    (text,) = [record.getMessage() for record in caplog.records]
    assert text.startswith("sae-relu ended with L0 ")
    assert float(text.split()[4].rstrip(",")) == pytest.approx(l0, rel=0.15)
    assert "off its target_l0 of 2" in text


# metrics


@pytest.mark.parametrize("rest", ['{"step": 25, "lo', "\n", "\n\n{}\n[1]\n\x00\n", '{"step": "x"}\n'])
def test_a_broken_line_of_metrics_is_dropped_and_training_goes_on(rest, tmp_path):
    train(None, vectors(), SAE, progress=False, out=tmp_path / "whole")
    partly_trained(tmp_path / "broken", until=20)
    with (tmp_path / "broken/metrics.jsonl").open("a") as file:
        file.write(rest)
    train(None, vectors(), SAE, progress=False, out=tmp_path / "broken", resume=True)
    broken, whole = (
        [
            {**json.loads(line), "data_wait": None}
            for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()
        ]
        for run in ("broken", "whole")
    )
    assert broken == whole


class FullDisk:
    """A file on a disk that takes ten bytes more."""

    def __init__(self, file):
        self.file, self.left = file, 10

    def write(self, data):
        if not self.left:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = self.file.write(data[: self.left])
        self.left -= written
        return written

    def __getattr__(self, name):
        return getattr(self.file, name)


def test_a_full_disk_leaves_no_half_line(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path, step=0) as metrics:
        metrics.write({"step": 1, "loss": 0.5})
        monkeypatch.setattr(metrics, "_file", FullDisk(metrics._file))
        with pytest.raises(WriteError, match=r"Cannot write .*metrics\.jsonl: the disk with .* is full"):
            metrics.write({"step": 2, "loss": 0.25})
    assert path.read_text() == '{"step": 1, "loss": 0.5}\n'


# folders


def test_a_full_disk_leaves_the_last_checkpoint_and_no_half_one(tmp_path, monkeypatch):
    trainer = Trainer(VectorSource(vectors(), None, seed=0), [SAE], out=tmp_path)
    trainer.run(until=15, progress=False)

    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for write in (lambda: trainer.run(progress=False), trainer.finish):
        with monkeypatch.context() as patch:
            patch.setattr(transcoders.files.os, "fsync", full)
            with pytest.raises(WriteError, match="is full; make room"):
                write()
        assert sorted(p.name for p in tmp_path.iterdir() if p.name != _LOCK) == [
            "README.md", "checkpoint-00000010", "curve.svg", "metrics.jsonl", "run.json"
        ]  # fmt: skip
    whole: Any = train(None, vectors(), SAE, progress=False)
    resumed: Any = train(None, vectors(), SAE, progress=False, out=tmp_path, resume=True)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("here")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(WriteError, match=r"file is a file, but a folder is needed there"):
            train(None, vectors(), SAE, progress=False, out=out)
    assert (tmp_path / "file").read_text() == "here"

    def refused(self, *_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(type(tmp_path), "mkdir", refused)  # root may write anywhere
    with pytest.raises(WriteError, match="may not be written to"):
        train(None, vectors(), SAE, progress=False, out=tmp_path / "new")


def test_two_trainings_in_one_folder_are_one_too_many(tmp_path):
    with FileLock(tmp_path / _LOCK), pytest.raises(InputError, match=f"Another training is running in {tmp_path}"):
        train(None, vectors(), SAE, progress=False, out=tmp_path)
    assert not (tmp_path / "metrics.jsonl").exists()
    train(None, vectors(), SAE, progress=False, out=tmp_path)
    train(None, vectors(), SAE, progress=False, out=tmp_path)  # the lock was given back


# checkpoints


def test_resuming_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(InputError, match="There is no checkpoint in .* to resume; leave out `resume`"):
        train(None, vectors(), SAE, progress=False, out=tmp_path, resume=True)
    with pytest.raises(InputError, match="give `out` as well"):
        train(None, vectors(), SAE, progress=False, resume=True)


def test_a_fresh_run_says_that_it_removes_a_checkpoint_and_leaves_other_files_alone(tmp_path, caplog):
    partly_trained(tmp_path)
    (tmp_path / "checkpoint-notes.txt").write_text("mine")
    (tmp_path / "checkpoint-mine").mkdir()
    assert not caplog.records
    train(None, vectors(), SAE, progress=False, out=tmp_path)
    removed = tmp_path / "checkpoint-00000020"
    assert [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING] == [
        f"Removing {removed} of an earlier run, as this one starts anew (`resume` would go on)."
    ]
    assert (tmp_path / "checkpoint-notes.txt").read_text() == "mine"
    assert (tmp_path / "checkpoint-mine").is_dir()
    train(None, vectors(), SAE, progress=False, out=tmp_path, resume=True)  # and they are not resumed from


def test_a_setting_that_differs_is_named_alone(tmp_path):
    partly_trained(tmp_path)
    other = SAEConfig(activation="jumprelu", lr=0.01, **COMMON)
    with pytest.raises(InputError) as caught:
        train(None, vectors(), other, progress=False, out=tmp_path, resume=True)
    assert str(caught.value) == (
        f"{tmp_path} belongs to another run: its lr is None, this run's 0.01. "
        "Give the settings of that run, or another output folder."
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    partly_trained(out)
    return out


def edit_record(change):
    def damage(folder):
        path = folder / "state.json"
        record = json.loads(path.read_text())
        change(record)
        path.write_text(json.dumps(record))

    return damage


def edit_tensors(change):
    def damage(folder):
        tensors = load_file(folder / "state.safetensors")
        change(tensors)
        save_file(tensors, folder / "state.safetensors")
        edit_record(lambda record: record.update(sha256=file_hash(folder / "state.safetensors")))(folder)

    return damage


def flip_a_bit(folder):
    path = folder / "state.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 4
    path.write_bytes(bytes(data))


def setting(key, value):
    return edit_record(lambda record: record.update({key: value}))


def steering(key, value):
    return edit_record(lambda record: record["runs"][0]["controller"].update({key: value}))


def cut(name, where):
    return edit_tensors(lambda tensors: tensors.update({name: tensors[name][where].clone()}))


NO_PLACES = ("x", -1, 10**9, 1e9, 1.5, None, True, [1])

DAMAGES = {
    **{f"without {key}": edit_record(lambda record, key=key: record.pop(key))
       for key in ("step", "data", "runs", "run")},
    **{f"step {value}": setting("step", value) for value in NO_PLACES},
    **{f"data {value}": setting("data", value) for value in (1, [], None, {})},
    **{f"{key} {value}": edit_record(lambda record, key=key, value=value: record["data"].update({key: value}))
       for key in ("chunk", "batch_in_chunk") for value in NO_PLACES},
    **{f"runs {value}": setting("runs", value) for value in ([], {}, [1], [{}], [{"sparse": True}], "x")},
    "sparse of a layer": edit_record(lambda record: record["runs"][0].update(sparse=[])),
    **{f"run {value}": setting("run", value) for value in (1, [], None)},
    **{f"controller {value}": steering("log_weight", value) for value in ("x", None, float("nan"), [1])},
    "controller more": steering("more", 1.0),
    "sparse 1": edit_record(lambda record: record["runs"][0].update(sparse=1)),
    "no tensors": lambda folder: (folder / "state.safetensors").unlink(),
    "no record": lambda folder: (folder / "state.json").unlink(),
    "half a record": lambda folder: (folder / "state.json").write_text("{"),
    "a list": lambda folder: (folder / "state.json").write_text("[]"),
    "half the tensors": lambda folder: os.truncate(folder / "state.safetensors", 1000),
    "a flipped bit": flip_a_bit,
    **{f"without {name}": edit_tensors(lambda tensors, name=name: tensors.pop(name))
       for name in ("0.trainee.W_enc", "0.scales.read", "0.optimizer.W_enc.exp_avg", "0.since_fired")},
    **{f"short {name}": cut(name, slice(0, -1)) for name in ("0.trainee.b_dec", "0.scales.write", "0.since_fired")},
    "flat W_enc": edit_tensors(lambda t: t.update({"0.trainee.W_enc": t["0.trainee.W_enc"].flatten()})),
    "integer W_enc": edit_tensors(lambda t: t.update({"0.trainee.W_enc": t["0.trainee.W_enc"].int()})),
    "NaN": edit_tensors(lambda t: t["0.trainee.W_enc"].view(-1)[3:4].fill_(torch.nan)),
    "infinite moment": edit_tensors(lambda t: t["0.optimizer.W_enc.exp_avg"].view(-1)[3:4].fill_(torch.inf)),
    "another tensor": edit_tensors(lambda t: t.update({"0.optimizer.x": torch.zeros(1)})),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_one_sentence(damage, checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "run")
    damage(tmp_path / "run/checkpoint-00000020")
    with pytest.raises(InputError) as caught:
        train(None, vectors(), SAE, progress=False, out=tmp_path / "run", resume=True)
    assert isinstance(caught.value, FileFormatError)
    assert len(str(caught.value)) < 600
    assert "\n" not in str(caught.value)
