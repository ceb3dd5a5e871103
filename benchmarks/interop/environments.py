"""The peers' own environments, outside of the repository: made once, and where their scripts run.

A peer that no package index has runs from a checkout that the user has made and names.
"""

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parent
ROOT = Path("~/.cache/circuitsae-interop").expanduser()
TORCH = "torch==2.13.0"
"""First, and the same for all: what each of them asks for fights with another's."""
CHECKOUTS = (
    "accelerate", "datasets", "einops", "jaxtyping", "natsort", "numpy", "pydantic", "pyyaml", "safetensors",
    "schedulefree", "simple-parsing", "transformers", "triton",
)  # fmt: skip


@dataclass(frozen=True)
class Environment:
    """One virtual environment."""

    name: str
    packages: tuple[str, ...]
    without: tuple[str, ...] = ()
    """Packages that come along, break the import with this torch, and are not needed."""

    @property
    def python(self) -> Path:
        return ROOT / self.name / "bin" / "python"

    def make(self) -> None:
        """Once; a folder that is there counts as made when its last step is done."""
        done = ROOT / self.name / ".installed"
        if done.exists() and done.read_text() == "\n".join(self.packages):
            return
        print(f"Making the environment {self.name} …", flush=True)
        ROOT.mkdir(parents=True, exist_ok=True)
        pin = ROOT / "torch.txt"
        pin.write_text(TORCH + "\n")
        pip = [str(self.python), "-m", "pip", "--quiet", "--disable-pip-version-check"]
        subprocess.run([sys.executable, "-m", "venv", str(ROOT / self.name)], check=True)
        subprocess.run([*pip, "install", TORCH, "numpy"], check=True)
        subprocess.run([*pip, "install", "--constraint", str(pin), *self.packages], check=True)
        if self.without:
            subprocess.run([*pip, "uninstall", "--yes", *self.without], check=True)
        done.write_text("\n".join(self.packages))


@dataclass(frozen=True)
class Peer:
    """Who writes and reads the files of one community."""

    script: str
    environment: Environment
    checkout: Path | None = None
    """Where its source lies; for peers that are on no package index."""
    version: str | None = None
    """Of the checkout; an installed package knows its own."""
    variables: Mapping[str, str] = field(default_factory=dict)

    def run(self, *arguments: str) -> None:
        """Runs its script in its environment; `RuntimeError` with the last lines it printed where it fails."""
        self.environment.make()
        environment = {**os.environ, **self.variables, "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
        environment["PYTHONHASHSEED"] = "0"  # SAELens writes its settings in the order of a set
        environment["PYTHONPATH"] = str(self.checkout or "")
        environment["PEER_VERSION"] = self.version or ""
        command = [str(self.environment.python), str(HERE / self.script), *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{self.script} stopped:\n{done.stderr[-2000:]}")


SAE_LENS = Environment("sae-lens", ("sae-lens==6.54.12",))
CIRCUIT_TRACER = Environment("circuit-tracer", ("circuit-tracer==0.5.0",))
SPARSIFY = Environment("eai-sparsify", ("eai-sparsify==1.3.3",))
LEARNING = Environment("dictionary-learning", ("dictionary-learning==0.1.0",), without=("torchvision",))
SOURCES = Environment("checkouts", CHECKOUTS)

PEERS: dict[str, Peer] = {
    "sae_lens": Peer("peer_sae_lens.py", SAE_LENS),
    "gemma_scope": Peer("peer_gemma_scope.py", SAE_LENS),
    "sparsify": Peer("peer_sparsify.py", SPARSIFY),
    "dictionary_learning": Peer("peer_dictionary_learning.py", LEARNING),
    "circuit_tracer": Peer("peer_circuit_tracer.py", CIRCUIT_TRACER),
}
FROM_CHECKOUTS = {
    "clt_training": "peer_clt_training.py",
    "clt_forge": "peer_clt_forge.py",
    "crosslayer_transcoder": "peer_crosslayer_transcoder.py",
    "openai": "peer_openai.py",
}
"""By the folder that goes on PYTHONPATH: of clt_forge its `src`, of the others the checkout itself."""


def with_checkouts(given: list[str]) -> dict[str, Peer]:
    """All peers that can be run; `given` are `NAME@VERSION=FOLDER`."""
    peers = dict(PEERS)
    for item in given:
        name, _, folder = item.partition("=")
        name, _, version = name.partition("@")
        if name not in FROM_CHECKOUTS or not Path(folder).is_dir():
            known = ", ".join(FROM_CHECKOUTS)
            raise SystemExit(f"{item!r} is no checkout of a peer; expected NAME@VERSION=FOLDER with NAME of {known}.")
        peers[name] = Peer(FROM_CHECKOUTS[name], SOURCES, Path(folder).resolve(), version or "unknown")
    return peers
