"""What a purification leaves to read: `report.html` and the model card `README.md`."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any

from bdclean.backbones import ModelInfo
from bdclean.backbones.loading_lines import loading_lines
from bdclean.checking import Verdict
from bdclean.checking.verdicts import classes_named, p_value
from bdclean.commands.canary import Canary
from bdclean.commands.examples import Answer, Example
from bdclean.commands.scoring import Measured, Scores
from bdclean.errors import ConfigError, counted
from bdclean.figures.png import pixels_to_png
from bdclean.files import write_text
from bdclean.progress import duration
from bdclean.reporting.document import (
    Cell,
    Document,
    Section,
    Strip,
    Table,
    to_html,
    to_markdown,
)

PAGE, CARD = "report.html", "README.md"
MARK = "written by bdclean purify"
UNKNOWN = (
    "Whether a backdoor is gone cannot be known without its trigger. Fewer suspicious tests and "
    "high agreement are evidence, no proof."
)
_MEANS = {"patch": "a square", "universal 8": "one for all images"}
LITTLE = 0.8  # agreement with the suspect
Loading = tuple[str, str, Sequence[str]]
_START = 8000  # characters of a file in which its mark stands


@dataclass(frozen=True)
class Facts:
    """All that a report tells.

    Attributes:
        model: What came in, as the user called it.
        folder: The images, as the user called them.
        before: Verdicts on the suspect.
        after: Verdicts on the cleaned model.
        agreement: Share of images that both models name alike; None without a head.
        tested: How many images the tests looked at.
        record: Of the run.
        arch: Of the model.
        size: Side of its images in pixels.
        file: To be loaded, by its name in the run folder.
        code: Lines that load it there.
        notes: What of the file is not as it was.
        examples: Images whose answers change.
        held: Whether these were held out.
        measured: With labels; None without.
        canaries: Triggers of ours in a copy; empty without.
        names: Of classes, by their numbers, as far as they are known.
    """

    model: str
    folder: str
    before: Sequence[Verdict]
    after: Sequence[Verdict]
    agreement: float | None
    tested: int
    record: Mapping[str, Any]
    arch: str
    size: int
    file: str
    code: str
    notes: Sequence[str]
    examples: Sequence[Example]
    held: bool
    measured: Measured | None
    canaries: Sequence[Canary]
    names: Mapping[int, str]

    def called(self, number: int) -> str:
        """A class."""
        name = self.names.get(number)
        return f"class {number}" if name is None else f"class {number} ({name})"


def check_place(run: Path) -> None:
    """Refuses a folder that holds other files of these names.

    Raises:
        ConfigError: If it does.
    """
    for name in (PAGE, CARD):
        file = run / name
        if file.is_file():
            with file.open(encoding="utf-8", errors="replace") as content:
                ours = MARK in content.read(_START)
        if file.exists() and not (file.is_file() and ours):
            raise ConfigError(
                f"--run {run}: its {name} was not written by bdclean purify; move it away, or name "
                "another folder."
            )


def beside(run: Path, out: Path | None, notes: Sequence[str], info: ModelInfo) -> Loading:
    """What the page says of loading: of the file that lies beside it, wherever both are moved.

    Args:
        run: The folder of the page.
        out: The weights in the layout of what came in; None without them.
        notes: What of that file is not as it was.
        info: Of the model in it.

    Returns:
        A file in the folder, the lines that load it there, and what is to be said of it.
    """
    if out is None or out.resolve().parent == run.resolve():
        file, said = run / "model.safetensors" if out is None else out, tuple(notes)
    else:
        file = run / "model.safetensors"
        said = (f"In the layout of the file that came in, they were written to {out}.", *notes)
    return file.name, loading_lines(file, info, called=file.name), said


def write_report(run: Path, facts: Facts) -> None:
    """Writes both files into the run folder."""
    document = make_document(facts)
    write_text(run / PAGE, to_html(document))
    write_text(run / CARD, to_markdown(document))


def make_document(facts: Facts) -> Document:
    """The report."""
    sections = [_load(facts), _tests(facts), _spread(facts), *_pictures(facts), _labels(facts)]
    sections += [_canaries(facts), _done(facts), _limits(facts)]
    return Document(
        f"{Path(facts.model).name}, purified",
        (
            *evidence(facts.before, facts.after, facts.record, facts.agreement),
            *scores_lines(facts.measured),
            UNKNOWN,
        ),
        tuple(section for section in sections if section is not None),
        MARK,
    )


# ---------------------------------------------------------------------- what was measured


def evidence(
    before: Sequence[Verdict],
    after: Sequence[Verdict],
    record: Mapping[str, Any],
    agreement: float | None,
) -> list[str]:
    """What was measured without labels, in sentences.

    Args:
        before: Verdicts on the suspect.
        after: Verdicts on the cleaned model.
        record: Of the run.
        agreement: Share of images that both models name alike; held-out ones if the record has it.
    """
    ran = [sum(v.state != "not applicable" for v in each) for each in (before, after)]
    if not any(ran) and agreement is None:
        return ["Nothing was measured: no test applies to this model."]
    lines = []
    left = [v for v in after if v.state == "suspicious"]
    if left:
        named = classes_named(left)
        lines.append(
            f"The result is still suspicious by {', '.join(v.test for v in left)}"
            f"{f', which points to {named}' if named else ''}: do not take it as cleaned."
        )
    if any(ran):
        counts = [sum(v.state == "suspicious" for v in each) for each in (before, after)]
        lines.append(
            f"Suspicious tests: {counts[0]} before, {counts[1]} after (of {max(ran)} that apply)."
        )
    if agreement is not None:
        same = f"{100 * agreement:.1f} %"
        if "agreement" in record["protocol"]:
            lines.append(f"On images held out, {same} of the answers are those of the suspect.")
        else:
            lines.append(f"On images that were trained on, {same} of the answers did not change.")
        if agreement < LITTLE:
            lines.append(
                "That is little: the model has lost accuracy. Give more images, such as the model "
                "was made for, or more epochs (--model.recipe.epochs)."
            )
    return lines


def scores_lines(measured: Measured | None) -> list[str]:
    """What was measured with labels, in sentences."""
    if measured is None:
        return []
    before, after = measured.before, measured.after
    parts = [f"ACC {before.acc:.1f} % before, {after.acc:.1f} % after"]
    if before.asr is not None:
        parts.append(f"ASR {before.asr:.1f} % before, {after.asr:.1f} % after")
        parts.append(f"PA {before.pa:.1f} % before, {after.pa:.1f} % after")
    return [f"On {counted(before.n_clean, 'labelled image')}: {'; '.join(parts)}."]


def _load(facts: Facts) -> Section:
    return Section(
        "Load it",
        (f"The cleaned weights are in {facts.file}, beside this page. Run the lines there.",),
        code=facts.code,
        points=tuple(facts.notes),
    )


def _tests(facts: Facts) -> Section:
    after = {verdict.test: verdict for verdict in facts.after}
    rows = [
        (
            Cell(verdict.test),
            _finding(facts, verdict),
            _finding(facts, after[verdict.test]) if verdict.test in after else Cell("not run"),
        )
        for verdict in facts.before
    ]
    text = (
        f"Each test looks at {facts.tested:,} images of {facts.folder}, or at none (MM-BD), and at "
        "no label. No verdict says that a model is clean.",
    )
    head = ("test", "suspect", "cleaned model")
    return Section("Tests before and after", text, Table(head, tuple(rows), text=3))


def _finding(facts: Facts, verdict: Verdict) -> Cell:
    if verdict.state != "suspicious":
        return Cell(verdict.state, _statistic(verdict))
    where = "" if verdict.target is None else f": {facts.called(verdict.target)}"
    return Cell(f"suspicious{where}", _statistic(verdict), alarm=True)


def _statistic(verdict: Verdict) -> str:
    found = verdict.statistics or {}
    if {"piled", "bound"} <= found.keys():
        piled, bound = (f"{100 * found[key]:.0f} %" for key in ("piled", "bound"))
        return f"{piled} of images to one class; bound {bound}"
    if {"share", "bound"} <= found.keys():
        share, bound = (f"{100 * found[key]:.1f} %" for key in ("share", "bound"))
        return f"trigger of {share} of the image; bound {bound}" if found["share"] < 1 else ""
    if "p" in found:
        return f"p {p_value(found['p'])}; bound {found['bound']}"
    return verdict.why


def _spread(facts: Facts) -> Section | None:
    found = facts.record["protocol"].get("concentration")
    if not found:
        return None
    rows = [
        (Cell(name), *(_landing(facts, each[when]) for when in ("before", "after")))
        for name, each in found.items()
    ]
    text = (
        "Perturbations of each family change the answers to images held out as far as they can. "
        "Along a backdoor, the changed answers pile up in one class.",
    )
    head = ("family", "suspect", "cleaned model")
    return Section("Where perturbations send the answers", text, Table(head, tuple(rows), text=3))


def _landing(facts: Facts, seen: Mapping[str, Any]) -> Cell:
    if not seen["flipped"]:
        return Cell("no answer changes")
    most = f"{100 * seen['share']:.0f} % of these to {facts.called(seen['favourite'])}"
    return Cell(f"{100 * seen['flipped']:.0f} % of the answers change", most)


def _pictures(facts: Facts) -> Iterator[Section]:
    """A row for each family, whose differences have one scale."""
    which = "images held out" if facts.held else "images of the folder"
    for family, examples in groupby(facts.examples, key=lambda each: each.family):
        row = tuple(examples)
        text = (
            f"Of {which}, those whose answers by the suspect change most under a small "
            f"perturbation ({_MEANS.get(family, family)}). From left to right: the image, the "
            f"perturbed image, and their difference, in this row times {row[0].amplified}.",
        )
        strips = tuple(_strip(facts, example) for example in row)
        yield Section(f"Answers that change most: {family}", text, strips=strips)


def _strip(facts: Facts, example: Example) -> Strip:
    pictures = (
        ("the image", example.clean),
        ("the perturbed image", example.moved),
        (f"the difference, times {example.amplified}", example.difference),
    )
    return Strip(
        (
            f"suspect: {_answers(facts, example.suspect)}",
            f"cleaned: {_answers(facts, example.cleaned)}",
        ),
        tuple((shows, pixels_to_png(pixels)) for shows, pixels in pictures),
    )


def _answers(facts: Facts, answers: tuple[Answer, Answer]) -> str:
    before, after = (f"{facts.called(a.label)}, {100 * a.share:.0f} %" for a in answers)
    return f"{before} → {after}"


def _labels(facts: Facts) -> Section | None:
    if facts.measured is None:
        return None
    before, after = facts.measured.before, facts.measured.after
    rows = [_rates("ACC", "clean images that get their true class", before, after)]
    if before.asr is not None:
        rows.append(_rates("ASR", "triggered images that get the target", before, after))
        rows.append(_rates("PA", "the same that get their true class", before, after))
    text = [
        f"{counted(before.n_clean, 'labelled image')} of {facts.measured.folder}"
        + (f", {before.n_triggered:,} of them with the trigger." if before.n_triggered else ".")
        + " The method has seen no label and no trigger."
    ]
    if facts.measured.shared:
        text.append(
            f"{counted(facts.measured.shared, 'of these images was', 'of these images were')} "
            "trained on, without their labels, so that ACC may be higher than on new ones."
        )
    head = ("", "suspect", "cleaned model")
    return Section("Measured with labels", tuple(text), Table(head, tuple(rows)))


def _canaries(facts: Facts) -> Section | None:
    if not facts.canaries:
        return None
    text = (
        "Two triggers of ours were planted in a copy of the suspect, which was then purified with "
        "the same images and settings. Their success rate (ASR) is that on images that were not "
        "used to plant them. A trigger of another kind may be harder to remove.",
    )
    rows = tuple(
        (
            Cell(each.trigger, each.details),
            *(_success(rate) for rate in (each.before, each.after)),
        )
        for each in facts.canaries
    )
    return Section("A canary", text, Table(("", "ASR before", "ASR after"), rows))


def _success(rate: float | None) -> Cell:
    return Cell("not measured" if rate is None else f"{rate:.1f} %")


def _rates(key: str, means: str, before: Scores, after: Scores) -> tuple[Cell, ...]:
    values = (getattr(each, key.lower()) for each in (before, after))
    return Cell(key, means), *(Cell(f"{value:.1f} %") for value in values)


# ---------------------------------------------------------------------- what was done


def _done(facts: Facts) -> Section:
    cost, protocol = facts.record["cost"], facts.record["protocol"]
    images = facts.record["data"]["sizes"].get("defense", 0)
    rows = {
        "method": f"{protocol['method']}; labels used: {protocol['labels']}",
        "model": f"{facts.model}: {facts.arch}, images of {facts.size} pixels",
        "images": f"{images:,} of {facts.folder}, without labels",
        "training": f"{counted(cost['epochs'], 'epoch')}, {counted(cost['steps'], 'step')}, "
        f"{duration(cost['train_seconds'])} on {cost['device']}, {cost['precision']}",
        "families": ", ".join(protocol.get("families", ())),
        "weight of perturbed images": ", ".join(f"{x:.3g}" for x in protocol.get("beta", ())),
        "seed": str(facts.record["seed"]),
        "SHA-256 of model.safetensors": facts.record["hashes"].get("weights", ""),
        "software": f"bdclean {version('bdclean')}, torch {facts.record['versions']['torch']}",
        "all settings": "config.yaml, beside this file",
    }
    return Section("What was done", facts=tuple((k, v) for k, v in rows.items() if v))


def _limits(facts: Facts) -> Section:
    points = [
        "A backdoor of a kind that the tests do not look for passes all of them, before and after.",
        "Agreement tells what the model has kept, good or bad. It cannot tell whether the suspect "
        "was right.",
    ]
    if facts.measured is None:
        headless = "the cleaned model has no classifier head"
        why = headless if facts.agreement is None else "no labelled images were given (--labels)"
        points.append(f"Accuracy was not measured: {why}.")
    if facts.measured is None or facts.measured.before.asr is None:
        points.append("Attack success was not measured: no trigger was given (--trigger).")
    else:
        points.append("ASR tells of the trigger that was given, and of no other.")
    return Section("What cannot be known", points=tuple(points))
