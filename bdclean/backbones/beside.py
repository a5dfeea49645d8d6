"""What lies beside the backbone in a foreign state dict.

Each function takes its tensors out of `rest`, a dict by names that begin where the backbone's
do. What nobody takes stays there, for the report of names that do not fit.
"""

from collections.abc import Container, Mapping

import torch
from torch import Tensor

from bdclean.backbones.architectures import Parts

# Where libraries put the classifier, beside the name that belongs to the architecture.
_HEADS = ("head", "fc", "linear", "classifier", "cls_head", "last_linear", "heads")
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
    "bn",
    "queues",
    *("dino_head", "ibot_head", "neck"),
    *("mask_token", "decoder_embed", "decoder_pos_embed", "decoder_blocks"),  # of MAE
    *("decoder_norm", "decoder_pred"),
    "n_averaged",  # of `torch.optim.swa_utils.AveragedModel`
)
# lightly's benchmarks keep a second network beside `backbone`, which is the one they evaluate.
_SECOND = ("key_", "query_", "student_", "teacher_")
# MoCo's encoders end with a projection under the name of the classifier: one layer, or an MLP.
_MOCO = ("encoder_q", "base_encoder")
_MOCO_HEADS = ("fc", "head")
# Names of the two numbers for each channel in layers that normalise images.
_STATISTICS = (("mean", "std"), ("new_mean", "new_std"))


def take_training_only(rest: dict[str, Tensor], auxiliary: tuple[str, ...]) -> list[str]:
    """Takes what only training needs.

    Args:
        rest: Tensors beside the backbone.
        auxiliary: Further parts of the architecture that only training needs.

    Returns:
        The part of each tensor.
    """
    tops = {name: name.split(".")[0] for name in rest}
    known = (*_TRAINING_ONLY, *auxiliary)
    taken = {name: top for name, top in tops.items() if top in known or top.startswith(_SECOND)}
    for name in taken:
        del rest[name]
    return list(taken.values())


def take_moco_heads(inside: dict[str, Tensor], prefix: str) -> list[str]:
    """Takes the projection of MoCo's encoder, if the backbone is one.

    Args:
        inside: Tensors under `prefix`.
        prefix: Under which the backbone is.

    Returns:
        The layer of each tensor.
    """
    encoder = prefix.rstrip(".")
    if encoder.rpartition(".")[2] not in _MOCO:
        return []
    taken = [name for name in inside if name.split(".")[0] in _MOCO_HEADS]
    for name in taken:
        del inside[name]
    return [f"{encoder}.{name.rpartition('.')[0]}" for name in taken]


def take_projections(
    rest: dict[str, Tensor], num_features: int, backbone: Container[str]
) -> list[str]:
    """Takes the heads of several layers that follow the backbone, which are no classifiers.

    Args:
        rest: Tensors beside the backbone.
        num_features: D, the inputs of such a head.
        backbone: First parts of the backbone's own names.

    Returns:
        The head of each tensor.
    """
    taken = []
    for top in dict.fromkeys(name.split(".")[0] for name in rest):
        head = {name: tensor for name, tensor in rest.items() if name.split(".")[0] == top}
        layers = {name.rpartition(".")[0] for name in head}
        deep = len(layers) > 1 or any(layer.count(".") > 1 for layer in layers)
        flat = all(tensor.ndim <= 2 for tensor in head.values())
        follows = any(t.ndim == 2 and t.shape[1] == num_features for t in head.values())
        if deep and flat and follows and top not in backbone:
            taken += [top] * len(head)
            for name in head:
                del rest[name]
    return taken


def take_normalisation(rest: dict[str, Tensor]) -> dict[str, Tensor]:
    """Takes "mean" and "std" (3,) of a layer that normalises images in [0, 1], if there is one."""
    for key in [name for name in rest if name.endswith("mean")]:
        layer, dot, last = key.rpartition(".")
        for mean_name, std_name in _STATISTICS:
            std_key = f"{layer}{dot}{std_name}"
            if last != mean_name or std_key not in rest:
                continue
            mean, std = rest[key].float().flatten(), rest[std_key].float().flatten()
            if len(mean) == len(std) == 3 and _are_of_pixels(mean, std):
                del rest[key], rest[std_key]
                return {"mean": mean, "std": std}
    return {}


def _are_of_pixels(mean: Tensor, std: Tensor) -> bool:
    return bool(((mean >= 0) & (mean <= 1) & (std > 0) & std.isfinite()).all())


def find_head(rest: Mapping[str, Tensor], parts: Parts) -> tuple[str, ...]:
    """Finds the layers of the classifier; see `take_head`."""
    for names in (parts.heads, *_candidates(rest)):
        weights = [_matrix(rest.get(f"{name}.weight")) for name in names]
        matrices = [weight for weight in weights if weight is not None]
        if not names or len(matrices) < len(names):
            continue
        if len({len(matrix) for matrix in matrices}) > 1:
            continue
        if sum(matrix.shape[1] for matrix in matrices) == parts.num_features:
            return names
    return ()


def take_head(rest: dict[str, Tensor], parts: Parts) -> tuple[dict[str, Tensor], int | None]:
    """Takes the classifier.

    Args:
        rest: Tensors beside the backbone.
        parts: Names of the architecture's classifiers, and D.

    Returns:
        "head.weight" (K, D) and "head.bias" (K,), and K; nothing and None without a classifier.
        Several classifiers whose answers the architecture averages become one.
    """
    names = find_head(rest, parts)
    if not names:
        return {}, None
    matrices = [rest.pop(f"{name}.weight").flatten(1) for name in names]
    biases = [rest.pop(f"{name}.bias") for name in names if f"{name}.bias" in rest]
    head = {"head.weight": matrices[0]}
    if len(names) > 1:
        head["head.weight"] = torch.cat(matrices, dim=1) / len(names)
    if len(biases) == len(names):
        head["head.bias"] = torch.stack(biases).mean(0) if len(names) > 1 else biases[0]
    elif not parts.bias:
        head["head.bias"] = torch.zeros(len(matrices[0]))
    return head, len(matrices[0])


def _matrix(weight: Tensor | None) -> Tensor | None:
    """The weight of a linear layer (K, D), or of a convolution that is one, (K, D, 1, 1)."""
    if weight is None or weight.ndim < 2 or weight[:1, :1].numel() != 1:
        return None
    return weight.flatten(1)


def _candidates(rest: Mapping[str, Tensor]) -> list[tuple[str]]:
    """Layers that stand alone under a name that libraries give to the classifier."""
    layers: dict[str, set[str]] = {}
    for name in rest:
        layers.setdefault(name.split(".")[0], set()).add(name.rpartition(".")[0])
    alone = [next(iter(layers[top])) for top in _HEADS if len(layers.get(top, ())) == 1]
    return [
        (layer,)
        for layer in alone
        if all(part in _HEADS or part.isdecimal() for part in layer.split("."))
    ]
