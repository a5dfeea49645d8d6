"""Images per second of supervised training: through Lightning, and as a bare loop.

Both train the same net on the same rows, in the same precision and batch size, in turns within
one process; the bare loop has its augmented floats in memory already. Run:

    python tests/benchmarks/bench_training.py --out docs/results/training_speed.json
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from torch.nn import functional as F

from bdclean.attacks import BadNets
from bdclean.backbones import ModelInfo, build
from bdclean.data import ImageDataModule, ImageSet
from bdclean.training import Supervised


class RandomImages(ImageDataModule):
    """Random 32x32 images in ten classes: the cost of a step does not depend on the content."""

    name, num_classes, input_size = "random", 10, 32
    mean, std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
    num_images = 12_800

    def read_train(self):
        """Images and labels from a fixed seed."""
        generator = torch.Generator().manual_seed(0)
        shape = (self.num_images, 3, 32, 32)
        images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        return ImageSet(images, torch.arange(self.num_images) % 10)

    def read_test(self):
        """Not used."""
        return self.read_train()


class EpochTime(Callback):
    """Seconds of each training epoch, as a user waits for it."""

    def __init__(self):
        self.seconds = []

    def on_train_epoch_start(self, trainer, pl_module):
        self.start = time.perf_counter()

    def on_train_epoch_end(self, trainer, pl_module):
        self.seconds.append(time.perf_counter() - self.start)


def through_lightning(arguments, epochs):
    """Seconds per epoch of `bdclean fit`'s training loop, poisoned data and augmentation."""
    seed_everything(0, verbose=False)
    data = RandomImages(attack=BadNets(target=6, rate=0.06, position="top_left"))
    module = Supervised(
        data.num_classes,
        data.input_size,
        data.mean,
        data.std,
        width=arguments.width,
        batch_size=arguments.batch_size,
    )
    clock = EpochTime()
    Trainer(
        accelerator="cpu",
        precision=arguments.precision,
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[clock],
    ).fit(module, datamodule=data)
    return clock.seconds


def bare_loop(arguments, epochs):
    """Seconds per epoch of the plainest loop on floats that are in memory already."""
    torch.manual_seed(0)
    info = ModelInfo("resnet18", 10, 32, RandomImages.mean, RandomImages.std, arguments.width)
    model = build(info).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    count = RandomImages.num_images // arguments.batch_size
    images = torch.rand(arguments.batch_size * 8, 3, 32, 32).contiguous(
        memory_format=torch.channels_last
    )
    labels = torch.arange(len(images)) % 10
    mixed = arguments.precision == "bf16-mixed"
    seconds = []
    for _ in range(epochs):
        start = time.perf_counter()
        for step in range(count):
            rows = slice(*(arguments.batch_size * (step % 8 + k) for k in (0, 1)))
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
                logits = model(images[rows])
            F.cross_entropy(logits.float(), labels[rows]).backward()
            optimizer.step()
        seconds.append(time.perf_counter() - start)
    return seconds


def main():
    """Measures in turns, prints, and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--precision", default="bf16-mixed")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    ours, bare = [], []
    for turn in range(arguments.rounds + 1):
        one, other = through_lightning(arguments, 1), bare_loop(arguments, 1)
        if turn:  # the first turn warms up
            ours += one
            bare += other
    ratios = [b / a for a, b in zip(ours, bare, strict=True)]
    record = {
        "what": "supervised training, Lightning with data and augmentation against a bare loop",
        "width": arguments.width,
        "batch_size": arguments.batch_size,
        "precision": arguments.precision,
        "threads": torch.get_num_threads(),
        "images_per_epoch": RandomImages.num_images,
        "images_per_second": round(RandomImages.num_images / statistics.median(ours), 1),
        "images_per_second_bare": round(RandomImages.num_images / statistics.median(bare), 1),
        "share_of_bare_median": round(statistics.median(ratios), 3),
        "share_of_bare_by_turn": [round(r, 3) for r in ratios],
        "torch": torch.__version__,
    }
    print(json.dumps(record, indent=2))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
