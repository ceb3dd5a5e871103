"""The Hugging Face hub: whether it answers, asked once and briefly, and what is on this machine already.

The hub's client repeats every request of a machine without a network for half a minute; here such a machine is told
at once, and uses what it has downloaded before.
"""

import os
from pathlib import Path
from threading import Thread
from typing import Literal

from transcoders.errors import InputError, ModelError

Kind = Literal["model", "dataset"]
"""Of a repository of the hub."""

PATIENCE = 4.0
"""Seconds to wait for the hub's first answer, unless HF_HUB_ETAG_TIMEOUT gives it more."""


def model_source(name: str | Path, revision: str | None = None) -> str:
    """Where a model is loaded from: a local folder, or its hub name; imports no torch.

    Raises `ModelError` where there is no such folder, for a revision of a folder, and where the hub cannot be asked for
    what is not here.
    """
    folder = Path(name).expanduser()
    if folder.exists() or str(name).startswith((".", "/", "~")) or str(name).count("/") > 1:
        if revision is not None:
            raise ModelError(
                f"{folder} is a folder, of which there is no revision {revision!r}; leave the revision out."
            )
        return _model_folder(folder)
    instead = "check the name and the network, or give a folder in Hugging Face layout"
    what = f"The model {str(name)!r}" if revision is None else f"The revision {revision!r} of the model {str(name)!r}"
    return str(folder_or_name(str(name), what, ModelError, instead, revision=revision))


def folder_or_name(
    name: str,
    what: str,
    error: type[InputError],
    instead: str,
    kind: Kind = "model",
    revision: str | None = None,
) -> Path | str:
    """The hub name where the hub answers, else the folder it was downloaded to; raises `error` where it was not."""
    if (problem := hub_problem()) is None:
        return name
    if (folder := downloaded(name, kind, revision)) is not None:
        return folder
    raise error(f"{what} is not on this machine, and the hub cannot be asked ({problem}); {instead}.")


def _model_folder(folder: Path) -> str:
    if not folder.is_dir():
        raise ModelError(f"There is no model folder at {folder}; give a folder that holds config.json, or a hub name.")
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise ModelError(
                f"{folder} holds an adapter, not a model; give the model it was made for, and adapter={str(folder)!r} "
                "(--adapter)."
            )
        raise ModelError(
            f"{folder} holds no config.json; expected a folder in Hugging Face layout "
            "(config.json, model.safetensors, tokenizer.json)."
        )
    return str(folder.resolve())


def hub_problem() -> str | None:
    """Why the hub cannot be used now; None where it can. Takes `PATIENCE` seconds at most."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    asked = os.environ.get("HF_HUB_ETAG_TIMEOUT", "")
    seconds = max(PATIENCE, float(constants.HF_HUB_ETAG_TIMEOUT)) if asked else PATIENCE
    answer: list[str | None] = [
        f"{constants.ENDPOINT} does not answer within {seconds:g} s; on a slow line set HF_HUB_ETAG_TIMEOUT higher"
    ]
    # In a thread, for a name server that does not answer is waited for whatever the client's own timeout.
    thread = Thread(target=_ask, args=(constants.ENDPOINT, seconds, answer), daemon=True)
    thread.start()
    thread.join(seconds)
    return answer[0]


def _ask(endpoint: str, seconds: float, answer: list[str | None]) -> None:
    from huggingface_hub import get_session

    try:
        get_session().head(endpoint, timeout=seconds)  # any answer will do; the session knows of proxies
        answer[0] = None
    except Exception as error:  # of whichever HTTP library the client uses
        answer[0] = f"{endpoint} cannot be reached: {first_line(error)}"


def downloaded(name: str, kind: Kind = "model", revision: str | None = None) -> Path | None:
    """The folder of a repository that was downloaded before, be it in part; None where it was not."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, repo_type=kind, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError as error:
        in_part: str | None = getattr(error, "snapshot_path", None)  # known to lack files, of which none may be needed
        return None if in_part is None else Path(in_part)
    except HFValidationError:
        return None


def hub_says(error: BaseException) -> str:
    """Why the hub did not give something, in one line; its client says "404 Client Error" and little else."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return "it is gated: ask for access on its page, then log in with `hf auth login`"
    if isinstance(error, errors.RevisionNotFoundError):
        return "it has no such revision"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "there is no such repository, or it is private: then log in with `hf auth login`"
    return first_line(error)


def first_line(error: BaseException) -> str:
    """What an error of another library says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
