"""What poisoning costs: seconds and memory once, and the share of an epoch's input side.

For every static attack file under configs/attack/, on 50,000 random 32x32 images:

- seconds to draw the plan and to make the poisoned rows;
- the highest memory use while doing so and afterwards, over that of the clean set alone;
- the time that one epoch of batches (256, crop and flip on the device) takes, over that of the
  clean set, in turns.

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
    _ = data.base, data.rows
    small = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    data.trigger.poison(small)  # the first call sets kernels up
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = memory("VmRSS")
    start = time.perf_counter()
    data.role_images("train", labels=True)
    seconds = time.perf_counter() - start
    touched = len(data.plan.touched_index)
    queue.put((seconds, (SET_MIB + memory("VmHWM") - before) / SET_MIB, touched))


def epoch(data):
    """Seconds of one pass over the training role, augmentation included."""
    data.set_view(View("train", "weak", batch_size=BATCH, labels=True))
    loader = data.train_dataloader()
    start = time.perf_counter()
    for batch in loader:
        data.on_after_batch_transfer(batch, 0)
    return time.perf_counter() - start


def epoch_ratio(attack, clean, rounds):
    """Median over turns of poisoned over clean seconds."""
    poisoned = RandomImages(attack=attack)
    poisoned.__dict__["base"] = clean.base  # share the images
    ratios = []
    for turn in range(rounds + 1):
        first, second = (clean, poisoned) if turn % 2 else (poisoned, clean)
        seconds = {id(first): epoch(first), id(second): epoch(second)}
        if turn:  # the first turn warms up
            ratios.append(seconds[id(poisoned)] / seconds[id(clean)])
    return statistics.median(ratios)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=6)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    spawn, rows, clean = multiprocessing.get_context("spawn"), {}, RandomImages()
    for path in sorted(CONFIGS.glob("*.yaml")):
        attack = attack_of(path)
        if attack is None:
            continue
        queue = spawn.Queue()
        process = spawn.Process(target=poison_once, args=(path.stem, queue))
        process.start()
        seconds, share, touched = queue.get()
        process.join()
        rows[path.stem] = {
            "touched_rows": touched,
            "seconds": round(seconds, 3),
            "memory_over_clean": round(share, 3),
            "epoch_over_clean": round(epoch_ratio(attack, clean, arguments.rounds), 3),
        }
        print(path.stem, rows[path.stem], flush=True)
    record = {
        "what": "static attacks on 50,000 images of 32x32: cost of poisoning, one thread",
        "batch_size": BATCH,
        "augmentation": "weak",
        "rounds": arguments.rounds,
        "torch": torch.__version__.partition("+")[0],
        "attacks": rows,
    }
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
