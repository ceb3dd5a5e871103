"""Training on a store: as good as on the model, the same for all that share it, resumed to the bit."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from circuitsae.cli import main
from tests.small_stores import (
    CONTEXT,
    ROWS,
    rows_of,
    small_model,
    write,
)
from transcoders import (
    ActivationStore,
    CLTConfig,
    SAEConfig,
    evaluate,
    load_dictionaries,
    train,
)
from transcoders.errors import DictionaryError, FileFormatError, InputError
from transcoders.training import Trainer
from transcoders.training.metrics import Wait
from transcoders.training.stored import StoreSource, as_stored

# training


COMMON = {"features": 32, "batch": 100, "tokens": 4000, "k": 4, "lr": 8e-3, "log_every": 10}
SAE = SAEConfig(activation="topk", **COMMON)


def same_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("config", [SAE, CLTConfig(activation="topk", **COMMON)], ids=lambda c: c.kind)
def test_what_is_trained_on_a_store_explains_the_model(store_model, stores, config):
    trained = train(None, stores["int8"], config, progress=False)
    provenance = trained.provenance
    assert (provenance.model, provenance.fingerprint) == (store_model.name, store_model.fingerprint())
    assert (provenance.corpus, provenance.config["context"]) == ("rows of tokens", CONTEXT)
    assert (provenance.first, provenance.site_limits) == (1, stores["int8"].settings.limits)
    trained.check_fits(store_model)
    untrained = Trainer(StoreSource(stores["int8"], store_model, config), [config]).finish()[0]
    held_out = rows_of(60, seed=1)
    assert evaluate(store_model, trained, held_out).fvu < 0.6 * evaluate(store_model, untrained, held_out).fvu


def test_trained_alone_or_with_others_and_with_the_model_or_without_it_is_the_same(store_model, stores):
    others = [SAEConfig(activation="topk", **{**COMMON, "k": k, "tokens": 1000}) for k in (4, 8, 16)]
    together = train(store_model, stores["float32"], others, progress=False)
    for config, dictionaries in zip(others, together, strict=True):
        assert same_weights(train(None, stores["float32"], config, progress=False), dictionaries)
    by_path = train(store_model, str(stores["float32"].folder), others[0], progress=False)
    assert same_weights(by_path, together[0])


def test_a_run_on_a_store_is_resumed_to_the_bit(stores, tmp_path):
    settings = {**COMMON, "batch": 400, "tokens": 9600}  # of which 16 batches are an epoch
    config = SAEConfig(activation="jumprelu", checkpoint_every=5, **settings)
    unbroken = train(None, stores["int8"], config, progress=False, out=tmp_path / "a")
    as_there = as_stored(config, stores["int8"])
    Trainer(StoreSource(stores["int8"], None, as_there), [as_there], out=tmp_path / "b").run(until=18, progress=False)
    with pytest.raises(InputError, match="is not the store that this run began with"):
        train(None, stores["float32"], config, progress=False, out=tmp_path / "b", resume=True)
    resumed = train(None, stores["int8"], config, progress=False, out=tmp_path / "b", resume=True)
    assert same_weights(unbroken, resumed)


def test_metrics_say_which_share_of_the_time_a_run_waited_for_its_data(stores, tmp_path, monkeypatch):
    train(None, stores["int8"], SAE, progress=False, out=tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < line["data_wait"] < 1 for line in lines)

    clock = iter([0.0, *(1.0, 3.0), *(4.0, 5.0), 10.0, *(11.0, 11.5), 14.0])
    monkeypatch.setattr("transcoders.training.metrics.perf_counter", lambda: next(clock))
    wait, items = Wait(), iter("abc")
    assert wait.next(items) + wait.next(items) == "ab"
    assert wait.share() == 0.3
    assert wait.next(items) == "c"
    assert wait.share() == 0.125


def test_a_damaged_shard_ends_training_with_its_checkpoint_left(stores, copied_store, tmp_path):
    path = copied_store / "shard-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    config = SAEConfig(activation="topk", checkpoint_every=5, **COMMON)
    with pytest.raises(FileFormatError, match="shard-00001.* is not the shard that was written"):
        train(None, ActivationStore(copied_store), config, progress=False, out=tmp_path / "out")


def test_what_a_store_cannot_train_is_refused(store_model, stores, tmp_path):
    few = write(store_model, tmp_path, ROWS[:20], sites=["mlp_in"])
    assert few is not None
    with pytest.raises(InputError, match=r"lacks the activations at 0\.resid_post, 1\.resid_post; it has 0\.mlp_in, 1"):
        train(None, few, SAE, progress=False)
    with pytest.raises(InputError, match=r"was written with bos=False; got bos=True"):
        train(None, stores["int8"], replace(SAE, bos=True), progress=False)
    with pytest.raises(InputError, match=r"was written with outliers=20\.0; got outliers=10\.0"):
        train(None, stores["int8"], replace(SAE, outliers=10.0), progress=False)
    with pytest.raises(InputError, match=r"was written with context=17; got context=64"):
        train(None, stores["int8"], replace(SAE, context=64), progress=False)
    other = small_model(seed=9)
    with pytest.raises(DictionaryError, match="Give the model that the store was written with"):
        train(other, stores["int8"], SAE, progress=False)


# the command line


def test_a_store_is_written_and_trained_on_from_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("\n\n".join(f"When Mary and John went to store {i}, John ran." for i in range(99)))
    command = ["activations", "pocket", "--corpus", "text.txt", "--out", "acts", "--site", "resid_post"]
    command += ["--context", "16", "--dtype", "int8", "--tokens", "600"]
    main(command)
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("Activations: acts, 600 tokens at 4 sites, ")
    assert said[-1] == "Next:  circuitsae train pocket --corpus acts --kind sae --site resid_post --out FOLDER"
    arguments = [*said[-1].split()[2:-1], "saes", "--features", "16", "--tokens", "256", "--batch", "128"]
    main([*arguments, "--activation", "topk", "--k", "4"])
    assert "Next:  circuitsae evaluate pocket saes --corpus TEXT" in capsys.readouterr().out
    assert load_dictionaries("saes").provenance.config["context"] == 16


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--site", "resid_post", "--job", "8"], "--job '8' names no share; write it like 2/8"),
        ([], "No site was named; give --site resid_post"),
        (["--site", "mlp_in"], "own text has no end; say how much of it is read"),
        (["--site", "residual"], "Cannot read site 'residual'; expected LAYER.KIND"),
        (["--site", "1.residual"], "Cannot read site '1.residual'"),
    ],
)
def test_a_wrong_option_is_one_sentence_and_exit_code_two(options, said, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["activations", "pocket", "--out", str(tmp_path / "acts"), *options])
    assert caught.value.code == 2
    assert said in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "acts").exists()
