"""Fingerprints of all that a run produces: whether a change of the code changed a number.

Trains every method for an epoch or two on the digits, each through the command line, and runs
every file of `configs/attack` on random images (`fingerprints_attacks.py`). Writes a flat JSON
file of SHA-256 values and metrics. Run it at two commits on the same machine, and compare:

    python tests/benchmarks/fingerprints.py before.json   # in a checkout of the first commit
    python tests/benchmarks/fingerprints.py after.json    # in a checkout of the second one
    diff before.json after.json

`--only NAME ...` measures the runs and attacks of these names alone, and the runs that they start
from. The script measures the checkout that it lies in. Where the second commit has other keys or
files, change the words in the tables; the names of the entries stay, so that they compare.

Of each run, `fit/NAME/...` has the tensors of every weights file in its folder (names, types,
shapes and bytes), the metrics and the identification of `result.json`, what was logged, and what
was said of each sample. `fit/NAME/resumed` is `same` if the run ends with the same values when it
is stopped within epochs and gone on with; otherwise it names the values that differ.
"""
# ruff: noqa: E402  (the threads are set before torch starts them)

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
os.environ["MKL_CBWR"] = "COMPATIBLE"  # sums do not depend on where a tensor lies in memory
sys.path.insert(0, str(ROOT))

import argparse
import contextlib
import csv
import hashlib
import io
import json
import logging
import re
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from fingerprints_attacks import ATTACKS, Values, attacked, digest, files_left_out
from lightning.pytorch.callbacks import Callback
from safetensors.torch import load_file

from bdclean.cli import main as bdclean

# ------------------------------------------------------------------ the runs

# Before every line of the table: the trainer and the data.
BASE = "-c trainer/cpu -c data/digits --trainer.precision 32-true --trainer.deterministic true"
ATTACK = "-c attack/badnets/cbd"
ONE = "--model.width 4 --trainer.max_epochs 1"
TWO = "--model.width 4 --trainer.max_epochs 2"
VICTIM = "--model.weights @victim/model.safetensors"
FAST, SLOW = f"{ATTACK} -c train/supervised/fast", f"{ATTACK} -c train/supervised"
FEW = "--data.splits.defense 1200 --model.width 4"  # 100 images are left to train on
SSL = "-c attack/badnets/cbd_ssl"
VALIDATED = "--data.validate_in_fit true --data.splits.val 100"
LEARNED = (
    "-c attack/input_aware/official -c train/input_aware/fast --model.recipe.epochs 1 "
    f"--model.mask_epochs 1 --model.recipe.batch_size 20 {FEW}"
)
WORST = (
    f"{ATTACK} -c train/surrogate/adversarial {TWO} --data.splits.defense 1100 "
    "--model.batch_size 50 --model.pgd.steps 2"
)
SHORT = f"{VICTIM} --model.recipe.epochs 2 --model.pgd.steps 2"
CBD = f"{ATTACK} -c purify/cbd {SHORT}"
SOLVED = f"{CBD} --model.probe.solver lbfgs"
PULL, KD, SFT = "--model.lambda_pull", "--model.lambda_kd", "--model.lambda_sft"
BCU = f"{ATTACK} -c purify/bcu {VICTIM} --model.recipe.epochs 2"
# A training set of 300 images, in batches of 25.
RECIPE = (
    "--data.splits.defense 1000 --data.attack.rate 0.1 --model.width 4 --model.recipe.epochs 2 "
    "--model.recipe.batch_size 25"
)
ADVRBD = (
    f"{RECIPE} --model.rounds.count 2 --model.rounds.of_all 1 --model.rounds.partition_rate 0.1 "
    "--model.patch.pgd.steps 2 --model.rounds.ascent_steps 8 --model.enhance_steps 8 "
    "--model.finetune.epochs 1 --model.confidence 0.3"
)
ABL = f"{RECIPE} --model.isolation.epochs 2 --model.isolated 0.1 --model.unlearning.epochs 2"
DBR = f"{RECIPE} --model.warm.epochs 1 --model.separate.epochs 1 --model.removal.epochs 2"
SCAN = f"{RECIPE} --model.unlearn.epochs 2 --model.unlearn.batch_size 25 --model.threshold 0.5"

# Name, command, and words; `-c` names a config, `@NAME` the folder of another run.
TABLE = f"""
victim                  fit {FAST} --model.width 4 --trainer.max_epochs 5 --model.batch_size 25
supervised_onecycle     fit {FAST} {TWO}
supervised_cosine       fit {SLOW} {TWO}
supervised_constant     fit {SLOW} {TWO} --model.schedule constant
supervised_multistep    fit {SLOW} {TWO} --model.schedule multistep --model.gamma 0.3
supervised_smooth       fit {SLOW} {ONE} --model.label_smoothing 0.1 --seed_everything 3
supervised_from_weights fit {FAST} {VICTIM} --trainer.max_epochs 1
supervised_accumulated  fit {FAST} {TWO} --trainer.accumulate_grad_batches 2
supervised_bf16         fit {FAST} {ONE} --trainer.precision bf16-mixed
supervised_validated    fit {FAST} {TWO} {VALIDATED}
supervised_surrogate    fit -c attack/none -c train/surrogate {TWO}
mobilenet               fit {FAST} --model.arch mobilenet_v2 --model.batch_size 8 \
                            --trainer.max_steps 3 --test_after_fit false
augmentation_none       fit {FAST} {ONE} --model.augmentation none
augmentation_crop       fit {FAST} {ONE} --model.augmentation crop
augmentation_simclr     fit {FAST} {ONE} --model.augmentation simclr
augmentation_blur       fit {FAST} {ONE} --model.augmentation simclr_blur
augmentation_imagenet   fit {FAST} {ONE} --model.augmentation imagenet
augmentation_wanet      fit -c attack/wanet/cbd -c train/supervised/wanet {TWO}
augmentation_physical   fit -c attack/physical/advrbd -c train/supervised/physical {TWO}
augmentation_of_poison  fit -c attack/physical/backdoorbox -c train/supervised/fast {ONE} \
                            --data.attack.apply_to poison
wanet_static            fit -c attack/wanet/advrbd -c train/supervised/fast {ONE}
wanet_by_batch          fit -c attack/wanet/bcu -c train/supervised/fast {ONE}
label_consistent        fit -c attack/label_consistent/cbd -c train/supervised/noaug {ONE} \
                            --data.attack.surrogate @supervised_surrogate/model.safetensors
clean_part              fit -c attack/tact/advrbd -c bound/clean_part {TWO}
adversarial             fit {WORST}
adversarial_bn          fit {WORST} --model.perturb_bn train
simclr                  fit {SSL} -c train/simclr/fast {TWO} --model.batch_size 100
simclr_lars             fit {SSL} -c train/simclr/lars {TWO}
simclr_watched          fit {SSL} -c train/simclr/fast {ONE} {VALIDATED} --model.knn_k 20
probe_sgd               fit {ATTACK} -c measure/linear_probe {VICTIM} \
                            --model.probe.recipe.epochs 4 --model.probe.recipe.batch_size 25
probe_lbfgs             fit {ATTACK} -c measure/linear_probe {VICTIM} --model.probe.solver lbfgs
probe_of_backbone       fit {ATTACK} -c measure/linear_probe --model.probe.recipe.epochs 2 \
                            --model.weights @simclr/model.safetensors
knn                     test {ATTACK} -c measure/knn {VICTIM} --model.k 20
input_aware             fit {LEARNED}
input_aware_accumulated fit {LEARNED} --model.reproduce_grad_accum true \
                            --model.recipe.lr 0.001 --model.recipe.schedule constant
input_aware_frozen      fit -c attack/input_aware/official -c train/supervised/fast {FEW} \
                            --trainer.max_epochs 1 \
                            --data.attack.trigger @input_aware/trigger.safetensors
cbd                     fit {CBD} --model.probe.recipe.epochs 4
cbd_fast                fit {ATTACK} -c purify/cbd/fast {SHORT}
cbd_ssl                 fit {SSL} -c purify/cbd/ssl {SHORT} \
                            --model.weights @simclr/model.safetensors
cbd_headless            fit {CBD} --model.probe null
cbd_sft                 fit {SOLVED} {PULL} 0 {KD} 0 {SFT} 1
cbd_pull_kd             fit {SOLVED} {PULL} .5 {KD} .5 {SFT} 0
cbd_pull_sft            fit {SOLVED} {PULL} .5 {KD} 0 {SFT} .5
cbd_pull                fit {SOLVED} {PULL} 1 {KD} 0 {SFT} 0
cbd_pull_i              fit {SOLVED} {PULL} 1 {KD} 0 {SFT} 0 --model.adv_reference i
cbd_l2                  fit {SOLVED} --model.pgd.norm l2 --model.pgd.epsilon 1024
cbd_attack_bn           fit {SOLVED} --model.perturb_bn train
cbd_step                fit {SOLVED} --model.pgd.step_unit pixel255 \
                            --model.pgd.random_start false
cbd_bn                  fit {SOLVED} --model.adv_updates_bn false --model.reestimate_bn true
cbd_rows                fit {SOLVED} --model.symmetric false --model.recipe.schedule multistep
cbd_bf16                fit {SOLVED} --trainer.precision bf16-mixed
cbd_pretrain            fit {SOLVED} --model.projection.mode pretrain \
                            --model.projection.epochs 2
cbd_joint               fit {SOLVED} --model.projection.mode joint --model.perturb_bn train
cbd_imagenet100         fit {ATTACK} -c purify/cbd/imagenet100 {SHORT} \
                            --model.probe.recipe.epochs 2
cbd_imagenet100_ssl     fit {ATTACK} -c purify/cbd/imagenet100_ssl {SHORT} \
                            --model.projection.epochs 1 --model.recipe.batch_size 64
bcu                     fit {BCU}
bcu_uniform             fit {BCU} --model.strategy uniform
bcu_decreasing          fit {BCU} --model.strategy decreasing --model.gamma 2
bcu_single_stage        fit {BCU} --model.strategy single_stage --model.single_group 2
bcu_none                fit {BCU} --model.strategy none
bcu_strong              fit {BCU} --model.strength 3 --model.reinit_seed 1
bcu_ratios              fit {BCU} --model.ratios [0,0,.1,.1,.2,.2,.3,.3,.4,1]
bcu_hard                fit {BCU} --model.labels hard --model.recipe.batch_size 100
bcu_constant            fit {BCU} --model.recipe.schedule constant --model.recipe.batch_size 100
bcu_temperature         fit {BCU} --model.temperature_schedule constant
bcu_checkpoint          fit {BCU} --model.weights @victim/checkpoints/last.ckpt \
                            --model.arch resnet18 --model.width 4
advrbd                  fit {ATTACK} -c sift/advrbd {ADVRBD}
advrbd_fast             fit {ATTACK} -c sift/advrbd/fast {ADVRBD}
advrbd_score            fit {ATTACK} -c sift/advrbd {ADVRBD} --model.until score
advrbd_identify         fit {ATTACK} -c sift/advrbd {ADVRBD} --model.until identify \
                            --model.patch.shape disc --model.patch.inner ce \
                            --model.patch.num_masks 1 --model.ascent_cap null \
                            --model.seed 1 --model.rounds.of_all 0
advrbd_retrain          fit {ATTACK} -c sift/advrbd {ADVRBD} --model.until retrain \
                            --model.first_augmentation crop --model.first_epochs 1
abl                     fit {ATTACK} -c sift/abl {ABL}
abl_fast                fit {ATTACK} -c sift/abl/fast {ABL}
abl_official            fit {ATTACK} -c sift/abl/official {ABL} --model.ascent flooding
abl_bench               fit {ATTACK} -c sift/abl/bench {ABL} --model.fresh_start true \
                            --model.ascent_cap 1
dbr                     fit {ATTACK} -c sift/dbr {DBR}
dbr_fast                fit {ATTACK} -c sift/dbr/fast {DBR} --model.seed 1
scan                    fit {ATTACK} -c sift/scan {SCAN}
scan_eval               fit {ATTACK} -c sift/scan {SCAN} --model.unlearn_bn eval \
                            --model.components 8
scan_retrain            fit {ATTACK} -c sift/scan/fast {SCAN} --model.components 8
"""


def full(words: str) -> list[str]:
    """The words after `bdclean`."""
    command, *rest = f"{words.split()[0]} {BASE} {' '.join(words.split()[1:])}".split()
    return [command, *rest]


RUNS = {line.split()[0]: full(line.split(maxsplit=1)[1]) for line in TABLE.strip().splitlines()}

# Runs that are stopped again and again, and gone on with each time: after which batches.
STOPPED = {
    "supervised_onecycle": (3, 11),
    "adversarial": (2, 7),
    "clean_part": (3, 11),
    "simclr": (3, 13),
    "probe_sgd": (2, 10),
    "input_aware": (3, 7),
    "input_aware_accumulated": (3, 7),
    "cbd": (1, 5),
    "cbd_pretrain": (1, 5),
    "bcu_hard": (1, 4),
    "advrbd": (15, 25, 30, 37, 41, 50, 60, 73),
    "abl": (1, 10, 31),
    "dbr": (1, 4, 15, 31),
    "scan": (15, 25),
    "scan_retrain": (15, 30),
}
STOP = ["--trainer.callbacks+", "__main__.Stop", "--test_after_fit", "false"]

# ------------------------------------------------------------------ measuring runs


class Stop(Callback):
    """Ends a fit after some batches, as a limit of time does."""

    def __init__(self, batches: int):
        self.left = batches

    def on_train_batch_end(self, trainer, *_):
        self.left -= 1
        trainer.should_stop = self.left <= 0


def flat(tree: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """Leaves of nested JSON objects by path; lists are leaves."""
    if not isinstance(tree, dict):
        yield prefix, tree
        return
    for key, value in tree.items():
        yield from flat(value, f"{prefix}/{key}")


def columns(path: Path, wanted: str) -> Iterator[tuple[str, str]]:
    """Hash of each column of a CSV file whose name matches."""
    with path.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    if rows and "index" in rows[0]:
        rows.sort(key=lambda row: int(row["index"]))
    for name in rows[0] if rows else ():
        if re.fullmatch(wanted, name):
            cells = ",".join(row[name] or "" for row in rows).strip(",")
            yield name, hashlib.sha256(cells.encode()).hexdigest()


def results(folder: Path) -> Values:
    """What a run has left in its folder."""
    found: Values = {
        f"tensors/{path.stem}": digest(load_file(path)) for path in folder.glob("*.safetensors")
    }
    record = next(
        folder / name for name in ("result.json", "test.json") if (folder / name).exists()
    )
    facts = json.loads(record.read_text())
    found |= flat(facts["metrics"], "metrics")
    found |= flat(facts.get("identification", {}), "identification")
    numbers = {k: v for k, v in facts["protocol"].items() if not isinstance(v, str)}
    found |= flat(numbers, "protocol")
    found |= {f"data/{key}": facts["data"].get(key) for key in ("plan_hash", "split_hash")}
    found |= {f"cost/{key}": facts["cost"][key] for key in ("steps", "epochs")}
    if (folder / "suspects.csv").exists():
        said = columns(folder / "suspects.csv", "label|score|flagged|proposed")
        found |= {f"samples/{name}": value for name, value in said}
    if (folder / "metrics.csv").exists():
        found |= {f"log/{k}": v for k, v in columns(folder / "metrics.csv", "(?!test).*/.*")}
    return found


def call(words: list[str]) -> None:
    """Runs a command line, quietly; shows what it said if it fails."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            bdclean(words)
    except (SystemExit, Exception) as error:
        raise RuntimeError(f"{' '.join(words)}\n{said.getvalue()[-3000:]}") from error


def measure(name: str, root: Path, done: dict[str, Values]) -> None:
    """Runs an entry of the table, after those that it starts from."""
    if name in done:
        return
    words = RUNS[name]
    for other in re.findall(r"@(\w+)", " ".join(words)):
        measure(other, root, done)
    words = [re.sub(r"@(\w+)", lambda found: str(root / found[1]), word) for word in words]
    start = time.perf_counter()
    call([*words, "--run", str(root / name)])
    done[name] = results(root / name)
    say(name, start)
    if name in STOPPED:
        start = time.perf_counter()
        resumed = go_on(words, root / f"{name}_again", STOPPED[name])
        done[name]["resumed"] = compared(done[name], resumed)
        say(f"{name}, resumed", start)


def go_on(words: list[str], folder: Path, stops: tuple[int, ...]) -> Values:
    """What a run leaves that is stopped after these batches, and gone on with each time."""
    again = [*words, "--run", str(folder)]
    for before, stop in pairwise((0, *stops)):
        call([*again, *STOP, "--trainer.callbacks.batches", str(stop - before)])
        again = [*words, "--run", str(folder), "--ckpt_path", "last"]
    call(again)
    return results(folder)


def compared(whole: Values, resumed: Values) -> str:
    """`same`, or the entries that differ; what was logged is a mean over a part of an epoch."""
    keys = (key for key in whole.keys() | resumed.keys() if not key.startswith("log/"))
    return ", ".join(sorted(k for k in keys if whole.get(k) != resumed.get(k))) or "same"


def say(name: str, start: float) -> None:
    """One line of progress."""
    print(f"{name}: {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)


# ------------------------------------------------------------------ all of it


def chosen(names: list[str] | None) -> set[str]:
    """The names to measure; leaves if one is unknown, or a file of `configs/attack` is left out."""
    known = RUNS.keys() | ATTACKS.keys()
    wrong = files_left_out() | (set(names or ()) - known)
    if wrong:
        sys.exit(f"not in the tables of this script: {', '.join(sorted(wrong))}")
    return set(names or known)


def fingerprints(wanted: set[str], root: Path) -> Iterator[tuple[str, Values]]:
    """Values of each entry; of one that fails, what it said."""
    runs: dict[str, Values] = {}
    for name in RUNS:
        if name in wanted:
            try:
                measure(name, root, runs)
            except Exception:
                runs[name] = {"failed": traceback.format_exc()}
    yield from ((f"fit/{name}", values) for name, values in runs.items())
    for name in ATTACKS:
        if name in wanted:
            start = time.perf_counter()
            try:
                yield f"attack/{name}", attacked(name, root)
            except Exception:
                yield f"attack/{name}", {"failed": traceback.format_exc()}
            say(name, start)


def main() -> None:
    """Measures, and writes the file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="of runs and attacks")
    arguments = parser.parse_args()
    wanted, start = chosen(arguments.only), time.perf_counter()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    made_with = f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}"
    found: Values = {"made with": made_with}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
        for entry, values in fingerprints(wanted, Path(folder)):
            found |= {f"{entry}/{key}": value for key, value in values.items()}
    arguments.out.write_text(json.dumps(found, indent=0, sort_keys=True) + "\n")
    failed = {key: value for key, value in found.items() if key.endswith("/failed")}
    for key, text in failed.items():
        print(f"{key}: {text}", file=sys.stderr)
    say(f"{len(found)} values, {len(failed)} failures", start)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
