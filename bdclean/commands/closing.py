"""What a command says at its end: what was written, what was measured, and what comes next.

`predict` and `figure` end a chain: they say what they wrote, and name no next command.
"""

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bdclean.backbones.loading_lines import load_call
from bdclean.commands.words import as_typed
from bdclean.files import safetensors_metadata
from bdclean.runs import RunFolder, leaves
from bdclean.shipped import names

_PRODUCTS = (
    "model.safetensors",
    "result.json",
    "suspects.csv",
    "suspects.png",
)
"""What a fit writes; `test.json` is of a test before it."""
_KNOWN = ("acc", "asr", "asr_floor", "pa")
_CBD, _BCU, _PROBE = "purify/cbd", "purify/bcu", "measure/linear_probe"
"""Configs that the next command names."""
_CBD_BATCH = 128  # images in a batch of CBD
_VICTIMS = ("supervised", "input_aware")
"""Methods that learn the backdoor of their data."""
_LOW = 50.0  # percent; more than half of the triggered images resist the trigger
_STRENGTHS = ("patch_size", "alpha", "delta", "strength", "amplitude")
"""Settings of attacks that make a trigger easier to learn."""
_LIMITS = {"max_steps": "-1", "max_time": "null"}
"""Settings of the trainer that stop a method in its midst, and the values that do not."""
TRIAL = (
    "This was a development run (--trainer.fast_dev_run): it tried a few batches. Its "
    "numbers mean nothing, and nothing was written."
)


def written(folder: Path, names: Sequence[str] = _PRODUCTS) -> str:
    """The line of files, those that are there."""
    return f"Written to {_shown(folder)}: {_files(folder, names)}"


def _held(folder: Path) -> str:
    """The line of a run that has ended before."""
    return (
        f"Nothing was written, since {_shown(folder)} holds this run, which has ended: "
        f"{_files(folder, _PRODUCTS)}. A longer one is a new run, with another folder for --run."
    )


def _files(folder: Path, names: Sequence[str]) -> str:
    return ", ".join(name for name in names if (folder / name).is_file())


def _shown(folder: Path) -> Path:
    here = Path.cwd()
    return folder.relative_to(here) if folder.is_relative_to(here) else folder


def measured(metrics: Mapping[str, Any], attack: str | None, images: str = "test") -> str:
    """What an evaluation measured, and what it did not and why; a line each.

    Args:
        metrics: Of a record: percentages, and the counts `n_LOADER`.
        attack: The name of the attack; None where there is none.
        images: What was read.
    """
    lines = []
    if "acc" in metrics:
        lines.append(f"  ACC {_percent(metrics['acc'])} of {_count(metrics, 'clean')}, clean")
    if "asr" in metrics:
        by = f"with the trigger of {attack}" if attack else "with the trigger"
        asr = f"  ASR {_percent(metrics['asr'])} of {_count(metrics, 'triggered')} {by}"
        floor = metrics.get("asr_floor")
        lines.append(asr if floor is None else f"{asr}; {_percent(floor)} without it")
        lines.append(f"  PA  {_percent(metrics['pa'])} of the same")
    for name, value in metrics.items():
        if f"n_{name}" in metrics:
            lines.append(f"  {name} {_percent(value)} of {_count(metrics, name)}")
        elif name not in _KNOWN and not name.startswith("n_"):
            lines.append(f"  {name} {value:.4g}")
    if lines:
        lines.insert(0, f"Measured on {images} images:")
    if "asr" not in metrics:
        why = "the data has no attack" if attack is None else "no image counts for this attack"
        lines.append(f"Not measured: ASR and PA, because {why}.")
    return "\n".join(lines)


def after_fit(
    record: Mapping[str, Any],
    folder: Path,
    going_on: Sequence[str],
    untested: str | None = None,
    *,
    tests: bool = True,
    stays: bool = False,
) -> list[str]:
    """What a fit says at its end, in lines.

    Args:
        record: Of the fit.
        folder: Of the run.
        going_on: The words of a fit that goes on with one that a limit stopped.
        untested: Why nothing was measured; None if it was.
        tests: Whether the data has test images.
        stays: Whether the run had ended before, so that nothing was written.
    """
    lines = [_held(folder) if stays else written(folder)]
    if stays and record["metrics"]:
        untested = None
    lines.append(untested or _measured_in(record))
    lines += _seen_without_labels(record["protocol"])
    if not_planted := _not_planted(record):
        lines.append(not_planted)
    pictures = folder / "suspects.png"
    if "identification" in record and pictures.is_file():
        lines.append(f"Look at {pictures}: the training samples with the highest scores.")
    after = next_command(record, folder, going_on, tests=tests)
    return lines if after is None else [*lines, f"Next: {after}"]


def after_test(record: Mapping[str, Any], folder: Path, words: Sequence[str]) -> list[str]:
    """What a test says at its end, in lines.

    Args:
        record: Of the test.
        folder: Of the run.
        words: Of the test.
    """
    after = f"Next: {command('predict', as_typed(words))}"
    return [written(folder, ["test.json"]), _measured_in(record), after]


def _seen_without_labels(protocol: Mapping[str, Any]) -> list[str]:
    """What a method has measured on unlabelled images that it did not train on."""
    if "feature_cosine" in protocol:
        cosine = protocol["feature_cosine"]
        return [
            f"Without labels, on images held out: features have a cosine of {cosine:.3f} with "
            "those of the suspect."
        ]
    if "agreement" not in protocol:
        return []
    same = _percent(100 * protocol["agreement"])
    lines = [f"Without labels, on images held out: {same} of the answers are those of the suspect."]
    for name, seen in protocol["concentration"].items():
        before, after = (
            f"{100 * each['flipped']:.0f} % of the answers change, {100 * each['share']:.0f} % of "
            f"these to class {each['favourite']}"
            for each in (seen["before"], seen["after"])
        )
        lines.append(f"  under {name} perturbations, before: {before}; now: {after}")
    return lines


def _measured_in(record: Mapping[str, Any]) -> str:
    attack = record["data"].get("attack")
    return measured(record["metrics"], None if attack is None else str(attack["attack"]))


def _not_planted(record: Mapping[str, Any]) -> str | None:
    """What to try where a victim has not learned the backdoor."""
    asr, attack = record["metrics"].get("asr"), record["data"].get("attack")
    if record["protocol"].get("method") not in _VICTIMS or asr is None or asr >= _LOW:
        return None
    keys = [f"a larger --data.attack.{key}" for key in ("rate", *_STRENGTHS) if key in attack]
    ways = [*keys, "another trigger", "more epochs"] if len(keys) < 2 else [*keys, "more epochs"]
    return (
        f"The backdoor was hardly learned (ASR below {_LOW:.0f} %): try "
        f"{', '.join(ways[:-1])} or {ways[-1]}."
    )


def next_command(
    record: Mapping[str, Any], folder: Path, going_on: Sequence[str], *, tests: bool = True
) -> str | None:
    """The command that usually comes after a fit, as it works; None where the run left no model.

    Args:
        record: Of the fit.
        folder: Of the run.
        going_on: The words of a fit that goes on with one that a limit stopped.
        tests: Whether the data has test images.
    """
    protocol, data, run = record["protocol"], record["data"], RunFolder(folder)
    sizes = data.get("sizes", {})
    if protocol.get("finished") is False:  # cut short
        return command("fit", going_on)
    if protocol.get("retrained") is False:  # asked for scores and no more
        return None
    if tests and protocol.get("head") == "none" and sizes.get("probe"):
        return _stacked(run, _PROBE, "probe")
    if tests and data.get("attack") and protocol:  # a module of another package has no protocol
        method = _purification(data)
        if protocol.get("method") in _VICTIMS and method is not None:
            return _stacked(run, method, method.split("/")[1])
        return command("figure", ["tsne", str(folder), "--out", str(folder / "tsne.png")])
    if tests and run.last_checkpoint.is_file():
        return command("predict", ["--run", str(folder)])
    # Data without test images, such as photos without labels: what is left is to use the model.
    if not run.weights.is_file():
        return None
    photos = _photos(run) if protocol.get("head") == "original" else None
    return load(run.weights) if photos is None else command("check", [str(run.weights), photos])


def _photos(run: RunFolder) -> str | None:
    """The folder of unlabelled images that a run read, if it did."""
    config = run.read_config() if run.config.is_file() else {}
    folder = next((v for k, v in leaves(config) if k == "data.defense_root"), None)
    return folder if isinstance(folder, str) else None


def load(weights: Path) -> str:
    """A command that loads a model of ours."""
    told = safetensors_metadata(weights) if weights.is_file() else {}
    arch = json.loads(told.get("arch", '""'))
    call = load_call(weights, arch, quoted=json.dumps)
    code = f"from bdclean.backbones import load_model; print({call})"
    return f"python -c {shlex.quote(code)}"


def _purification(data: Mapping[str, Any]) -> str | None:
    """A purification for which the data holds enough images, with values for them if we have."""
    sizes = data.get("sizes", {})
    if sizes.get("defense", 0) >= _CBD_BATCH and sizes.get("probe"):
        own = f"{_CBD}/{data.get('name')}"
        return own if own in names(_CBD) else _CBD
    return _BCU if sizes.get("defense") else None


def command(name: str, words: Sequence[str]) -> str:
    """A command as a user types it."""
    return shlex.join(["bdclean", name, *words])


def going_on(words: Sequence[str]) -> list[str]:
    """The words of a fit, with `--ckpt_path last` in place of another checkpoint."""
    return [*_without(words, "--ckpt_path"), "--ckpt_path", "last"]


def unlimited(words: Sequence[str], trainer: Mapping[str, Any]) -> list[str]:
    """The words of a fit that goes on, without what stopped it.

    Args:
        words: Of a fit that was stopped before the end of its method.
        trainer: Its settings.
    """
    limits = [key for key in _LIMITS if trainer.get(key) not in (None, -1)]
    # Without a limit of the trainer it was a callback, such as early stopping.
    lifted = {key: _LIMITS[key] for key in limits} or {"callbacks": "null"}
    more = [word for key, value in lifted.items() for word in (f"--trainer.{key}", value)]
    return going_on([*_without(words, *(f"--trainer.{key}" for key in lifted)), *more])


def _without(words: Sequence[str], *options: str) -> list[str]:
    """The words but for some options with their values."""
    kept: list[str] = []
    rest = iter(words)
    for word in rest:
        name, equals, _ = word.partition("=")
        if f"--{name[2:].replace('-', '_')}" not in options:
            kept.append(word)
        elif not equals:
            next(rest, None)
    return kept


def _stacked(run: RunFolder, method: str, suffix: str) -> str:
    """A method on the product of a run, on its data; the new run lies beside it."""
    stack = ["-c", str(run.config), "-c", method, "--model.weights", str(run.weights)]
    return command("fit", [*stack, "--run", f"{run.path}-{suffix}"])


def _percent(value: float) -> str:
    return f"{value:.2f} %"


def _count(metrics: Mapping[str, Any], loader: str) -> str:
    return f"{metrics[f'n_{loader}']:,}"
