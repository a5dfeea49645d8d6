"""Images per second of the augmentations, side by side with other libraries.

    python tests/benchmarks/bench_augmentation.py --out docs/results/augmentation.json

Every candidate runs once per round, so that a busy machine slows all of them alike; the table
gives the median over rounds of CPU time on one thread, and wall time beside it.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import kornia
import kornia.augmentation as K
import lightly
import torch
import torchvision
from lightly.transforms.simclr_transform import SimCLRViewTransform
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from bdclean.data.augment import augment, colour, geometry, recipes

Candidate = tuple[str, str, int, Callable[[], object]]  # group, label, images per call, call
CALLS = 3  # in a row, as the views of a contrastive step
PER_IMAGE = 16  # images per call for the candidates that loop in Python


def _one_order(images: Tensor, factors: Tensor) -> Tensor:
    """The jitter of ours if all images shared one order of the four operations."""
    zero = torch.zeros(len(images))
    bright, contrast, saturation, hue = factors.unbind(1)
    colour.blend_(images, bright, zero, zero)
    colour.blend_(images, contrast, zero, 1 - contrast)
    colour.blend_(images, saturation, 1 - saturation, zero)
    return colour.shift_hue_(images, hue)


def _ours(images: Tensor) -> list[Candidate]:
    g, batch = torch.Generator().manual_seed(0), len(images)
    last = images.contiguous(memory_format=torch.channels_last)
    height, width = images.shape[-2:]
    work = images.clone()

    def crop() -> Tensor:
        boxes = geometry.draw_boxes(batch, height, width, g)
        return geometry.resized_crop(images, boxes, torch.rand(batch, generator=g) < 0.5)

    def simclr_in_one_order() -> Tensor:
        factors, _ = colour.draw_factors(batch, g)
        gray = (torch.rand(batch, generator=g) < recipes.GRAY_RATE).float()
        result = _one_order(crop(), factors)
        return colour.blend_(result, 1 - gray, gray, torch.zeros(batch))

    return [
        ("simclr", "bdclean", batch, lambda: augment("simclr", images, g)),
        ("simclr", "bdclean, one fixed order", batch, simclr_in_one_order),
        ("simclr", "bdclean, channels_last", batch, lambda: augment("simclr", last, g)),
        ("crop + flip", "bdclean", batch, lambda: augment("weak", images, g)),
        ("crop + flip", "bdclean, channels_last", batch, lambda: augment("weak", last, g)),
        ("resized crop", "bdclean", batch, crop),
        (
            "jitter",
            "bdclean, order per image",
            batch,
            lambda: colour.color_jitter_(work, *colour.draw_factors(batch, g)),
        ),
        (
            "jitter",
            "bdclean, one fixed order",
            batch,
            lambda: _one_order(work, colour.draw_factors(batch, g)[0]),
        ),
    ]


def _kornia(images: Tensor) -> list[Candidate]:
    size = tuple(images.shape[-2:])
    crop = K.RandomResizedCrop(size, (0.2, 1.0), resample="BICUBIC", cropping_mode="resample")
    flip, jitter = K.RandomHorizontalFlip(p=0.5), K.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8)
    simclr = torch.nn.Sequential(crop, flip, jitter, K.RandomGrayscale(p=0.2))
    weak = torch.nn.Sequential(K.RandomCrop(size, padding=4), flip)
    modules = [("simclr", simclr), ("crop + flip", weak), ("resized crop", crop)]
    modules.append(("jitter", jitter))
    return [(g, "kornia, batched", len(images), lambda m=m: m(images)) for g, m in modules]


def _per_image(images: Tensor) -> list[Candidate]:
    size, few = tuple(images.shape[-2:]), images[:PER_IMAGE]
    crop = v2.RandomResizedCrop(size, (0.2, 1.0), interpolation=InterpolationMode.BICUBIC)
    flip, jitter = v2.RandomHorizontalFlip(), v2.ColorJitter(0.4, 0.4, 0.4, 0.1)
    some = v2.RandomApply([jitter], 0.8)
    simclr = v2.Compose([crop, flip, some, v2.RandomGrayscale(0.2)])
    weak = v2.Compose([v2.RandomCrop(size, padding=4), flip])
    rows: list[Candidate] = [
        (g, "torchvision v2, per image", PER_IMAGE, lambda t=t: [t(image) for image in few])
        for g, t in (
            ("simclr", simclr),
            ("crop + flip", weak),
            ("resized crop", crop),
            ("jitter", some),
        )
    ]
    pictures = [v2.functional.to_pil_image(image) for image in few]
    view = SimCLRViewTransform(size[0], cj_strength=0.5, min_scale=0.2, gaussian_blur=0.0)
    rows.append(
        ("simclr", "lightly, PIL per image", PER_IMAGE, lambda: [view(p) for p in pictures])
    )
    return rows


def _time(candidates: list[Candidate], rounds: int) -> list[dict[str, str | float]]:
    cpu: list[list[float]] = [[] for _ in candidates]
    wall: list[list[float]] = [[] for _ in candidates]
    for number in range(rounds + 1):
        for i, (_, _, _, call) in enumerate(candidates):
            start, start_cpu = time.perf_counter(), time.thread_time()
            for _ in range(CALLS):
                call()
            if number:  # the first round warms up
                cpu[i].append((time.thread_time() - start_cpu) / CALLS)
                wall[i].append((time.perf_counter() - start) / CALLS)
    return [
        {
            "group": group,
            "candidate": label,
            "images_per_call": images,
            "images_per_second": round(images / statistics.median(cpu[i])),
            "images_per_second_best": round(images / min(cpu[i])),
            "images_per_second_wall": round(images / statistics.median(wall[i])),
        }
        for i, (group, label, images, _) in enumerate(candidates)
    ]


def _print_table(rows: list[dict[str, str | float]]) -> None:
    ours = {row["group"]: row["images_per_second"] for row in reversed(rows)}  # first of a group
    print(f"{'set':14}{'candidate':28}{'images/s':>10}{'best':>10}{'wall':>10}{'bdclean is':>12}")
    for row in sorted(rows, key=lambda row: str(row["group"])):
        ratio = float(ours[row["group"]]) / float(row["images_per_second"])
        print(
            f"{row['group']:14}{row['candidate']:28}{row['images_per_second']:10}"
            f"{row['images_per_second_best']:10}{row['images_per_second_wall']:10}{ratio:11.1f}x"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="where to write the record (JSON)")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    images = torch.rand(args.batch, 3, args.size, args.size)
    rows = _time([*_ours(images), *_kornia(images), *_per_image(images)], args.rounds)
    _print_table(rows)
    if args.out:
        record = {
            "what": "augmentation, images per second of CPU time on one thread (median of rounds)",
            "batch": args.batch,
            "size": args.size,
            "rounds": args.rounds,
            "python": platform.python_version(),
            "machine": platform.machine(),
            "versions": {
                module.__name__: module.__version__
                for module in (torch, torchvision, kornia, lightly)
            },
            "rows": rows,
        }
        args.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
