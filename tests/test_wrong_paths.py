"""A wrong path is told before anything is trained or written."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bdclean.backbones import ModelInfo, build, save_model
from bdclean.cli import main
from bdclean.data import Digits
from bdclean.training import Supervised

CONFIGS = Path(__file__).parents[1] / "configs"
pytestmark = pytest.mark.filterwarnings("ignore")
NO_TEST = "No folder set/test. Expected set/test/CLASS/IMAGE.jpg"
WAY_OUT = "(--test_after_fit false)"
NO_FILE = "attack.surrogate=missing.safetensors: there is no such file"


def stack(*names):
    return [w for name in names for w in ("-c", str(CONFIGS / f"{name}.yaml"))]


FOLDER = [
    *("--data", "bdclean.data.ImageFolder", "--data.input_size", "16", "--data.root", "set"),
    *("--data.splits.defense", "0", "--data.splits.probe", "0"),
]
RUN = ["--trainer.max_epochs", "1", "--model.width", "4", "--run", "run"]
FIT = ["fit", *stack("trainer/cpu", "train/supervised/fast"), *FOLDER, *RUN]
ATTACK = ["--data.attack", "bdclean.attacks.BadNets"]
CONSISTENT = [
    *stack("data/digits", "attack/label_consistent/cbd"),
    *("--data.attack.surrogate", "missing.safetensors"),
]


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """Works in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(part, *classes):
    for name in classes:
        for i in range(12):
            pixels = np.full((16, 16, 3), 20 * i, dtype=np.uint8)
            (Path("set") / part / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(Path("set") / part / name / f"{i}.png")


@pytest.fixture
def training(monkeypatch):
    """Whether a step was trained."""
    steps = []
    whole = Supervised.training_step

    def step(self, batch, batch_idx):
        steps.append(batch_idx)
        return whole(self, batch, batch_idx)

    monkeypatch.setattr(Supervised, "training_step", step)
    return steps


def refused(words, capsys):
    """The message of a command that must leave the folder as it was."""
    before = sorted(Path().rglob("*"))
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    assert sorted(Path().rglob("*")) == before
    shown = capsys.readouterr().err
    assert "Traceback" not in shown
    told = [line for line in shown.splitlines() if line.startswith("bdclean: ")]
    assert len(told) == 1
    return told[0]


# ---------------------------------------------------------------------- test folders


def spoil(case):
    """A data set, and what is said of its test images."""
    if case == "flat":
        write("", "cat", "dog")
        return ["There are no test images, because set has no folder train", WAY_OUT]
    write("train", "cat", "dog")
    if case == "no test folder":
        return [NO_TEST, WAY_OUT]
    if case == "no classes":
        Path("set/test").mkdir()
        return ["set/test holds no class folders"]
    if case == "other classes":
        write("test", "cat", "emu")
        return ["differ in the class folders ['dog', 'emu']"]
    if case == "no images":
        for name in ("cat", "dog"):
            (Path("set/test") / name).mkdir(parents=True)
        return ["No images below set/test"]
    write("test", "cat", "dog")
    Path("set/test/dog/3.png").write_bytes(b"no image")
    return ["dog/3.png is not a readable image"]


CASES = ["no test folder", "flat", "no classes", "other classes", "no images", "a broken image"]


@pytest.mark.parametrize("case", CASES)
def test_wrong_test_images_are_told_before_the_training(case, training, capsys):
    parts = spoil(case)
    told = refused(FIT, capsys)
    assert all(part in told for part in parts)
    assert not training


@pytest.mark.parametrize("case", ["no test folder", "other classes"])
@pytest.mark.parametrize("command", ["test", "preview", "export"])
def test_other_commands_tell_it_as_well(command, case, capsys):
    parts = spoil(case)
    words = {
        "test": ["test", *FIT[1:]],
        "preview": ["attack", "preview", *FOLDER, *ATTACK],
        "export": ["attack", "export", *FOLDER, *ATTACK, "--out", "out"],
    }
    told = refused(words[command], capsys)
    assert parts[0] in told


@pytest.mark.parametrize("words", [["--test_after_fit", "false"], ["--trainer.fast_dev_run", "1"]])
def test_a_fit_without_a_test_needs_no_test_images(words, training):
    spoil("no test folder")
    main([*FIT, *words])
    assert training
    assert Path("run/config.yaml").exists() == ("--test_after_fit" in words)


def test_a_product_without_a_head_needs_no_test_images(capsys):
    write("", "a", "b")
    model = build(ModelInfo("resnet18", 2, 16, (0.5,) * 3, (0.25,) * 3, width=4))
    save_model(model, Path("suspect.safetensors"))
    data = ["--data", "bdclean.data.ImageFolder", "--data.input_size", "16"]
    data += ["--data.num_classes", "2", "--data.defense_root", "set"]
    words = ["fit", *stack("trainer/cpu", "purify/cbd"), *data, "--run", "run"]
    words += ["--model.weights", "suspect.safetensors", "--model.recipe.epochs", "1"]
    words += ["--model.pgd.steps", "1", "--model.recipe.batch_size", "8"]
    told = refused([*words, "--model.probe.solver", "lbfgs"], capsys)
    assert "root=null: without it there are no train images" in told
    assert "--model.probe null" in told
    main([*words, "--model.probe", "null"])
    assert "Nothing was measured: the data has no labelled test images." in capsys.readouterr().out


# ---------------------------------------------------------------------- broken files


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n"
BROKEN = (
    "Train/cat/3.png is not a readable image (it holds PostScript); convert it to BMP, JPEG, "
    "PNG, PPM, TIFF or WebP, or remove it, or leave out such files with --data.on_error skip."
)


@pytest.fixture
def broken():
    for part in ("Train", "Test"):
        write(part, "cat", "dog")
    Path("set/Train/cat/3.png").write_bytes(EPS)


def test_a_broken_file_is_told_by_every_command(broken, training, capsys):
    assert refused(FIT, capsys) == f"bdclean: set/{BROKEN}"
    export = ["attack", "export", *FOLDER, *ATTACK, "--out", "out"]
    assert refused(export, capsys) == f"bdclean: set/{BROKEN}"
    photos = [*FIT, "--data.defense_root", "set/Train/cat", "--data.root", "set/Test"]
    assert BROKEN in refused(photos, capsys)
    assert BROKEN in refused(["sift", "set", "--run", "run"], capsys)
    assert not training


def test_a_run_records_what_it_skipped(broken, training, capsys):
    skip = ["--data.on_error", "skip"]
    with pytest.warns(UserWarning, match="1 of 24 image files below set/Train cannot be") as told:
        main([*FIT, *skip])
    assert len([each for each in told if "left out" in str(each.message)]) == 1
    assert training
    data = json.loads(Path("run/result.json").read_text())["data"]
    assert data["skipped"] == {"training images": {"number": 1, "first": ["cat/3.png"]}}
    assert data["sizes"]["train"] == 23
    main([*FIT, *skip, "--ckpt_path", "last"])
    write("Train", "cat")
    told = refused([*FIT, *skip, "--ckpt_path", "last"], capsys)
    assert "training images" in told
    main(["attack", "export", *FOLDER, *ATTACK, *skip, "--out", "out"])
    assert len(list(Path("out/train").rglob("*.png"))) == 24


# ---------------------------------------------------------------------- other files


@pytest.mark.parametrize("method", ["train/supervised/noaug", "sift/abl/fast"])
def test_a_missing_surrogate_is_told_before_anything_is_written(method, training, capsys):
    assert NO_FILE in refused(["fit", *stack("trainer/cpu", method), *CONSISTENT, *RUN[2:]], capsys)
    assert not training


def test_attack_commands_tell_of_a_missing_surrogate(capsys):
    assert NO_FILE in refused(["attack", "preview", *CONSISTENT], capsys)
    assert NO_FILE in refused(["attack", "export", *CONSISTENT, "--out", "out"], capsys)


def test_an_evaluation_needs_no_surrogate(capsys):
    save_model(build(ModelInfo("resnet18", 10, 32, (0.1,) * 3, (0.2,) * 3, 4)), "net.safetensors")
    words = ["test", *stack("trainer/cpu", "train/supervised/noaug"), *CONSISTENT]
    main([*words, "--run", "run", "--model.weights", "net.safetensors"])
    assert Path("run/test.json").is_file()


def test_a_folder_that_was_there_stays(capsys):
    spoil("no test folder")
    Path("run").mkdir()
    refused(FIT, capsys)


def test_the_missing_data_set_leaves_no_folder(capsys):
    words = stack("trainer/cpu", "data/cifar10", "train/supervised/fast")
    assert "cifar-10-batches-py" in refused(["fit", *words, "--data.root", "no", *RUN], capsys)


def test_the_test_set_is_read_once(monkeypatch):
    """The test after the fit takes what was read before it."""
    reads, whole = [], Digits.read_test
    monkeypatch.setattr(Digits, "read_test", lambda self: reads.append(self) or whole(self))
    words = [*stack("trainer/cpu", "data/digits", "train/supervised/fast"), *RUN]
    main(["fit", *words, "--trainer.limit_train_batches", "1"])
    assert len(reads) == 1


def test_a_missing_checkpoint_is_told(training, capsys):
    write("train", "cat", "dog")
    write("test", "cat", "dog")
    told = refused([*FIT, "--ckpt_path", "gone.ckpt"], capsys)
    assert "--ckpt_path gone.ckpt: there is no such file" in told
    assert not training


def test_validation_needs_no_test_images():
    spoil("no test folder")
    save_model(build(ModelInfo("resnet18", 2, 16, (0.1,) * 3, (0.2,) * 3, 4)), "net.safetensors")
    main(["validate", *FIT[1:], "--data.splits.val", "4", "--model.weights", "net.safetensors"])


def test_further_evaluation_sets_are_counted_after_every_epoch():
    words = [*stack("trainer/cpu", "data/digits", "train/supervised/fast"), *RUN]
    words += ["--data.attack", "bdclean.attacks.TaCT", "--data.attack.target", "4"]
    words += ["--data.splits.val", "40", "--data.validate_in_fit", "true"]
    words += ["--trainer.limit_train_batches", "1", "--trainer.max_epochs", "2"]
    main(["fit", *words])
    lines = Path("run/metrics.csv").read_text().splitlines()
    place = lines[0].split(",").index("val/leak")
    assert len([line for line in lines[1:] if line.split(",")[place]]) == 2


# ---------------------------------------------------------------------- words

DIGITS = ["-c", "data/digits", "-c", "attack/badnets/cbd"]
BASE = ["fit", "-c", "trainer/cpu", *DIGITS, "-c", "train/supervised/fast"]
AUGMENTATIONS = "none, crop, weak, simclr, simclr_blur, imagenet, wanet or physical"
WORDS = {
    "a misspelt argument": (
        [*BASE, "--model.widht", "4"],
        "--model.widht: Supervised has no such option. Did you mean --model.width?",
    ),
    "one of an attack": (
        [*BASE, "--data.attack.rat", "0.1"],
        "--data.attack.rat: BadNets has no such option. Did you mean --data.attack.rate?",
    ),
    "one of a group": (
        [*BASE, "--data.splits.defence", "10"],
        "--data.splits.defence: Digits has no such option. Did you mean --data.splits.defense?",
    ),
    "one of a class below the method": (
        [*BASE, "--model.optimizer.init_args.lrr", "0.1"],
        "--model.optimizer.lrr: SGD has no such option. Did you mean --model.optimizer.lr?",
    ),
    "one of the Trainer, which is not completed": (
        [*BASE, "--trainer.max_epoch", "4"],
        "--trainer.max_epoch: there is no such option. Did you mean --trainer.max_epochs?",
    ),
    "a misspelt section": (
        [*BASE, "--trainr.max_epochs", "4"],
        "--trainr.max_epochs: there is no such option. Did you mean --trainer.max_epochs?",
    ),
    "a word where a number belongs": (
        [*BASE, "--model.width", "four"],
        "--model.width=four: it must be a whole number or null.",
    ),
    "the same of an attack": (
        [*BASE, "--data.attack.rate=much"],
        "--data.attack.rate=much: it must be a number.",
    ),
    "the same of a class below the method": (
        [*BASE, "--model.optimizer.lr", "fast"],
        "--model.optimizer.lr=fast: it must be a number.",
    ),
    "one of a group of the method": (
        ["fit", "-c", "trainer/cpu", *DIGITS, "-c", "purify/cbd", "--model.recipe.lrr", "1"],
        "--model.recipe.lrr: CBD has no such option. Did you mean --model.recipe.lr?",
    ),
    "a value for a group": (
        ["fit", "-c", "trainer/cpu", *DIGITS, "-c", "sift/advrbd", "--model.rounds", "1"],
        "--model.rounds=1: set its options one by one, as --model.rounds.NAME VALUE.",
    ),
    "a word for a group that may be left out": (
        ["fit", "-c", "trainer/cpu", *DIGITS, "-c", "purify/cbd", "--model.probe", "none"],
        "--model.probe=none: it must be null, or set as --model.probe.NAME VALUE.",
    ),
    "no answer": (
        [*BASE, "--test_after_fit", "maybe"],
        "--test_after_fit=maybe: it must be true or false.",
    ),
    "none of the choices": (
        [*BASE, "--model.augmentation", "wek"],
        f"--model.augmentation=wek: it must be {AUGMENTATIONS}.",
    ),
    "an unknown class": (
        [*BASE, "--data.attack", "BadNet"],
        "--data.attack=BadNet: there is no such class. Did you mean BadNets?",
    ),
    "an unknown class of ours": (
        [*BASE, "--model", "bdclean.purification.CBDD"],
        "--model=bdclean.purification.CBDD: there is no such class. Did you mean CBD?",
    ),
    "an unknown callback": (
        [*BASE, "--trainer.callbacks", "NoSuch"],
        "--trainer.callbacks=NoSuch: there is no such class.",
    ),
    "an argument before its class": (
        [*BASE, "--trainer.logger.save_dir", "x"],
        "--trainer.logger.save_dir: name the class first, with --trainer.logger CLASS.",
    ),
    "an argument without a class": (
        ["fit", "-c", "trainer/cpu", "--model.width", "4"],
        "--model.width: name the class first, with --model CLASS or a config of it.",
    ),
    "no method": (
        ["fit", "-c", "trainer/cpu", *DIGITS],
        "--model is missing: give a method with -c (`bdclean config ls`), or a class as --model "
        "CLASS.",
    ),
    "no data": (
        ["fit", "-c", "trainer/cpu", "-c", "train/supervised/fast"],
        "--data is missing: give a data set with -c (`bdclean config ls data`), or a class as "
        "--data CLASS.",
    ),
    "no value": ([*BASE, "--run"], "--run: a value must follow it."),
    "a word too many": ([*BASE, "album"], "album: it is one word too many."),
    "a value out of range": (
        [*BASE, "--model.width", "0"],
        "--model.width=0: it must be at least 1.",
    ),
    "a command": (
        ["predit"],
        "predit is no command. Did you mean predict? The commands are fit, validate, test, "
        "predict, demo, check, purify, sift, weights, attack, figure, methods, config; "
        "`bdclean --help` tells what each does.",
    ),
    "a command of a command": (["attack", "preveiw"], "preveiw: it must be preview or export."),
    "a base class": (
        [*FIT, "--model", "Purifier"],
        "--model=Purifier: it is a base class, so that nothing can be made of it; choose BCU, "
        "CBD or ShortcutDistillation, or a class of your own.",
    ),
    "a base class of Lightning": (
        [*FIT, "--data", "lightning.LightningDataModule"],
        "--data=lightning.LightningDataModule: it is a base class, so that nothing can be made of "
        "it; choose CIFAR10, CIFAR100, Digits, GTSRB, ImageFolder, ImageNet100, Imagenette or "
        "TinyImageNet, or a class of your own.",
    ),
    "a base class that Python could make": (
        [*FIT, "--model", "bdclean.modules.BackdoorModule"],
        "--model=bdclean.modules.BackdoorModule: it is a base class, so that nothing can be made "
        "of it; choose ABL, AdversarialTraining, AdvrBD, BCU, CBD, CleanPart, DBR, "
        "InputAwareTraining, KNN, LinearProbe, SCAn, ShortcutDistillation, SimCLR or Supervised, "
        "or a class of your own.",
    ),
    "a base class over the one of a config": (
        [*FIT, *stack("attack/badnets/cbd"), "--data.attack", "Attack"],
        "--data.attack=Attack: it is a base class, so that nothing can be made of it; choose "
        "AdaptiveBlend, AdaptivePatch, BadNets, Blend, InputAware, LabelConsistent, PhysicalBA, "
        "SIG, TaCT or WaNet, or a class of your own.",
    ),
    "a word of other programs": (
        [*FIT, "--epochs", "3"],
        "--epochs: there is no such option. Did you mean --trainer.max_epochs?",
    ),
    "a flag of sift": (
        ["sift", "set", "--dryrun"],
        "--dryrun: there is no such option. Did you mean --dry_run?",
    ),
    "no folder": (["sift"], "FOLDER is missing."),
    "no command of a command": (["attack"], "SUBCOMMAND is missing: give preview or export."),
    "an option of a command": (
        ["attack", "preview", "-c", "data/digits", "--imags", "3"],
        "--imags: there is no such option. Did you mean --images?",
    ),
    "a number of a command": (
        ["figure", "tsne", "run", "--clean", "-3"],
        "--clean=-3: it must be a whole number above 0.",
    ),
    "an option that is missing": (["attack", "export", "-c", "data/digits"], "--out is missing."),
    "an option with a new name": (["demo", "--out", "x"], "--out: it is called --run now."),
    "a misspelt config": (
        ["fit", "-c", "purify/cdb"],
        "-c purify/cdb: there is no such file and no config of that name. Did you mean "
        "purify/cbd, purify/bcu or purify/cbd/ssl? `bdclean config ls` lists all names.",
    ),
}


CALLBACK = [*BASE, "--trainer.callbacks+", "EarlyStopping", "--trainer.callbacks.monitor", "x"]
HIDDEN = "it holds a character that cannot be shown; name another folder."
PLACE = "name a folder, new or of a run."
COMMANDS = (
    "The commands are fit, validate, test, predict, demo, check, purify, sift, weights, "
    "attack, figure, methods, config; `bdclean --help` tells what each does."
)
WORDS |= {
    "a run below a device": ([*BASE, "--run", "/dev/null/x"], f"--run='/dev/null/x': {PLACE}"),
    "a run that is a device": ([*BASE, "--run", "/dev/null"], f"--run='/dev/null': {PLACE}"),
    "a run with a new line": ([*BASE, "--run", "a\nb"], f"--run=a\\nb: {HIDDEN}"),
    "a run with a null byte": ([*BASE, "-c", 'run: "a\\0"'], f"--run=a\\x00: {HIDDEN}"),
    "a run that is not UTF-8": ([*BASE, "--run", "a\udcff"], f"--run=a\\udcff: {HIDDEN}"),
    "a run of too many folders": (
        [*BASE, "--run", "/".join(["y" * 200] * 25)],
        f"--run={'y' * 20}...: the whole path has more than 3586 bytes; shorten it.",
    ),
    "a sift without a run": (
        ["sift", "set", "--run", ""],
        "FOLDER set is no folder; give one that holds CLASS/IMAGE.jpg.",
    ),
    "a sift of nothing": (["sift", ""], "FOLDER='': name a folder that holds CLASS/IMAGE.jpg."),
    "a sift of no pixels": (
        ["sift", "set", "--size", "0"],
        "--size=0: it must be a whole number above 0.",
    ),
    "two letters of a class": (
        [*BASE, "--model.optimizer", "SDG"],
        "--model.optimizer=SDG: there is no such class. Did you mean SGD?",
    ),
    "a class of torch": (
        [*BASE, "--model.optimizer", "torch.optim.Adamm"],
        "--model.optimizer=torch.optim.Adamm: there is no such class. Did you mean Adam?",
    ),
    "a class of Lightning": (
        [*BASE, "--trainer.callbacks", "[{class_path: EarlyStoping, init_args: {monitor: x}}]"],
        "--trainer.callbacks=EarlyStoping: there is no such class. Did you mean EarlyStopping?",
    ),
    "a class where other values may stand": (
        [*BASE, "--trainer.logger", "CSVLoger"],
        "--trainer.logger=CSVLoger: there is no such class. Did you mean CSVLogger?",
    ),
    "a word there": (
        [*BASE, "--trainer.logger", "nope"],
        "--trainer.logger=nope: it must be a class, a list, true, false or null.",
    ),
    "a number among classes": (
        [*BASE, "--trainer.callbacks", "[EarlyStopping, 3]"],
        "--trainer.callbacks=3: there is no such class.",
    ),
    "an argument of a callback": (
        [*CALLBACK, "--trainer.callbacks.patience", "few"],
        "--trainer.callbacks.patience=few: it must be a whole number.",
    ),
    "a value that a callback refuses": (
        [*CALLBACK, "--trainer.callbacks.mode", "mxa"],
        "--trainer.callbacks.mode=mxa: `mode` can be min, max, got mxa.",
    ),
    "no duration": (
        [*BASE, "--trainer.callbacks+", "Timer", "--trainer.callbacks.duration", "xx"],
        "--trainer.callbacks.duration=xx: `Timer(duration='xx')` is not a valid duration. Expected "
        "a string in the format DD:HH:MM:SS.",
    ),
    "a mode of the checkpoint": (
        [*BASE, "--checkpoint.mode", "x"],
        "--checkpoint.mode=x: `mode` can be min, max but got x.",
    ),
    "a strategy of Lightning": (
        [*BASE, "--trainer.strategy", "DDPStrateg"],
        "--trainer.strategy=DDPStrateg: it must be auto, ddp, ddp_find_unused_parameters_false, "
        "ddp_find_unused_parameters_true, fsdp, fsdp_cpu_offload or single_device. Did you mean "
        "DDPStrategy?",
    ),
    "a precision": (
        [*BASE, "--trainer.precision", "17"],
        "--trainer.precision=17: it must be 64, 32, 16, transformer-engine, "
        "transformer-engine-float16, 16-true, 16-mixed, bf16-true, bf16-mixed, 32-true, 64-true, "
        "bf16 or null.",
    ),
    "more than a class": (
        [*BASE, "--data.attack", "{class_path: BadNets, foo: 1}"],
        "--data.attack: beside its class_path there may be init_args and no more.",
    ),
    "a misspelt class_path": (
        [*BASE, "--data.attack", "{class_pth: BadNets}"],
        "--data.attack.class_pth: BadNets has no such option. Did you mean "
        "--data.attack.class_path?",
    ),
    "an attack without data": (
        ["attack", "export", "-c", "attack/badnets/cbd", "--out", "x"],
        "--data: name the class first, with --data CLASS or a config of it.",
    ),
    "a checkpoint that is a number": (
        [*BASE, "-c", "checkpoint: 3"],
        "--checkpoint=3: set its options one by one, as --checkpoint.NAME VALUE.",
    ),
    "a checkpoint that is null": (
        [*BASE, "-c", "checkpoint: null"],
        "--checkpoint=null: set its options one by one, as --checkpoint.NAME VALUE.",
    ),
    "a long name of a checkpoint": (
        [*BASE, "--checkpoint.filename", "x" * 250],
        f"--checkpoint.filename={'x' * 20}: it must be a short name, in which braces hold metrics.",
    ),
    "an open brace in it": (
        [*BASE, "--checkpoint.filename", "last-{"],
        "--checkpoint.filename=last-{: it must be a short name, in which braces hold metrics.",
    ),
    "weights as a checkpoint": (
        [*BASE, "--ckpt_path", "a.safetensors"],
        "--ckpt_path a.safetensors: it holds weights alone; give it with --model.weights.",
    ),
    "weights as a config": (
        [*BASE, "-c", "a.safetensors"],
        "-c a.safetensors: it is no config; give it with --model.weights.",
    ),
    "a checkpoint as a config": (
        [*BASE, "-c", "last.ckpt"],
        "-c last.ckpt: it is no config; give it with --ckpt_path, or as weights with "
        "--model.weights.",
    ),
    "a config of the network": (
        [*BASE, "-c", "https://x.org/a.yaml"],
        "-c https://x.org/a.yaml: nothing is downloaded; give a file of this machine.",
    ),
    "a config without its option": (
        [*BASE, "a.yaml"],
        "a.yaml: it is one word too many. Did you mean -c a.yaml?",
    ),
    "weights without their option": (
        [*BASE, "a.pth"],
        "a.pth: it is one word too many. Did you mean --model.weights a.pth?",
    ),
    "one dash": ([*BASE, "-run"], "-run: it is one word too many. Did you mean --run?"),
    "a way to print": (
        [*BASE, "--print_config=x"],
        "--print_config=x: it must be comments, skip_default or skip_null.",
    ),
    "a test of nothing": (
        ["test"],
        "test: name a run, as --run RUN, or give data and a method with -c.",
    ),
    "a loud command": (["FIT"], f"FIT is no command. Did you mean fit? {COMMANDS}"),
    "an option of bdclean": (["-v"], f"-v is no command. Did you mean --version? {COMMANDS}"),
    "an option first": (
        ["-c", "data/digits", "fit"],
        f"-c is no command. Give one before the options. {COMMANDS}",
    ),
    "an empty command": ([""], f"'' is no command. {COMMANDS}"),
    "another command for it": (
        ["config", "show"],
        "show: it must be ls, cat or cp. Did you mean cat?",
    ),
    "a method to list": (
        ["methods", "cbd"],
        "methods: 'cbd' is not expected; the command takes no arguments. `bdclean fit --model.help "
        "CBD` shows the options of CBD.",
    ),
    "a kind of config": (
        ["config", "ls", "xyz"],
        "KIND xyz: there are no such configs. Kinds are arch, attack, bound, data, measure, "
        "purify, sift, train, trainer.",
    ),
    "a run without a config": (
        ["figure", "tsne", "."],
        ".: there is no config.yaml; give folders that bdclean fit wrote.",
    ),
    "a picture below a file": (
        ["figure", "tsne", "run", "--out", f"{__file__}/x.png"],
        f"--out={__file__}/x.png: {__file__} cannot be written into; name another place.",
    ),
}


@pytest.mark.parametrize("case", WORDS, ids=list(WORDS))
def test_a_wrong_word_is_told_in_one_sentence(case, capsys):
    words, message = WORDS[case]
    assert refused(words, capsys) == f"bdclean: {message}"


FILES = {
    "a misspelt key": (
        "model:\n  init_args:\n    widht: 4\n",
        "--model.widht: Supervised has no such option. Did you mean --model.width?",
    ),
    "a misspelt key of the Trainer": (
        "trainer:\n  max_epoch: 4\n",
        "--trainer.max_epoch: there is no such option. Did you mean --trainer.max_epochs?",
    ),
    "no YAML": ("model:\n  - : {", "-c mine.yaml: it is no YAML (line 2: "),
    "no keys": (
        "just text\n",
        "-c mine.yaml: it must hold keys and values, as `run: runs/mine`.",
    ),
}


@pytest.mark.parametrize("case", FILES, ids=list(FILES))
def test_a_wrong_config_is_told_in_one_sentence(case, capsys):
    text, message = FILES[case]
    Path("mine.yaml").write_text(text)
    assert refused([*BASE, "-c", "mine.yaml"], capsys).startswith(f"bdclean: {message}")


def test_dashes_are_underscores_in_every_command(capsys):
    words = ["--test-after-fit", "maybe"]
    assert "--test_after_fit=maybe" in refused([*BASE, *words], capsys)
    assert "--dry_run" in refused(["sift", "photos", "--dry-run", "--copy-clean", "x"], capsys)
    assert "--pgd_steps=x" in refused(["figure", "tsne", "run", "--pgd-steps", "x"], capsys)


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "must hold keys and values"), ("# only\n", "must hold keys and values")],
)
def test_a_config_without_keys_is_named(content, message, capsys):
    Path("odd.yaml").write_text(content)
    assert f"-c odd.yaml: it {message}" in refused(["fit", "-c", "odd.yaml"], capsys)


def test_a_name_that_no_file_can_have_is_one_message(capsys):
    assert "there is no such file" in refused(["fit", "-c", "a" * 300], capsys)
    assert "it cannot be written" in refused(["config", "cp", "purify/cbd", "a" * 300], capsys)


LIMITS = {
    "trainer.limit_train_batches": ("0", "0.0", "-1", ".nan", "1.5"),
    "trainer.max_epochs": ("0", "-2"),
    "trainer.max_steps": ("0", "-2"),
    "trainer.accumulate_grad_batches": ("0", "-1"),
    "trainer.check_val_every_n_epoch": ("0",),
    "trainer.val_check_interval": ("0",),
    "trainer.gradient_clip_val": (".nan", "-1"),
    "trainer.limit_test_batches": ("0", "-1"),
    "trainer.devices": ("0", "x"),
    "trainer.max_time": ("x", "-1"),
    "trainer.fast_dev_run": ("-1",),
    "seed_everything": ("-1", "99999999999999", "[1]", ".nan"),
    "model.optimizer.lr": (".nan", ".inf"),
    "model.optimizer": ("null", "[1]", "3", "word"),
    "model.gamma": (".nan", "-1"),
    "model.width": ("9" * 30, "9" * 12),
    "model.batch_size": ("9" * 30, ".nan"),
    "data.shuffle_seed": ("-1", "9" * 30),
    "data.attack.rate": (".nan", "0"),
}


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, values in LIMITS.items() for value in values]
)
def test_a_limit_or_number_that_cannot_be_is_named(key, value, training, capsys):
    before = sorted(Path().rglob("*"))
    said = refused([*BASE, "--trainer.max_epochs", "1", "--run", "run", f"--{key}={value}"], capsys)
    assert said.startswith(f"bdclean: --{key}=")
    assert not training
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize("command", ["test", "validate", "predict"])
def test_a_command_that_would_do_nothing_is_refused(command, capsys):
    save_model(build(ModelInfo("resnet18", 10, 32, (0.1,) * 3, (0.2,) * 3, 4)), "net.safetensors")
    key = {"test": "test", "validate": "val", "predict": "predict"}[command]
    words = [command, *BASE[1:], "--model.weights", "net.safetensors", "--data.splits.val", "40"]
    words += ["--run", "run"]
    said = refused([*words, f"--trainer.limit_{key}_batches", "0"], capsys)
    assert said.startswith(f"bdclean: --trainer.limit_{key}_batches=0: it must be above 0")


WEIGHTS = {
    "nofile.pth": "--model.weights nofile.pth: there is no such weights file.",
    ".": "--model.weights . is a folder; give the weights file in it.",
    "": "--model.weights='': give the path of a weights file.",
    "https://x.org/a.pth": "--model.weights https://x.org/a.pth: nothing is downloaded; ",
    "plain.pth": "--model.weights plain.pth does not say which architecture it is for; name it ",
    "described.ckpt": "--model.weights described.ckpt: its metadata describes no model (",
    "notes.txt": "--model.weights notes.txt: weights files end in ",
}


@pytest.mark.parametrize("method", ["purify/cbd", "train/supervised/fast", "measure/knn"])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_wrong_weights_file_is_told_with_its_key(weights, method, capsys):
    torch.save({"a": torch.zeros(2)}, "plain.pth")
    described = {"state_dict": {"model.a": torch.zeros(2)}}
    torch.save(
        described | {"bdclean": {"networks": {"model": {"bdclean_format": "2"}}}}, "described.ckpt"
    )
    Path("notes.txt").write_text("notes")
    if (weights, method) == ("plain.pth", "train/supervised/fast"):
        pytest.skip("a training takes resnet18 where nothing is said")
    if (weights, method) == ("described.ckpt", "measure/knn"):
        pytest.skip("as of any other method")
    words = ["fit", *stack("trainer/cpu", "data/digits", method), "--run", "run"]
    if method == "measure/knn":
        words[0] = "test"
    said = refused([*words, "--model.weights", weights], capsys)
    assert said.startswith(f"bdclean: {WEIGHTS[weights]}")


def test_a_method_without_its_config_is_told_what_to_add(capsys):
    words = ["fit", *stack("trainer/cpu", "data/digits"), "--model", "AdvrBD", "--run", "run"]
    said = refused([*words, "--model.width", "4"], capsys)
    assert said.startswith("bdclean: --trainer.reload_dataloaders_every_n_epochs=0: AdvrBD ")
    assert "set it to 1, with --trainer.reload_dataloaders_every_n_epochs 1" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model.recipe.momentum", "1.5"], "--model.recipe.momentum=1.5: it must be below 1."),
        (["--model.recipe.milestones", "[2, -1]"], "they are fractions of the epochs"),
        (["--run", ""], "--run='.': name a folder"),
        (["--run", "file/below"], "--run='file/below': name a folder"),
    ],
)
def test_impossible_settings_are_named(words, message, capsys):
    Path("file").write_text("")
    stacked = ["fit", *stack("trainer/cpu", "data/digits", "purify/cbd")]
    place = [] if "--run" in words else ["--run", "run"]
    assert message in refused([*stacked, *place, *words], capsys)
