"""What a purification is given, and what it gives."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from bdclean.backbones import SplitModel
from bdclean.checking import TESTS, Verdict
from bdclean.commands.canary import Canary
from bdclean.commands.scoring import Measured


@dataclass(frozen=True)
class Job:
    """What is to be purified, and how; most fields are options of the command.

    Attributes:
        model: The weights file; of a network in memory, what it is called.
        folder: The images; of images in memory, what they are called.
        method: By its name.
        run: The run folder.
        out: Where the weights go in the layout of the file; None decides by itself.
        arch: Architecture of a foreign file.
        width: Channels of its first layer.
        input_size: Side of its images.
        labels: A folder of labelled images, which only measure.
        trigger: A trigger file, which only measures.
        target: Its class.
        images: How many images the tests use, at most; None takes the usual number.
        tests: That run before and after.
        canary: Whether to plant triggers of ours in a copy and to purify that too.
        words: Further words of `bdclean fit`.
        again: The command that goes on with a fit that was stopped.
        known: More that a foreign file may not say of itself; see `load_model`.
        network: A network in memory that takes the place of the file.
        suspect: Its parts.
        pixels: Images in memory that take the place of the folder's, (N, 3, S, S), uint8.
    """

    model: str
    folder: str
    method: str = "auto"
    run: str = "runs/purified"
    out: str | None = None
    arch: str | None = None
    width: int | None = None
    input_size: int | None = None
    labels: str | None = None
    trigger: str | None = None
    target: int | None = None
    images: int | None = None
    tests: tuple[str, ...] = TESTS
    canary: bool = False
    words: tuple[str, ...] = ()
    again: str = ""
    known: Mapping[str, Any] = field(default_factory=dict)
    network: nn.Module | None = None
    suspect: SplitModel | None = None
    pixels: Tensor | None = None


@dataclass(frozen=True)
class PurifyResult:
    """What a purification gave.

    Attributes:
        model: The cleaned model, in evaluation mode. Of a file it maps images (B, 3, H, W) in
            [0, 1] to logits (B, K), and to nothing without a head (`model.features` remain); of a
            network in memory it is a network of the same class, in the mode of that one.
        before: What each test of `bdclean check` said of the suspect.
        after: The same of the cleaned model.
        agreement: Share of images that both name alike: of held-out ones, or of those that were
            trained on if the method holds out none; None without a head.
        record: Of the run, as in its `result.json`.
        run: The run folder; None where it is gone.
        weights: The file of bdclean; None where it is gone.
        out: The file in the layout of the one that came in; None without one.
        notes: What of that file is not as it was.
        code: Lines that load the file.
        measured: What labelled images tell of both models; None without any.
        canaries: What became of triggers of ours in a copy of the suspect.
    """

    model: nn.Module
    before: tuple[Verdict, ...]
    after: tuple[Verdict, ...]
    agreement: float | None
    record: Mapping[str, Any]
    run: Path | None
    weights: Path | None
    out: Path | None
    notes: tuple[str, ...] = ()
    code: str = ""
    measured: Measured | None = None
    canaries: tuple[Canary, ...] = ()
