"""Images per second of SimCLR: through Lightning, as a bare loop, and by lightly's own recipe.

All three train the same net on the same images, in the same precision and batch size, in turns
within one process. The bare loop has its views in memory already; lightly's recipe makes them
from PIL images, in as many worker processes as there are processors. Run:

    python tests/benchmarks/bench_simclr.py --out docs/results/simclr_speed.json
    python tests/benchmarks/bench_simclr.py --accelerator gpu --width 64 --batch_size 512 \
        --images 50000 --peak 989 --out docs/results/simclr_speed_gpu.json

`--peak` is that of the device in TFLOP/s (989 for an H100 in bf16, without sparsity); the record
then has the share of it that multiplications and additions of the step take.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path

import torch
from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead
from lightly.transforms import SimCLRTransform
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

from bdclean.attacks import BadNets
from bdclean.backbones import ModelInfo, build
from bdclean.data import ImageDataModule, ImageSet
from bdclean.data.augment import augment
from bdclean.functional.contrastive import nt_xent
from bdclean.training import SimCLR

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


class RandomImages(ImageDataModule):
    """Random 32x32 images in ten classes: the cost of a step does not depend on the content."""

    name, num_classes, input_size, mean, std = "random", 10, 32, MEAN, STD
    num_images = 5_120

    def read_train(self):
        """Images and labels from a fixed seed."""
        generator = torch.Generator().manual_seed(0)
        shape = (self.num_images, 3, 32, 32)
        images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        return ImageSet(images, torch.arange(self.num_images) % 10)

    def read_test(self):
        """Not used."""
        return self.read_train()


def now():
    """Seconds, once the device has done all it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def device(arguments):
    """Where the bare loops run."""
    return torch.device("cuda" if arguments.accelerator == "gpu" else "cpu")


class EpochTime(Callback):
    """Seconds of a training epoch, as a user waits for it."""

    def on_train_epoch_start(self, trainer, pl_module):
        self.start = now()

    def on_train_epoch_end(self, trainer, pl_module):
        self.seconds = now() - self.start


def fit(module, arguments, **data):
    """Seconds of one epoch in Lightning."""
    clock = EpochTime()
    Trainer(
        accelerator=arguments.accelerator,
        devices=1,
        precision=arguments.precision,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[clock],
    ).fit(module, **data)
    return clock.seconds


def ours(arguments):
    """`bdclean fit` on poisoned data."""
    seed_everything(0, verbose=False)
    attack = BadNets(target=6, rate=0.6, rate_base="target_class", label_rule="clean_label")
    module = SimCLR(
        10, 32, MEAN, STD, width=arguments.width, batch_size=arguments.batch_size, warmup_epochs=0
    )
    return fit(module, arguments, datamodule=RandomImages(attack=attack))


def backbone(arguments):
    """The net of all three."""
    info = ModelInfo("resnet18", None, 32, MEAN, STD, arguments.width)
    return build(info).to(device(arguments), memory_format=torch.channels_last)


def bare_loop(arguments):
    """The plainest loop on views that are in memory already."""
    torch.manual_seed(0)
    model = backbone(arguments)
    head = SimCLRProjectionHead(model.num_features, model.num_features, 128)
    head = head.to(device(arguments))
    weights = [*model.parameters(), *head.parameters()]
    optimizer = torch.optim.SGD(weights, lr=0.12, momentum=0.9, weight_decay=5e-4)
    views = torch.rand(4, 2 * arguments.batch_size, 3, 32, 32, device=device(arguments))
    views = [v.contiguous(memory_format=torch.channels_last) for v in views]
    mixed = arguments.precision == "bf16-mixed"
    start = now()
    for step in range(RandomImages.num_images // arguments.batch_size):
        optimizer.zero_grad()
        with torch.autocast(device(arguments).type, torch.bfloat16, enabled=mixed):
            z = head(model.features(views[step % 4]))
        nt_xent(*z.chunk(2)).backward()
        optimizer.step()
    return now() - start


def flops(arguments):
    """Multiplications and additions of a step, for each image in its two views."""
    model = backbone(arguments)
    head = SimCLRProjectionHead(model.num_features, model.num_features, 128)
    images = torch.rand(16, 3, 32, 32, device=device(arguments))
    with FlopCounterMode(display=False) as counter:
        head.to(device(arguments))(model.features(images)).sum().backward()
    return counter.get_total_flops() / 8


class Pictures(Dataset):
    """PIL images through lightly's views."""

    def __init__(self):
        images = RandomImages().read_train().images.permute(0, 2, 3, 1).numpy()
        self.pictures = [Image.fromarray(image) for image in images]
        colour = {"cj_bright": 0.4, "cj_contrast": 0.4, "cj_sat": 0.4, "cj_hue": 0.1}
        self.views = SimCLRTransform(
            input_size=32, cj_strength=1.0, min_scale=0.2, gaussian_blur=0.0, **colour
        )

    def __len__(self):
        return len(self.pictures)

    def __getitem__(self, index):
        return self.views(self.pictures[index])


class Lightlys(LightningModule):
    """The module of lightly's example for SimCLR, on our net."""

    def __init__(self, arguments):
        super().__init__()
        self.backbone = backbone(arguments)
        features = self.backbone.num_features
        self.head = SimCLRProjectionHead(features, features, 128)
        self.criterion = NTXentLoss()

    def training_step(self, batch, batch_idx):
        first, second = (self.head(self.backbone.features(view)) for view in batch)
        return self.criterion(first, second)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.06)


def lightlys(arguments):
    """lightly's recipe."""
    seed_everything(0, verbose=False)
    loader = DataLoader(
        Pictures(),
        batch_size=arguments.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=len(os.sched_getaffinity(0)),
    )
    return fit(Lightlys(arguments), arguments, train_dataloaders=loader)


def augmentation_alone(arguments):
    """Seconds for the two views of all images, on the device."""
    images = torch.rand(arguments.batch_size, 3, 32, 32, device=device(arguments))
    images = images.contiguous(memory_format=torch.channels_last)
    generator = torch.Generator(device(arguments)).manual_seed(0)
    start = now()
    for _ in range(RandomImages.num_images // arguments.batch_size):
        for _ in range(2):
            augment("simclr", images, generator)
    return now() - start


def main():
    """Measures in turns, prints, and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--precision", default="bf16-mixed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--accelerator", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--images", type=int, default=RandomImages.num_images)
    parser.add_argument("--peak", type=float, help="Of the device, in TFLOP/s.")
    arguments = parser.parse_args()
    RandomImages.num_images = arguments.images
    ways = {
        "ours": ours,
        "bare_loop": bare_loop,
        "lightly": lightlys,
        "augmentation": augmentation_alone,
    }
    seconds = {name: [] for name in ways}
    for turn in range(arguments.rounds + 1):
        for name, way in ways.items():
            spent = way(arguments)
            if turn:  # the first warms up
                seconds[name].append(spent)
                print(f"{name}: {RandomImages.num_images / spent:.0f} images/s", flush=True)
    ratios = {
        "share_of_bare_median": zip(seconds["bare_loop"], seconds["ours"], strict=True),
        "ours_over_lightly": zip(seconds["lightly"], seconds["ours"], strict=True),
        "augmentation_share_of_step": zip(seconds["augmentation"], seconds["ours"], strict=True),
    }
    record = {
        "what": "SimCLR through Lightning against a bare loop that has its views in memory",
        "images": RandomImages.num_images,
        "width": arguments.width,
        "batch_size": arguments.batch_size,
        "precision": arguments.precision,
        "threads": torch.get_num_threads(),
        "processors": len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if arguments.accelerator == "gpu" else "cpu",
        "gflop_per_image": round(flops(arguments) / 1e9, 4),
        "images_per_second": {
            name: [round(RandomImages.num_images / s, 1) for s in values]
            for name, values in seconds.items()
        },
    }
    for name, pairs in ratios.items():
        record[name] = round(statistics.median(a / b for a, b in pairs), 3)
    if arguments.peak:
        for name in ("ours", "bare_loop"):
            speed = statistics.median(record["images_per_second"][name])
            share = speed * record["gflop_per_image"] / (1000 * arguments.peak)
            record[f"{name}_share_of_peak"] = round(share, 4)
    print(json.dumps(record, indent=2))
    if arguments.out:
        arguments.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
