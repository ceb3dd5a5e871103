# pyright: reportMissingImports=false
"""Trains one SAELens SAE to the end on vectors from a file. Run by `benchmarks/superposition.py`.

It runs in SAELens' own environment and imports nothing of ours but the order of batches. What it leaves is judged by
its parent: `decoder.npy`, and `reconstruction.npy` of the held-out vectors by the SAE as SAELens saves it for use.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from quality_batches import Data
from sae_lens import SAE
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.training.sae_trainer import SAETrainer

KINDS = {
    "topk": (TopKTrainingSAE, TopKTrainingSAEConfig),
    "batchtopk": (BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig),
}


def train(task: dict[str, Any], data: Data) -> Any:
    """`SAETrainer.step` as its `fit` calls it, with the settings that SAELens has by default where none are given."""
    torch.manual_seed(task["seed"])
    sae_class, config_class = KINDS[task["kind"]]
    sae = sae_class(config_class(d_in=task["d"], d_sae=task["width"], k=task["k"]))
    steps = task["steps"]
    config = SAETrainerConfig(
        total_training_samples=task["batch"] * steps,
        train_batch_size_samples=task["batch"],
        lr=task["lr"],
        lr_end=0.0,
        lr_warm_up_steps=round(task["warmup"] * steps),
        lr_decay_steps=round(task["decay"] * steps),
        logger=LoggingConfig(log_to_wandb=False),
    )
    trainer = SAETrainer(cfg=config, sae=sae, data_provider=data)
    for _ in range(steps):
        trainer.step(next(data).reads)
        trainer.n_training_steps += 1
    return sae


@torch.no_grad()
def judge(sae: Any, held_out: torch.Tensor, folder: Path) -> dict[str, float]:
    sae.save_inference_model(folder / "sae")
    usable = SAE.load_from_disk(folder / "sae")
    activations = [usable.encode(part) for part in held_out.split(5000)]
    fired = torch.stack([(a > 0).sum(dim=0) for a in activations]).sum(dim=0)
    np.save(folder / "decoder.npy", usable.W_dec.numpy())
    np.save(folder / "reconstruction.npy", torch.cat([usable.decode(a) for a in activations]).numpy())
    return {"l0": float(fired.sum()) / len(held_out), "dead": float((fired == 0).double().mean())}


def main() -> None:
    folder = Path(sys.argv[1])
    task = json.loads((folder / "task.json").read_text())
    torch.set_num_threads(task["threads"])
    data = Data(task["data"], None, batch=task["batch"], held_out=task["held_out"], seed=task["seed"])
    start = time.perf_counter()
    sae = train(task, data)
    seconds = time.perf_counter() - start
    result = judge(sae, data.held_out.reads, folder) | {"speed": task["batch"] * task["steps"] / seconds}
    (folder / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
