"""Speed of AdvrBD's score: images times steps per second, beside a bare forward-backward loop.

Both run on the same network, batch and precision, in turns within one process. The bare loop
takes the gradient of the input alone, of images that are in memory as floats. The score does so
in every step of the ascent, and on top reads the data and computes the predictions before and
after in float32; all of its time is counted. Run:

    python tests/benchmarks/bench_scoring.py --out docs/results/scoring_speed.json
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from bench_training import RandomImages
from lightning.pytorch import Trainer
from torch.nn import functional as F

from bdclean.backbones import ModelInfo, build
from bdclean.purification import AdvrBD, Recipe


class Timed(AdvrBD):
    """Scores once, before the first epoch, and notes the seconds."""

    def train_step(self, batch):
        start = time.perf_counter()
        self.inconsistency(None)
        self.seconds = time.perf_counter() - start
        return super().train_step(batch)


def score(arguments):
    """Forward-backward passes per second and image while scoring."""
    torch.manual_seed(0)
    data = RandomImages()
    data.num_images = arguments.images
    module = Timed(
        10,
        32,
        data.mean,
        data.std,
        width=arguments.width,
        pgd_steps=arguments.steps,
        num_masks=arguments.masks,
        rounds=1,
        recipe=Recipe(epochs=1, batch_size=arguments.batch_size),
        scoring_batch_size=arguments.batch_size,
    )
    Trainer(
        accelerator="cpu",
        precision=arguments.precision,
        max_steps=1,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        reload_dataloaders_every_n_epochs=1,
    ).fit(module, datamodule=data)
    return passes(arguments) / module.seconds


def passes(arguments):
    """Forward-backward passes that the score asks for."""
    return arguments.images * arguments.masks * arguments.steps


def bare(arguments):
    """Forward-backward passes per second and image of the plainest loop."""
    torch.manual_seed(0)
    info = ModelInfo("resnet18", 10, 32, RandomImages.mean, RandomImages.std, arguments.width)
    model = build(info).to(memory_format=torch.channels_last).eval().requires_grad_(False)
    images = torch.rand(arguments.batch_size, 3, 32, 32).contiguous(
        memory_format=torch.channels_last
    )
    labels = torch.arange(len(images)) % 10
    count = max(20, passes(arguments) // len(images) // 4)
    start = time.perf_counter()
    for _ in range(count):
        leaf = images.detach().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=arguments.precision == "bf16-mixed"):
            logits = model(leaf)
        torch.autograd.grad(F.cross_entropy(logits.float(), labels), leaf)
    return count * len(images) / (time.perf_counter() - start)


def main():
    """Measures in turns, prints, and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--images", type=int, default=12_800)
    parser.add_argument("--masks", type=int, default=3)  # as sift/advrbd
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--precision", default="bf16-mixed")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    ours, other = [], []
    for turn in range(arguments.rounds + 1):
        pair = score(arguments), bare(arguments)
        if turn:  # the first turn warms up
            ours.append(pair[0])
            other.append(pair[1])
    ratios = [a / b for a, b in zip(ours, other, strict=True)]
    record = {
        "what": "AdvrBD's score against a bare forward-backward loop, passes per second and image",
        "width": arguments.width,
        "batch_size": arguments.batch_size,
        "images": arguments.images,
        "num_masks": arguments.masks,
        "pgd_steps": arguments.steps,
        "precision": arguments.precision,
        "threads": torch.get_num_threads(),
        "score": round(statistics.median(ours), 1),
        "bare": round(statistics.median(other), 1),
        "share_of_bare_median": round(statistics.median(ratios), 3),
        "share_of_bare_by_turn": [round(ratio, 3) for ratio in ratios],
        "torch": torch.__version__.partition("+")[0],
    }
    print(json.dumps(record, indent=2))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
