"""The hub's cache, as its client lays it out."""

import pytest


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A cache of the hub, without a network: `hub("org/name")` is the folder of a repository that was downloaded."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))

    def repository(name):
        home = tmp_path / f"models--{name.replace('/', '--')}"
        (home / "refs").mkdir(parents=True)
        (home / "refs" / "main").write_text("0123abcd")
        (snapshot := home / "snapshots" / "0123abcd").mkdir(parents=True)
        return snapshot

    return repository
