"""What a command says at its end: what was written, what was measured, and what comes next."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_PRODUCTS = (
    "model.safetensors",
    "result.json",
    "test.json",
    "suspects.csv",
    "suspects.png",
)
_KNOWN = ("acc", "asr", "pa")
_PURIFY, _PROBE = "purify/cbd", "measure/linear_probe"
"""Configs that the next command names."""


def written(folder: Path, names: Sequence[str] = _PRODUCTS) -> str:
    """The line of files, those that are there."""
    files = [name for name in names if (folder / name).is_file()]
    here = Path.cwd()
    shown = folder.relative_to(here) if folder.is_relative_to(here) else folder
    return f"Written to {shown}: {', '.join(files)}"


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
        lines.append(f"  ASR {_percent(metrics['asr'])} of {_count(metrics, 'triggered')} {by}")
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


def next_command(record: Mapping[str, Any], folder: Path, words: Sequence[str]) -> str:
    """The command that usually comes after a fit.

    Args:
        record: Of the fit.
        folder: Of the run.
        words: Of the fit, with `--ckpt_path last`, to go on with one that a limit stopped.
    """
    protocol, config = record["protocol"], folder / "config.yaml"
    weights = ["--model.weights", str(folder / "model.safetensors")]
    if protocol.get("purified") is False:
        return command("fit", words) + "  (without what stopped it)"
    if not protocol:  # of a module of another package, which leaves no weights file
        return command("predict", ["-c", str(config), "--ckpt_path", "last"])
    if "identification" in record:
        return f"look at {folder / 'suspects.png'}"
    if protocol.get("head") == "none":
        return _stacked(config, _PROBE, weights, f"{folder}-probe")
    if not record["data"].get("attack"):
        last = folder / "checkpoints" / "last.ckpt"
        return command("predict", ["-c", str(config), "--ckpt_path", str(last)])
    if "purified" in protocol or protocol.get("head") == "probe":
        return command("figure", ["tsne", str(folder), "--out", str(folder / "tsne.png")])
    return _stacked(config, _PURIFY, weights, f"{folder}-cbd")


def command(name: str, words: Sequence[str]) -> str:
    """A command as a user types it."""
    return shlex.join(["bdclean", name, *words])


def going_on(words: Sequence[str]) -> list[str]:
    """The words of a fit, with `--ckpt_path last` in place of another checkpoint."""
    kept: list[str] = []
    rest = iter(words)
    for word in rest:
        name, equals, _ = word.partition("=")
        if name.replace("-", "_") != "__ckpt_path":
            kept.append(word)
        elif not equals:
            next(rest, None)
    return [*kept, "--ckpt_path", "last"]


def _stacked(config: Path, method: str, words: Sequence[str], run: str) -> str:
    return command("fit", ["-c", str(config), "-c", method, *words, "--run", run])


def _percent(value: float) -> str:
    return f"{value:.2f} %"


def _count(metrics: Mapping[str, Any], loader: str) -> str:
    return f"{metrics[f'n_{loader}']:,}"
