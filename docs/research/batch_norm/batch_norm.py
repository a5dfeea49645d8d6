"""Which batch norm statistics the product of CBD carries, and what that does to a backdoor.

    python docs/research/batch_norm/batch_norm.py VICTIM RUNS --out record.json -- OPTION ...

VICTIM is the run folder of a victim. OPTION ... are those of its data, its attack and its trainer,
as `-c trainer/cpu -c data/cifar10`. Two products of `--method` are made in RUNS, with and without
adversarial batches in the running statistics. Five variants come from them, and the same
linear probe by L-BFGS measures each, and the victim:

- `running`: adversarial batches count as well (the default of CBD);
- `separate`: only clean views count;
- `running, re-estimated` and `separate, re-estimated`: the plain mean over the stored defence
  images (`reestimate_bn`);
- `running, suspect's`: the statistics of the suspect.

`neighbours` needs no label and no trigger: the share of defence images whose nearest neighbour is
the one that the suspect's features give, in percent. A finished run is not made again, and a line
of the same victim is replaced.
"""

import argparse
import copy
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bdclean.backbones import SplitModel, load_model, save_model
from bdclean.backbones.batchnorm import batch_norms, reestimate_
from bdclean.files import write_text
from bdclean.runs import RunFolder
from bdclean.types import View

BATCH = 128
_KEY = ("data", "attack", "seed")


def fit(run: Path, words: Sequence[str]) -> RunFolder:
    """A finished run of `bdclean fit`, made now unless it is there."""
    folder = RunFolder(run)
    if not folder.is_finished:
        resume = ["--ckpt_path", "last"] if folder.last_checkpoint.is_file() else []
        command = [sys.executable, "-m", "bdclean", "fit", *words, "--run", str(run), *resume]
        subprocess.run(command, check=True)  # noqa: S603  (the words of the user)
    return folder


def with_statistics(model: SplitModel, suspect: SplitModel) -> SplitModel:
    """A copy of `model` with the running statistics of `suspect`."""
    made = copy.deepcopy(model)
    for ours, theirs in zip(batch_norms(made.backbone), batch_norms(suspect.backbone), strict=True):
        ours.running_mean.copy_(theirs.running_mean)
        ours.running_var.copy_(theirs.running_var)
    return made


def reestimated(model: SplitModel, images: Sequence[Tensor]) -> SplitModel:
    """A copy of `model` whose running statistics are the plain mean over batches of images."""
    made = copy.deepcopy(model).train()
    reestimate_(made, made.features, images)
    return made.eval()


@torch.no_grad()
def neighbours(model: SplitModel, images: Sequence[Tensor]) -> Tensor:
    """The nearest other image of each, by cosine similarity of features: (N,)."""
    model.eval()
    features = functional.normalize(torch.cat([model.features(batch) for batch in images]).float())
    similarity = features @ features.T
    return similarity.fill_diagonal_(-1).argmax(1)


def images_of(run: RunFolder) -> Iterator[Tensor]:
    """Batches of the stored defence images (B, 3, H, W), float32 in [0, 1]."""
    data = run.make_data()
    data.prepare_data()
    data.setup("fit")
    for batch in data.reading_dataloader(View("defense", batch_size=BATCH)):
        yield data.device_batch(batch, torch.device("cpu"))["image"]


def measure(victim: RunFolder, runs: Path, method: str, options: Sequence[str]) -> dict[str, Any]:
    """The line of a victim: what each variant gives."""
    weights = ["--model.weights", str(victim.weights)]
    cbd = [*options, "-c", method, "--model.probe", "null", *weights]
    running = fit(runs / "running", cbd)
    separate = fit(runs / "separate", [*cbd, "--model.adv_updates_bn", "false"])
    suspect, mixed, clean = (load_model(run.weights) for run in (victim, running, separate))
    images = list(images_of(running))
    made = {
        "victim": suspect,
        "running": mixed,
        "separate": clean,
        "running, re-estimated": reestimated(mixed, images),
        "separate, re-estimated": reestimated(clean, images),
        "running, suspect's": with_statistics(mixed, suspect),
    }
    nearest = neighbours(suspect, images)
    lines = []
    for name, model in made.items():
        slug = "".join(letter if letter.isalnum() else "_" for letter in name)
        file = runs / f"{slug}.safetensors"
        save_model(model, file)
        probe = ["-c", "measure/linear_probe", "--model.probe.solver", "lbfgs"]
        run = fit(runs / f"probe_{slug}", [*options, *probe, "--model.weights", str(file)])
        metrics = run.read_record()["metrics"]
        kept = (neighbours(model, images) == nearest).double().mean()
        line = {key: metrics[key] for key in ("acc", "asr", "asr_floor", "pa")}
        lines.append({"variant": name, "neighbours": round(100 * float(kept), 1), **line})
    record = victim.read_record()
    return {
        "data": record["data"]["name"],
        "attack": record["data"]["attack"]["attack"],
        "seed": record["seed"],
        "victim": {key: record["metrics"][key] for key in ("acc", "asr", "pa")},
        "variants": lines,
    }


def markdown(lines: Sequence[dict[str, Any]]) -> str:
    """A table of all victims, one line for each variant."""
    head = [
        "data",
        "attack",
        "seed",
        "statistics",
        "neighbours",
        "ACC",
        "ASR",
        "without trigger",
        "PA",
    ]
    text = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for line in lines:
        for made in line["variants"]:
            figures = (made[key] for key in ("neighbours", "acc", "asr", "asr_floor", "pa"))
            cells = [*(str(line[key]) for key in _KEY), made["variant"]]
            text.append(f"| {' | '.join([*cells, *(f'{figure:.1f}' for figure in figures)])} |")
    return "\n".join(text) + "\n"


def main(words: Sequence[str] | None = None) -> None:
    """Measures a victim, keeps what it gave, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("victim", type=Path)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--method", default="purify/cbd/fast", help="Config of CBD.")
    given = list(sys.argv[1:] if words is None else words)
    cut = given.index("--") if "--" in given else len(given)
    arguments = parser.parse_args(given[:cut])
    line = measure(RunFolder(arguments.victim), arguments.runs, arguments.method, given[cut + 1 :])
    key = [line[name] for name in _KEY]
    lines = json.loads(arguments.out.read_text()) if arguments.out.is_file() else []
    others = [old for old in lines if [old[name] for name in _KEY] != key]
    write_text(arguments.out, json.dumps([*others, line], indent=2) + "\n")
    print(markdown([*others, line]), end="")


if __name__ == "__main__":
    main()
