"""Which score of AdvrBD's first network ranks the poisoned samples lowest.

    python docs/research/advrbd_score/advrbd_score.py RUN --out record.json

RUN is the folder of a finished fit of `sift/advrbd` with `--model.until score`. Each sample is
attacked under 30 patches: six at drawn places and nine on a grid that is the same for all samples,
once with the divergence (KL) maximised and once with the cross-entropy. Two changes are read off
each: the divergence, and how far the margin falls, the logit of the class predicted without the
patch over the largest other one. A score is one change, put together over some of the patches. For
each score, with a low one for poisoned:

- `auroc`: of the poisoned samples against the clean ones with the target label, in percent;
- `others`: of the poisoned samples against samples of other labels;
- `joined`: the share of the poisoned samples among the highest 16 % of the target label, which
  AdvrBD would take for clean, in percent. A score that knows nothing gives 16.

`repeats` holds Spearman's correlation of two single draws. Samples: up to 1,000 poisoned ones,
clean ones with the target label, and others. A line of the same attack, seed and number of training
samples is replaced.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bdclean.backbones import SplitModel, load_model
from bdclean.backbones.perturber import Perturber, perturb_precision
from bdclean.data import ImageDataModule
from bdclean.files import write_text
from bdclean.functional.consistency import (
    Inner,
    adversarial_patch,
    patch_mask,
    prediction_change,
)
from bdclean.functional.pgd import PGD
from bdclean.runs import RunFolder

BATCH = 250
ASCENT = PGD(8.0, 2, 0.75)  # as in sift/advrbd/fast
DRAWN, SIDE = 6, 3  # patches at drawn places; patches along a side of the grid
JOINED = 0.16  # what AdvrBD takes of each label in the end
SAMPLES = 1000  # of each kind at most
Join = Callable[[Tensor], Tensor]
SHOWN = (
    ("3 drawn, kl, kl", "least"),
    ("6 drawn, kl, kl", "least"),
    ("9 grid, kl, kl", "least"),
    ("9 grid, ce, kl", "least"),
    ("9 grid, ce, kl", "second least"),
    ("9 grid, ce, margin", "least"),
    ("9 grid, ce, margin", "second least"),
    ("9 grid, ce, margin", "median"),
    ("6 drawn, ce, margin", "median"),
    ("9 grid, kl, margin", "median"),
)
_KEY = ("attack", "seed", "trained on")


def least(changes: Tensor, rank: int = 0) -> Tensor:
    """The least of each sample's changes (P, N), or that after `rank` smaller ones: (N,)."""
    return changes.sort(0).values[rank]


def joins() -> dict[str, Join]:
    """How the changes under several patches, (P, N), become a score, (N,)."""
    return {
        "least": least,
        "second least": partial(least, rank=1),
        "median": lambda changes: changes.median(0).values,
        "mean": lambda changes: changes.mean(0),
    }


def margin(logits: Tensor, named: Tensor) -> Tensor:
    """The logit of the class `named` (N,) over the largest other one: (N,)."""
    own = logits.gather(1, named[:, None])
    others = logits.scatter(1, named[:, None], -torch.inf)
    return own[:, 0] - others.amax(1)


def auroc(low: Tensor, high: Tensor) -> float:
    """The chance in percent that a value of `low` is below one of `high`; equal ones are half."""
    order = high.sort().values
    below = torch.searchsorted(order, low, side="right").double()
    equal = below - torch.searchsorted(order, low, side="left")
    return 100 * float(1 - ((below - equal / 2) / len(high)).mean())


def ranks(values: Tensor) -> Tensor:
    """The place of each value in the order of all: (N,), from 0."""
    return values.argsort().argsort().double()


def centres(size: int) -> list[tuple[int, int]]:
    """Rows and columns of the grid."""
    places = [round((2 * place + 1) * size / (2 * SIDE)) for place in range(SIDE)]
    return [(row, column) for row in places for column in places]


def changes_of(model: SplitModel, images: Tensor) -> dict[str, Tensor]:
    """Both changes under each patch, (P, N), by `place, maximised, change`."""
    made = {}
    for place, inner in ("drawn", "kl"), ("drawn", "ce"), ("grid", "kl"), ("grid", "ce"):
        parts = [
            _batch(model, batch, place, inner, number)
            for number, batch in enumerate(images.split(BATCH))
        ]
        for change in "kl", "margin":
            made[f"{place}, {inner}, {change}"] = torch.cat([part[change] for part in parts], 1)
    return made


def _batch(
    model: SplitModel, images: Tensor, place: str, inner: Inner, number: int
) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(number)
    size, head = images.shape[-1], model.require_head()
    before = _exactly(model, images)
    named, kl, falls = before.argmax(1), [], []
    for patch in range(DRAWN) if place == "drawn" else centres(size):
        if isinstance(patch, tuple):
            where = torch.tensor(patch).expand(len(images), 2)
        else:
            where = torch.randint(size, (len(images), 2), generator=draw)
        mask = patch_mask(where, size // 8, size)
        with torch.autocast("cpu", torch.bfloat16), perturb_precision("cpu") as dtype:
            copy = Perturber(model, "eval", dtype)
            predict = partial(_predict, copy, head)
            moved = adversarial_patch(images, before, mask, predict, ASCENT, inner, draw)
        after = _exactly(model, moved)
        kl.append(prediction_change(before, after))
        falls.append(margin(before, named) - margin(after, named))
    return {"kl": torch.stack(kl), "margin": torch.stack(falls)}


def _predict(copy: Perturber, head: nn.Module, images: Tensor) -> Tensor:
    logits: Tensor = head(copy.features(images).float())
    return logits


@torch.no_grad()
def _exactly(model: SplitModel, images: Tensor) -> Tensor:
    logits: Tensor = model(images)
    return logits.float()


def samples(data: ImageDataModule) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of poisoned samples, of clean ones with the target label, and of clean others."""
    known = data.training_set()
    if known.poisoned is None or not known.poisoned.any():
        raise SystemExit("This run poisons no fixed samples.")
    target = known.labels[known.poisoned].mode().values
    clean = ~known.poisoned if known.covers is None else ~(known.poisoned | known.covers)
    draw = torch.Generator().manual_seed(0)

    def some(of: Tensor) -> Tensor:
        rows = of.nonzero().flatten()
        return rows[torch.randperm(len(rows), generator=draw)[:SAMPLES]]

    same = known.labels == target
    return some(known.poisoned), some(clean & same), some(clean & ~same)


def measure(folder: Path) -> dict[str, Any]:
    """The line of a run."""
    run = RunFolder(folder)
    data, record = run.make_data(), run.read_record()
    model = load_model(folder / "suspect.safetensors").eval()
    groups = samples(data)
    images = data.training_images(torch.cat(groups)).float() / 255
    made = changes_of(model, images.contiguous(memory_format=torch.channels_last))
    bad, same, _ = (len(group) for group in groups)
    lines = []

    def add(patches: str, join: str, score: Tensor) -> None:
        poisoned, clean, others = score.split([bad, same, len(score) - bad - same])
        bound = torch.cat([poisoned, clean]).quantile(1 - JOINED)
        figures = {
            "auroc": auroc(poisoned, clean),
            "others": auroc(poisoned, others),
            "joined": 100 * float((poisoned > bound).double().mean()),
        }
        lines.append(
            {"patches": patches, "join": join} | {k: round(v, 1) for k, v in figures.items()}
        )

    for patches, changes in made.items():
        if patches.startswith("drawn"):
            add(f"1 {patches}", "least", changes[0])
            add(f"3 {patches}", "least", least(changes[:3]))
        for join, put in joins().items():
            add(f"{len(changes)} {patches}", join, put(changes))
    repeats = {
        change: round(float(torch.corrcoef(torch.stack([ranks(row) for row in pair[:2]]))[0, 1]), 2)
        for change, pair in (
            ("kl", made["drawn, kl, kl"]),
            ("margin", made["drawn, kl, margin"]),
            ("margin under ce", made["drawn, ce, margin"]),
        )
    }
    return {
        "attack": type(data.attack).__name__,
        "seed": record["seed"],
        "trained on": len(data.training_set().labels),
        "repeats": repeats,
        "scores": lines,
    }


def markdown(lines: Sequence[dict[str, Any]]) -> str:
    """The table of the page: `auroc` / `others` / `joined` of the scores that tell most."""
    heads = [f"{line['attack']}, {line['trained on'] // 1000}k" for line in lines]
    rows = [f"| patches, maximised, change | counts | {' | '.join(heads)} |"]
    rows.append("|---" * (2 + len(heads)) + "|")
    for patches, join in SHOWN:
        cells = []
        for line in lines:
            seen = [s for s in line["scores"] if (s["patches"], s["join"]) == (patches, join)]
            cells += [f"{s['auroc']} / {s['others']} / {s['joined']}" for s in seen] or [""]
        rows.append(f"| {patches} | {join} | {' | '.join(cells)} |")
    return "\n".join(rows)


def main(args: Sequence[str] | None = None) -> None:
    """Adds a run to a file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args(args)
    line = measure(arguments.run)
    lines = json.loads(arguments.out.read_text()) if arguments.out.is_file() else []
    others = [old for old in lines if any(old[key] != line[key] for key in _KEY)]
    write_text(arguments.out, json.dumps([*others, line]) + "\n")
    print(markdown([*others, line]))


if __name__ == "__main__":
    main()
