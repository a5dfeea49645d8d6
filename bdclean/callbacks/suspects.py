"""What a defence found in a training set, as files for a person to look at."""

from collections.abc import Sequence

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from bdclean.callbacks.writing import run_to_write
from bdclean.errors import BdcleanError
from bdclean.figures.png import save_png
from bdclean.figures.suspects import draw_courses, draw_scores, draw_sheet
from bdclean.files import write_text
from bdclean.functional.tiers import LIKELY, TIERS, tiers_of
from bdclean.metrics.identification import false_positive_rate, true_positive_rate
from bdclean.modules import BackdoorModule
from bdclean.modules.reading import data_of
from bdclean.runs import RunFolder
from bdclean.tabular import Number, csv_text, read_csv
from bdclean.types import Findings, KnowsTruth, TrainingSet

COLUMNS = ("index", "file", "label", "score", "flagged", "proposed", "tier")
NAMES = ("label_name", "proposed_name")
NUM_PICTURES = 100
_LAST = "scores.png"
"""The file that is written last: where it is, all are."""
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
        """Writes the files; each is whole or absent. Those of a run that has ended stay."""
        run = run_to_write(trainer, self.folder)
        if run is not None and not self._begun and (run.path / _LAST).is_file():
            return
        findings = pl_module.findings() if isinstance(pl_module, BackdoorModule) else None
        data = data_of(trainer)
        if run is not None and findings is not None and isinstance(data, KnowsTruth):
            _write_files(run, _on_cpu(findings), data)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Writes the files if the method has found what it cannot go on with."""
        if self._begun and isinstance(exception, BdcleanError) and trainer.world_size == 1:
            self.on_fit_end(trainer, pl_module)


def ranking(score: Tensor, tiers: Tensor | None = None) -> Tensor:
    """The rows (N,), most suspicious first; ties in the order of the rows, NaN at the end.

    Args:
        score: (N,); higher is more suspicious.
        tiers: (N,); the likely ones come before all others. None: by the score alone.
    """
    lowest = torch.where(score.isnan(), -torch.inf, score)
    order = lowest.argsort(descending=True, stable=True)
    if tiers is None:
        return order
    return order[(tiers[order] == LIKELY).int().argsort(descending=True, stable=True)]


def table(findings: Findings, data: TrainingSet) -> str:
    """`suspects.csv`: a line per sample, in the order of `ranking`.

    The columns are `COLUMNS` and, where the classes have names, `NAMES`. Names of files and classes
    are written as `bdclean.printable.cell` says.
    """
    lines: list[Sequence[object]] = [COLUMNS + NAMES if data.classes else COLUMNS]
    labels, proposed = data.labels.tolist(), findings.proposed.tolist()
    score, flagged = findings.score.tolist(), findings.flagged
    tiers = tiers_of(findings, data.labels)
    for row in ranking(findings.score, tiers).tolist():
        file = data.files[row] if data.files else ""
        other = proposed[row] if proposed[row] >= 0 else ""
        # Nine digits tell any two numbers of 32 bits apart.
        judged = "" if flagged is None else int(flagged[row])
        cells = [row, file, labels[row], Number(f"{score[row]:.9g}"), judged, other]
        cells.append(TIERS[int(tiers[row])])
        if data.classes:
            named = data.classes[proposed[row]] if proposed[row] >= 0 else ""
            cells += [data.classes[labels[row]], named]
        lines.append(cells)
    return csv_text(lines)


def evaluations(run: RunFolder) -> _Courses:
    """`val/acc` and `val/asr` by epoch, as far as the run has logged them to CSV files.

    A start of the run moves the metrics of earlier ones aside; where epochs overlap, the last
    start counts.

    Args:
        run: Its folder.
    """
    courses: _Courses = {}
    for log in run.logs():
        for line in read_csv(log):
            for key in _EVALUATED:
                if line.get(key):
                    courses.setdefault(key, {})[int(line["epoch"])] = float(line[key])
    return courses


def _write_files(run: RunFolder, findings: Findings, data: KnowsTruth) -> None:
    known = data.training_set()
    write_text(run.suspects, table(findings, known))

    tiers = tiers_of(findings, known.labels)
    shown = ranking(findings.score, tiers)[:NUM_PICTURES]
    captions = [_caption(known, findings, row) for row in shown.tolist()]
    which = "with the highest scores" if findings.flagged is None else "most suspicious"
    heading = f"The {len(shown)} {which} of {len(known.labels):,} samples"
    sheet = draw_sheet(data.training_images(shown), captions, tiers[shown], heading)
    save_png(sheet, run.path / "suspects.png")

    evaluated = evaluations(run)
    courses = {"round": _rounds(findings, known, evaluated), "epoch": evaluated}
    courses = {unit: lines for unit, lines in courses.items() if lines}
    if courses:
        save_png(draw_courses(courses), run.path / "rounds.png")

    others = {k: s for k, s in findings.further.items() if not torch.equal(s, findings.score)}
    scores = {"score": findings.score, **others}
    save_png(draw_scores(scores, _groups(findings, known)), run.path / _LAST)


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
