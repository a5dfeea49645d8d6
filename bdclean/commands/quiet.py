"""Keeps back what Lightning says about settings that are meant as they are."""

import logging
import warnings

from bdclean import stopping
from bdclean.printable import printable

WARNINGS = (
    "Experiment logs directory",  # holds config.yaml before the logger looks at it
    "LightningCLI's args parameter",  # the words are those of the process
    "Total length of `list` across ranks is zero",  # stages without validation
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning 2.6 on torch 2.12
    r"The '.*_dataloader' does not have many workers",  # images in memory need none
    r"The number of training batches \(\d+\) is smaller than the logging interval",
    "`max_epochs` was not set",  # methods know their own length
    r"Checkpoint directory .* exists and is not empty",  # a run that goes on
    r"Image size \(\d+ pixels\) exceeds limit",  # ours is another
    "The dirpath has changed from",  # a run folder that was moved or copied goes on
    r"Found \d+ module\(s\) in eval mode",  # a teacher and a probed backbone are on purpose
)
_INFOS = (
    "Seed set to",  # the record holds it
    "GPU available",
    "TPU available",
    "HPU available",
    "Using bfloat16 Automatic Mixed Precision",
    "💡 Tip",  # advertisements
    "Loading `train_dataloader` to estimate number of stepping batches",
    "`Trainer.fit` stopped: `max_epochs=",  # its regular end
    "`Trainer(limit_",  # the user has set it
    "Restoring states from the checkpoint path",  # the command says where a run goes on
    "Restored all states from the checkpoint",
    "Loaded model weights from the checkpoint",
    "\nDetected KeyboardInterrupt",  # the command says how to go on
)
_LOGGERS = (
    "lightning.pytorch.utilities.rank_zero",
    "pytorch_lightning.utilities.rank_zero",  # takes its place where another package imports it
    "lightning.fabric.utilities.rank_zero",
    "lightning.fabric.utilities.seed",
)


def quieten() -> None:
    """Ignores the warnings, and filters the messages, from here on; safe to call again."""
    for text in WARNINGS:
        warnings.filterwarnings("ignore", message=text)
    for name in _LOGGERS:
        logging.getLogger(name).addFilter(_is_news)


def in_one_line(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    line: str | None = None,
) -> str:
    """A warning in the style of our messages: no path, no line of code; `formatwarning`'s words.

    Of several processes, which all warn, the first one is heard.
    """
    if not stopping.is_first():
        return ""
    return f"bdclean: warning: {printable(message)}\n"


def _is_news(record: logging.LogRecord) -> bool:
    text = record.getMessage()
    # Under several processes a message begins with its rank.
    return not text.partition("] ")[2].startswith(_INFOS) and not text.startswith(_INFOS)
