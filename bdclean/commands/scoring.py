"""What labelled images, and a trigger, tell of a suspect and of the cleaned model.

Nothing here is read by a method: it measures both models after the fit.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bdclean.attacks import Trigger
from bdclean.backbones import ModelInfo
from bdclean.data.decoding import OnError, Reading
from bdclean.data.images import labels_of
from bdclean.data.layout import class_folders
from bdclean.data.sources import read_class_folder
from bdclean.errors import ConfigError, DataError, counted
from bdclean.metrics import AttackSuccessRate, CleanAccuracy, PoisonedAccuracy
from bdclean.metrics.backdoor import HitRate

_AT_ONCE = 256  # images


@dataclass(frozen=True)
class Scores:
    """What one model gives, in percent; see `bdclean.metrics`.

    Attributes:
        acc: Clean images that get their true class.
        asr: Triggered images that get the target; None without a trigger.
        pa: The same images that get their true class.
        n_clean: Clean images.
        n_triggered: Triggered images: all that are not of the target class.
    """

    acc: float
    asr: float | None
    pa: float | None
    n_clean: int
    n_triggered: int


@dataclass(frozen=True)
class Truth:
    """Labelled images, and perhaps a trigger, that only measure.

    Attributes:
        folder: With one folder a class.
        classes: The folders.
        numbers: The class of each of these, by its number in the model.
        trigger: At the size of the images; None without one.
        target: Its class.
    """

    folder: Path
    classes: tuple[str, ...]
    numbers: tuple[int, ...]
    trigger: Trigger | None = None
    target: int | None = None

    @property
    def names(self) -> Mapping[int, str]:
        """What the folders call the classes, where that is not their number."""
        named = zip(self.numbers, self.classes, strict=True)
        return {number: name for number, name in named if not name.isdecimal()}

    def read(self, size: int, on_error: OnError = "raise") -> tuple[Tensor, Tensor]:
        """Images (N, 3, size, size), uint8, and their classes (N,).

        Raises:
            DataError: If there are none of a class, one cannot be read, or there are none that a
                trigger could lead to the target.
        """
        reading = Reading(on_error=on_error)
        found = read_class_folder(self.folder, size, classes=self.classes, reading=reading)
        labels = torch.tensor(self.numbers)[labels_of(found)]
        if self.target is not None and bool(labels.eq(self.target).all()):
            raise DataError("--labels: no image is of another class than the target.")
        return torch.as_tensor(found.images), labels

    def scores(self, model: nn.Module, images: Tensor, labels: Tensor, device: Any) -> Scores:
        """Measures a model.

        Args:
            model: In evaluation mode; images in [0, 1] to logits.
            images: As read.
            labels: As read.
            device: Of the model.
        """
        acc = _rate(CleanAccuracy(), _classes(model, images, device), labels)
        if self.trigger is None or self.target is None:
            return Scores(acc, None, None, len(images), 0)
        counted = labels != self.target
        named = _classes(model, self.trigger.poison(images[counted]), device)
        true, target = labels[counted], torch.full_like(named, self.target)
        asr = _rate(AttackSuccessRate(), named, true, target)
        pa = _rate(PoisonedAccuracy(), named, true, target)
        return Scores(acc, asr, pa, len(images), len(named))


@dataclass(frozen=True)
class Measured:
    """Both models on the same images.

    Attributes:
        before: The suspect.
        after: The cleaned model.
        shared: How many of the clean images the method has seen, without labels.
        folder: Of the labelled images.
    """

    before: Scores
    after: Scores
    shared: int
    folder: str

    def as_json(self) -> dict[str, Any]:
        """For a record."""
        return asdict(self)


def find_truth(
    labels: str | None, trigger: str | None, target: int | None, info: ModelInfo
) -> Truth | None:
    """Looks at folder and trigger before the fit; no image is read.

    Args:
        labels: The folder; None without one.
        trigger: A `trigger.safetensors`; None without one.
        target: Its class; None takes that of the plan beside the file.
        info: Of the model.

    Raises:
        ConfigError: If one needs the other, or does not fit the model.
        DataError: If the folder has no class folders.
        AttackError: If the trigger cannot be read.
    """
    if labels is None:
        if trigger is not None or target is not None:
            raise ConfigError("--trigger needs --labels, the images that get the trigger.")
        return None
    if info.num_classes is None:
        raise ConfigError("--labels: the model has no classifier head, so nothing is measured.")
    classes = tuple(class_folders(Path(labels)))
    numbers = _numbers(classes, labels, info.num_classes)
    truth = Truth(Path(labels), classes, numbers)
    if trigger is None:
        if target is not None:
            raise ConfigError(f"--target {target}: it needs --trigger, which leads to that class.")
        return truth
    read = Trigger.load(trigger)
    if read.size != (info.input_size, info.input_size):
        raise ConfigError(
            f"--trigger {trigger}: it is for images of {read.size[0]} pixels, and the model takes "
            f"{info.input_size}."
        )
    wanted = _target_beside(trigger) if target is None else target
    if not 0 <= wanted < info.num_classes:
        raise ConfigError(f"--target {wanted}: the classes are 0 to {info.num_classes - 1}.")
    return Truth(Path(labels), classes, numbers, read, wanted)


def measure(
    truth: Truth,
    before: nn.Module,
    after: nn.Module,
    labelled: tuple[Tensor, Tensor],
    device: Any,
    seen: Tensor,
) -> Measured:
    """Measures both models.

    Args:
        truth: With what.
        before: The suspect, in evaluation mode.
        after: The cleaned model, in evaluation mode.
        labelled: Images and classes, as `Truth.read` gives them.
        device: Of both models.
        seen: The images of the method, (M, 3, size, size), uint8.
    """
    images, labels = labelled
    known = {image.numpy().tobytes() for image in torch.as_tensor(seen)}
    shared = sum(image.numpy().tobytes() in known for image in images)
    first, second = (truth.scores(model, images, labels, device) for model in (before, after))
    return Measured(first, second, shared, str(truth.folder))


def _numbers(classes: Sequence[str], labels: str, count: int) -> tuple[int, ...]:
    if all(name.isdecimal() for name in classes):
        numbers = tuple(int(name) for name in classes)
        if len(set(numbers)) < len(numbers):
            raise ConfigError(
                f"--labels {labels}: two of its folders are the same class number; join them."
            )
        if max(numbers) >= count:
            raise ConfigError(
                f"--labels {labels}: its folders are class numbers from {min(numbers)} to "
                f"{max(numbers)}, and the classes of the model are 0 to {count - 1}."
            )
        return numbers
    if len(classes) != count:
        raise ConfigError(
            f"--labels {labels}: it has {counted(len(classes), 'class folder')}, and the model "
            f"{counted(count, 'class', 'classes')}. Give one folder a class, in the order of their "
            "names, or name them by the numbers of the classes."
        )
    return tuple(range(count))


def _target_beside(trigger: str) -> int:
    plan = Path(trigger).with_name("plan.json")
    try:
        target = json.loads(plan.read_text(encoding="utf-8"))["target"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        target = None
    if type(target) is not int:
        raise ConfigError(
            f"--trigger {trigger}: no plan.json beside it names a target; give --target, the class "
            "that the trigger leads to."
        )
    return target


@torch.no_grad()
def _classes(model: nn.Module, images: Tensor, device: Any) -> Tensor:
    parts = [
        model(x.to(device).float() / 255).argmax(1).cpu() for x in torch.split(images, _AT_ONCE)
    ]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.long)


def _rate(metric: HitRate, *given: Tensor) -> float:
    metric.update(*given)
    return float(metric.compute())
