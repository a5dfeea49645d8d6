"""What poisoning costs: seconds and memory once, and the share of an epoch's input side.

For every static attack file under configs/attack/, on 50,000 random 32x32 images:

- seconds to draw the plan and to make the poisoned rows;
- the highest memory use while doing so and afterwards, over that of the clean set alone;
- the time of a training batch (256, fetched, cropped and flipped) over that of the clean set, in
  turns, alone (input) and with the training step of a small network (epoch).

    python tests/benchmarks/bench_poisoning.py --out docs/results/poisoning_cost.json
"""

import argparse
import importlib
import json
import multiprocessing
import statistics
import time
import warnings
from pathlib import Path

import torch
import yaml
from torch.nn import functional as F

from bdclean.backbones import ModelInfo, build
from bdclean.data import ImageDataModule, ImageSet
from bdclean.types import View

CONFIGS = Path(__file__).parents[2] / "configs" / "attack"
N, BATCH = 50_000, 256
SET_MIB = N * 3 * 32 * 32 / 2**20


class RandomImages(ImageDataModule):
    """Random 32x32 images in ten classes, ordered by class as image folders are."""

    name, num_classes, input_size = "random", 10, 32
    mean, std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)

    def read_train(self):
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (N, 3, 32, 32), dtype=torch.uint8, generator=generator)
        return ImageSet(images, torch.arange(N) // (N // 10))

    def read_test(self):
        return self.read_train()


def attack_of(path):
    """The attack of a config file; None where there is none or it needs a file of the user."""
    entry = yaml.safe_load(path.read_text())["data"]["init_args"]["attack"]
    if entry is None:
        return None
    module, _, name = entry["class_path"].rpartition(".")
    attack = getattr(importlib.import_module(module), name)(**entry.get("init_args", {}))
    needs_file = getattr(attack, "perturbation", None) is not None
    return None if attack.dynamic or needs_file else attack


def memory(field):
    """A field of the process's memory status, in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise RuntimeError(field)


def poison_once(name, queue):
    """Seconds and memory of one poisoning, in a process of its own."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    data = RandomImages(attack=attack_of(CONFIGS / f"{name}.yaml"))
    _ = data.rows
    small = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    data.trigger.poison(small)  # the first call sets kernels up
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = memory("VmRSS")
    start = time.perf_counter()
    data.role_images("train", labels=True)
    seconds = time.perf_counter() - start
    touched = len(data.plan.touched_index)
    queue.put((seconds, (SET_MIB + memory("VmHWM") - before) / SET_MIB, touched))


def batches(data):
    """Seconds of the processor for every batch of one pass, augmentation included."""
    data.set_view(View("train", "weak", batch_size=BATCH, labels=True))
    loader = iter(data.train_dataloader())
    while True:
        start = time.process_time()
        batch = next(loader, None)
        if batch is None:
            return
        data.on_after_batch_transfer(batch, 0)
        yield time.process_time() - start


def batch_seconds(attack, clean, rounds):
    """A typical batch of the poisoned and of the clean set, batch by batch in turns."""
    poisoned = RandomImages(attack=attack)
    poisoned.__dict__["stored"] = clean.stored  # share the images
    seconds = {clean: [], poisoned: []}
    for turn in range(rounds + 1):
        order = (poisoned, clean) if turn % 2 else (clean, poisoned)
        for pair in zip(*(batches(data) for data in order), strict=True):
            if turn:  # the first turn warms up
                for data, took in zip(order, pair, strict=True):
                    seconds[data].append(took)
    return statistics.median(seconds[poisoned]), statistics.median(seconds[clean])


def step_seconds():
    """A typical training step on one batch: ResNet-18 of width 16, bf16-mixed."""
    info = ModelInfo("resnet18", 10, 32, RandomImages.mean, RandomImages.std, 16)
    model = build(info).to(memory_format=torch.channels_last)
    images = torch.rand(BATCH, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    seconds = []
    for _ in range(12):
        start = time.process_time()
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(images)
        F.cross_entropy(logits.float(), torch.arange(BATCH) % 10).backward()
        seconds.append(time.process_time() - start)
    return statistics.median(seconds)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=4)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    spawn, rows, clean = multiprocessing.get_context("spawn"), {}, RandomImages()
    step = step_seconds()
    for path in sorted(CONFIGS.rglob("*.yaml")):
        attack = attack_of(path)
        if attack is None:
            continue
        name = path.relative_to(CONFIGS).with_suffix("").as_posix()
        queue = spawn.Queue()
        process = spawn.Process(target=poison_once, args=(name, queue))
        process.start()
        seconds, share, touched = queue.get()
        process.join()
        own, other = batch_seconds(attack, clean, arguments.rounds)
        rows[name] = {
            "touched_rows": touched,
            "seconds": round(seconds, 3),
            "memory_over_clean": round(share, 3),
            "input_over_clean": round(own / other, 3),
            "epoch_over_clean": round((own + step) / (other + step), 4),
        }
        print(name, rows[name], flush=True)
    record = {
        "what": "static attacks on 50,000 images of 32x32: cost of poisoning, one thread",
        "batch_size": BATCH,
        "milliseconds_per_step": round(1000 * step, 1),
        "augmentation": "weak",
        "rounds": arguments.rounds,
        "torch": torch.__version__.partition("+")[0],
        "attacks": rows,
    }
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
