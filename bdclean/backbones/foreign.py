"""State dicts of other libraries, renamed to ours."""

import warnings
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from bdclean.backbones.architectures import Parts
from bdclean.printable import printable
from bdclean.weights import bare, unwrap

# Where libraries put the classifier, beside the name that belongs to the architecture.
_HEADS = ("head", "fc", "linear", "classifier")
# Parts that serve training alone: in solo-learn, lightly, MoCo, BYOL, SwAV and the like.
_TRAINING_ONLY = (
    "projector",
    "projection_head",
    "predictor",
    "prediction_head",
    "prototypes",
    "queue",
    "queue_ptr",
    "queue_y",
    "encoder_k",
    "backbone_momentum",
    "projection_head_momentum",
    "momentum_backbone",
    "momentum_encoder",
    "momentum_projector",
    "momentum_classifier",
    "online_classifier",
    "knn_classifier",
    "criterion",
    "queues",
)
# lightly's benchmarks keep a second network beside `backbone`, which is the one they evaluate.
_SECOND = ("key_", "query_", "student_", "teacher_")
# What solo-learn's pretraining has beside `backbone` and `classifier`.
_SOLO = ("projector", "predictor", "prototypes", "momentum_backbone", "momentum_projector")


# lightly's examples take torchvision's ResNet apart and number the parts; ReLU and pooling count.
# Its own ResNet for CIFAR loses a ReLU when it is taken apart, so that it is another network, and
# its numbers are left to the report of names that do not fit.
_NUMBERED = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}
# MoCo's encoders end with a projection under the name of the classifier: one layer, or an MLP.
_MOCO = ("encoder_q", "base_encoder")
_MOCO_HEADS = ("fc", "head")


@dataclass(frozen=True)
class Foreign:
    """A foreign state dict by our names.

    Attributes:
        state: `backbone.*`, and `head.*` if the file has a classifier. Names that belong to
            neither are kept, for the report of unexpected keys.
        num_classes: Rows of the classifier, None without one.
        normalisation: "mean" and "std" if the file holds those of a model of ours.
    """

    state: dict[str, Tensor]
    num_classes: int | None
    normalisation: dict[str, Tensor]


def split_foreign(found: dict[str, Tensor], parts: Parts, weights: str | Path) -> Foreign:
    """Renames a foreign state dict; see `Foreign`.

    A warning lists what is left out because it serves training alone.
    """
    expected = parts.backbone.state_dict()
    found, projection = _take_moco_heads(_name_numbered(found, expected))
    inside, outside = unwrap(found, expected)
    if not any(name in expected for name in inside):
        return Foreign(found, None, {})  # nothing fits: report the names as they are in the file
    inside = _rename_shortcuts(inside, expected)
    state: dict[str, Tensor] = {}
    rest = dict(outside)
    for name, tensor in inside.items():
        if name in expected:
            state[f"backbone.{name}"] = tensor
        else:
            rest[f"backbone.{name}" if name in rest else name] = tensor
    normalisation = {
        key: rest.pop(f"normalize.{key}").float()
        for key in ("mean", "std")
        if f"normalize.{key}" in rest and rest[f"normalize.{key}"].shape == (3,)
    }
    num_classes = _take_head(state, rest, parts)
    _drop_training_only(rest, projection, weights)
    return Foreign({**state, **rest}, num_classes, normalisation)


def warn_of_solo_learn(found: dict[str, Tensor], weights: str | Path, arch: str) -> None:
    """Tells of a CIFAR ResNet of solo-learn: it fits ours by name and shape, and is another."""
    tops = {name.split(".")[0] for name in found}
    if {"backbone", "classifier"} <= tops and tops & set(_SOLO):
        warnings.warn(
            f"{weights} looks like a file of solo-learn, whose first convolution for CIFAR pads by "
            f"2 pixels; {arch} pads by 1 and computes other features. If so, name it solo:{arch}.",
            stacklevel=2,
        )


def _name_numbered(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gives the numbered parts of a ResNet their names, if that makes more of them fit."""

    def fitting(state: dict[str, Tensor]) -> int:
        return len({bare(name)[1] for name in state} & expected.keys())

    renamed = {}
    for name, tensor in found.items():
        prefix, rest = bare(name)
        number, dot, end = rest.partition(".")
        renamed[f"{prefix}{_NUMBERED.get(number, number)}{dot}{end}"] = tensor
    return max(found, renamed, key=fitting)  # the first of equals


def _take_moco_heads(
    found: dict[str, Tensor],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """All but the projections of MoCo's encoders, and these."""
    projection = {
        name: tensor
        for name, tensor in found.items()
        if any(f"{encoder}.{head}." in name for encoder in _MOCO for head in _MOCO_HEADS)
    }
    return {name: t for name, t in found.items() if name not in projection}, projection


def _rename_shortcuts(inside: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """The CIFAR ResNets of github.com/kuangliu/pytorch-cifar say shortcut for downsample."""
    renamed = {}
    for name, tensor in inside.items():
        other = name.replace(".shortcut.", ".downsample.")
        renamed[other if other in expected else name] = tensor
    return renamed


def _take_head(state: dict[str, Tensor], rest: dict[str, Tensor], parts: Parts) -> int | None:
    """Moves the classifier from `rest` to `state`, and says how many classes it has."""
    for head in dict.fromkeys((parts.head, *_HEADS)):
        weight = rest.get(f"{head}.weight")
        if weight is not None and weight.ndim == 2 and weight.shape[1] == parts.num_features:
            for name in ("weight", "bias"):
                if f"{head}.{name}" in rest:
                    state[f"head.{name}"] = rest.pop(f"{head}.{name}")
            return len(weight)
    return None


def _drop_training_only(
    rest: dict[str, Tensor], projection: dict[str, Tensor], weights: str | Path
) -> None:
    tops = {name: name.split(".")[0] for name in rest}
    dropped = [n for n, top in tops.items() if top in _TRAINING_ONLY or top.startswith(_SECOND)]
    if dropped or projection:
        named = sorted({printable(tops[name]) for name in dropped})
        named += sorted({printable(name.rpartition(".")[0]) for name in projection})
        warnings.warn(
            f"{weights}: {len(dropped) + len(projection)} tensors under {', '.join(named)} serve "
            "training alone and are left out.",
            stacklevel=2,
        )
    for name in dropped:
        del rest[name]
