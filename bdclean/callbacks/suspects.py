"""What a defence found in a training set, as files for a person to look at."""

import csv
import os
from io import BytesIO, StringIO
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from matplotlib.figure import Figure
from torch import Tensor

from bdclean.callbacks.run_record import is_trial
from bdclean.callbacks.suspect_figures import draw_courses, draw_scores, draw_sheet
from bdclean.errors import BdcleanError
from bdclean.metrics.identification import false_positive_rate, true_positive_rate
from bdclean.modules import BackdoorModule
from bdclean.types import Findings, KnowsTruth, TrainingSet

COLUMNS = ("index", "file", "label", "score", "flagged", "proposed")
NAMES = ("label_name", "proposed_name")
NUM_PICTURES = 100
_EVALUATED = ("val/acc", "val/asr")
_Courses = dict[str, dict[int, float]]


class Suspects(Callback):
    """Writes `suspects.csv`, `suspects.png`, `scores.png` and `rounds.png` at the end of a fit.

    Also where the method gives up after its findings, because all samples are flagged.

    It does nothing if the module has no findings, or the data module is no
    `bdclean.types.KnowsTruth`. Only the first process writes. The truth, where it is known,
    shows in `scores.png` and `rounds.png` alone.

    Args:
        folder: The run folder; None takes the logger's.
    """

    def __init__(self, folder: str | None = None) -> None:
        self.folder = folder
        self._begun = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Until the training goes on, a restored module's findings may be of other samples."""
        self._begun = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here on the findings are about the samples at hand."""
        self._begun = True

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the files; each is whole or absent."""
        folder = self.folder or trainer.log_dir  # all processes ask: Lightning broadcasts it
        findings = pl_module.findings() if isinstance(pl_module, BackdoorModule) else None
        data = getattr(trainer, "datamodule", None)
        if findings is None or folder is None or not isinstance(data, KnowsTruth):
            return
        if not trainer.is_global_zero or is_trial(trainer):
            return
        _write_files(Path(folder), _on_cpu(findings), data)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Writes the files if the method has found what it cannot go on with."""
        if self._begun and isinstance(exception, BdcleanError) and trainer.world_size == 1:
            self.on_fit_end(trainer, pl_module)


def ranking(score: Tensor) -> Tensor:
    """The rows (N,), most suspicious first; ties in the order of the rows, NaN at the end.

    Args:
        score: (N,); higher is more suspicious.
    """
    lowest = torch.where(score.isnan(), -torch.inf, score)
    return lowest.argsort(descending=True, stable=True)


def table(findings: Findings, data: TrainingSet) -> str:
    """`suspects.csv`: a line per sample, in the order of `ranking`.

    The columns are `COLUMNS` and, where the classes have names, `NAMES`.
    """
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS + NAMES if data.classes else COLUMNS)
    labels, proposed = data.labels.tolist(), findings.proposed.tolist()
    score, flagged = findings.score.tolist(), findings.flagged
    for row in ranking(findings.score).tolist():
        file = data.files[row] if data.files else ""
        other = proposed[row] if proposed[row] >= 0 else ""
        # Nine digits tell any two numbers of 32 bits apart.
        judged = "" if flagged is None else int(flagged[row])
        cells = [row, file, labels[row], f"{score[row]:.9g}", judged, other]
        if data.classes:
            named = data.classes[proposed[row]] if proposed[row] >= 0 else ""
            cells += [data.classes[labels[row]], named]
        writer.writerow(cells)
    return text.getvalue()


def evaluations(folder: Path) -> _Courses:
    """`val/acc` and `val/asr` by epoch, as far as the run has logged them to CSV files.

    A start of the run moves the metrics of earlier ones aside; where epochs overlap, the last
    start counts.

    Args:
        folder: The run folder.
    """
    aside = [path for path in folder.glob("metrics.*.csv") if path.stem[8:].isdigit()]
    files = sorted(aside, key=lambda path: int(path.stem[8:]))
    last = folder / "metrics.csv"
    courses: _Courses = {}
    for path in [*files, last] if last.is_file() else files:
        with path.open(encoding="utf-8", newline="") as lines:
            for line in csv.DictReader(lines):
                for key in _EVALUATED:
                    if line.get(key):
                        courses.setdefault(key, {})[int(line["epoch"])] = float(line[key])
    return courses


def _write_files(folder: Path, findings: Findings, data: KnowsTruth) -> None:
    known = data.training_set()
    folder.mkdir(parents=True, exist_ok=True)
    # File names need not be UTF-8; they are written as they are.
    _write(folder / "suspects.csv", table(findings, known).encode("utf-8", "surrogateescape"))

    shown = ranking(findings.score)[:NUM_PICTURES]
    captions = [_caption(known, findings, row) for row in shown.tolist()]
    heading = f"The {len(shown)} most suspicious of {len(known.labels):,} samples"
    red = torch.zeros(len(shown)) if findings.flagged is None else findings.flagged[shown]
    sheet = draw_sheet(data.training_images(shown), captions, red.bool(), heading)
    _write_figure(folder / "suspects.png", sheet)

    scores = {"score": findings.score, **findings.further}
    _write_figure(folder / "scores.png", draw_scores(scores, _groups(findings, known)))

    evaluated = evaluations(folder)
    courses = {"round": _rounds(findings, known, evaluated), "epoch": evaluated}
    courses = {unit: lines for unit, lines in courses.items() if lines}
    if courses:
        _write_figure(folder / "rounds.png", draw_courses(courses))


def _caption(known: TrainingSet, findings: Findings, row: int) -> str:
    label, proposed = int(known.labels[row]), int(findings.proposed[row])
    return f"{label} → {proposed}" if proposed >= 0 else f"{label}"


def _groups(findings: Findings, known: TrainingSet) -> dict[str, Tensor]:
    """Masks (N,) of the samples by truth or, where it is not known, by what is flagged."""
    flagged = findings.flagged
    if known.poisoned is None:
        if flagged is None:
            return {"all": torch.ones(len(known.labels), dtype=torch.bool)}
        return {"not flagged": ~flagged, "flagged": flagged}
    none = torch.zeros_like(known.poisoned)
    covers = none if known.covers is None else known.covers
    groups = {"clean": ~(known.poisoned | covers), "cover": covers, "poisoned": known.poisoned}
    return {name: mask for name, mask in groups.items() if mask.any()}


def _rounds(findings: Findings, known: TrainingSet, evaluated: _Courses) -> _Courses:
    rounds = dict(enumerate(findings.rounds))
    if not rounds:
        return {}
    courses = {"flagged": {k: 100 * float(mask.float().mean()) for k, mask in rounds.items()}}
    truth = known.poisoned
    if truth is not None:
        courses["TPR"] = {k: true_positive_rate(mask, truth) for k, mask in rounds.items()}
        courses["FPR"] = {k: false_positive_rate(mask, truth) for k, mask in rounds.items()}
    for name, by_epoch in evaluated.items():
        epochs = enumerate(findings.round_epochs.tolist())
        course = {k: by_epoch[epoch] for k, epoch in epochs if epoch in by_epoch}
        if course:
            courses[name] = course
    return courses


def _on_cpu(findings: Findings) -> Findings:
    return Findings(
        score=findings.score.cpu(),
        flagged=None if findings.flagged is None else findings.flagged.cpu(),
        proposed=findings.proposed.cpu(),
        further={name: score.cpu() for name, score in findings.further.items()},
        rounds=findings.rounds.cpu(),
        round_epochs=findings.round_epochs.cpu(),
    )


def _write_figure(path: Path, figure: Figure) -> None:
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    _write(path, buffer.getvalue())


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(content)
    temporary.replace(path)
