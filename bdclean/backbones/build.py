"""Builds models from a description and from weights files. Never downloads anything."""

import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bdclean.backbones.architectures import (
    DEFAULT_INPUT_SIZE,
    Parts,
    canonical,
    full_name,
    make_parts,
    option_of,
    usual_colours,
    usual_size,
)
from bdclean.backbones.cifar import CIFAR
from bdclean.backbones.foreign import split_foreign, warn_of_solo_learn
from bdclean.backbones.guess import Guess, guess, guess_own, nearest, one_of, taken_for
from bdclean.backbones.near import what_fits
from bdclean.backbones.own_network import is_own_network, name_network, place_of
from bdclean.backbones.skeleton import check_memory, shapes
from bdclean.backbones.split import ModelInfo, SplitModel, Stem
from bdclean.errors import BdcleanError, ConfigError, WeightsError
from bdclean.files import FORMAT_KEY
from bdclean.functional.finite import odd_tensor
from bdclean.printable import printable
from bdclean.types import RGB, ImageFacts
from bdclean.weights import Nest, check_plain, match, read_nests, write


def build(info: ModelInfo) -> SplitModel:
    """Builds a freshly initialised model.

    Args:
        info: What to build. `arch` is "resnet18", "resnet34" or "mobilenet_v2" (with a stem for
            small images where `stem` says so), a name of `bdclean.backbones.cifar.CIFAR` such as
            "preact_resnet18" and "wrn28_10", "torchvision:<name>", "timm:<name>", a bare name of
            either library, or "solo:resnet18" for that of solo-learn for CIFAR (and so on). A
            network of your own is "my_module:MyNet" or "my_module:MyNet(depth=3)@fc", with
            arguments and the name of its head.

    Returns:
        The model in training mode, in float32 on the CPU. Its `info` names the library and the
        stem that were chosen.

    Raises:
        ConfigError: If the architecture is unknown or does not fit the other values.
    """
    name_network(info.arch)
    info = canonical(info)
    try:
        return _assemble(make_parts(info), info)
    except (RuntimeError, TypeError, OverflowError, MemoryError) as error:
        raise ConfigError(
            f"width={info.width}: a network of that size cannot be built here, with "
            f"{info.num_classes} classes and images of {info.input_size} pixels."
        ) from error


def _assemble(parts: Parts, info: ModelInfo) -> SplitModel:
    return SplitModel(
        parts.backbone, parts.num_features, info.num_classes, info.mean, info.std, info
    )


def save_model(model: SplitModel, path: str | Path, extra: Mapping[str, str] | None = None) -> str:
    """Writes a model as safetensors, with all that is needed to build it again.

    Args:
        model: The model; its state dict is written as it is.
        path: A name that ends in `.safetensors`.
        extra: Further metadata, for example what was done to the model.

    Returns:
        The SHA-256 of the file's content, in hexadecimal. Equal models give equal files.

    Raises:
        WeightsError: If the file cannot be written.
        ConfigError: If `extra` uses a name that describes the model.
    """
    metadata = model.info.to_metadata()
    taken = sorted(metadata.keys() & (extra or {}).keys())
    if taken:
        raise ConfigError(f"extra metadata {', '.join(taken)}: these names describe the model.")
    return write(model.state_dict(), path, {**metadata, **(extra or {})})


def load_model(
    weights: str | Path,
    *,
    arch: str | None = None,
    num_classes: int | None = None,
    input_size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    width: int | None = None,
    stem: Stem | None = None,
    usual: tuple[RGB, RGB] | None = None,
) -> SplitModel:
    """Builds the model of a weights file and loads it, whole or not at all.

    Our own files describe themselves; an argument that is given must agree with the file. A
    foreign file (torchvision, timm, kuangliu's CIFAR ResNets, self-supervised libraries) is taken
    for the one architecture that it fits, and a warning says so; where it fits several, it needs
    `arch`. The network is found in it by names and shapes, its classifier becomes the head, and
    without one the model has no head. The global random state is left as it was.

    Args:
        weights: The file; see `bdclean.weights.read` for the kinds.
        arch: Architecture; see `build`. A file of ours that was made with a network of your own
            needs it too, because no file makes bdclean import code.
        num_classes: Classes that the head must have, if the file holds a head.
        input_size: Height and width of the images, in pixels. Foreign files: if not given, that
            which the architecture was published with; 32 for our own architectures.
        mean: Mean of the normalisation, units of [0, 1] pixels. Foreign files: that of `usual` if
            neither given nor in the file.
        std: Standard deviation of the normalisation; as `mean`.
        width: Channels of the first layer. Foreign files: 64 if neither given nor guessed.
        stem: First layers of the network. Foreign files: "auto" if neither given nor guessed.
        usual: Mean and std where the file holds none and none are given. None takes those that
            the architecture was published with; ImageNet's for our own architectures.

    Raises:
        WeightsError: If the file cannot be read safely, or names or shapes do not fit.
        ConfigError: If an argument is missing or contradicts the file.
    """
    name_network(arch)
    nests, metadata = read_nests(weights)
    given: dict[str, Any] = {
        "arch": arch,
        "num_classes": num_classes,
        "input_size": input_size,
        "mean": mean,
        "std": std,
        "width": width,
        "stem": stem,
    }
    given = {key: value for key, value in given.items() if value is not None}
    with torch.random.fork_rng(devices=[]):
        if FORMAT_KEY in metadata:
            model = _load_own(weights, nests, metadata, given)
        else:
            model = _load_foreign(weights, nests, given, usual)
    if (name := odd_tensor(model.state_dict())) is not None:
        raise WeightsError(
            f"{weights}: {name} holds numbers that are not finite (NaN or infinite), so the "
            "model can answer nothing; take another copy of the file, or a model whose "
            "training has not diverged."
        )
    if (name := _negative_spread(model)) is not None:
        raise WeightsError(
            f"{weights}: {name} holds numbers below 0, and no variance or standard deviation is; "
            "take another copy of the file."
        )
    return model


def _negative_spread(model: SplitModel) -> str | None:
    """The first variance or standard deviation that is none, by its name."""
    for name, buffer in model.named_buffers():
        least = 0 if buffer.numel() == 0 else buffer.min()
        if name == "normalize.std" and least == 0:
            return name
        if name.endswith(("running_var", "normalize.std", "head.std")) and least < 0:
            return name
    return None


def _load_own(
    weights: str | Path,
    nests: Sequence[Nest],
    metadata: Mapping[str, str],
    given: dict[str, Any],
) -> SplitModel:
    try:
        info = canonical(ModelInfo.from_metadata(metadata))
    except BdcleanError as error:
        raise WeightsError(
            f"{weights}: its metadata describes no model ({_inner(error)})."
        ) from error
    info = _by_user(info, given, weights)
    if info.num_classes is None:
        given.pop("num_classes", None)  # a backbone without a head serves any number of classes
    wanted = canonical(replace(info, **given))
    for key in given:
        if getattr(wanted, key) != getattr(info, key):
            own = getattr(info, key)
            way_out = f"Leave {key} out"
            if key == "input_size":  # the command line links it from the data
                way_out += f", set --data.input_size {own} where it can be set"
            raise ConfigError(
                f"{key}={given[key]!r}, but {weights} was made with {key}={own!r}. {way_out}, "
                "or give other weights."
            )
    (nest,) = nests
    check_plain(nest, weights)
    model = build_for(info, nest.tensors, weights)
    _load(model, nest.tensors)
    return model


def _by_user(info: ModelInfo, given: Mapping[str, Any], weights: str | Path) -> ModelInfo:
    """The description, in which code of somebody's own is the one that the user names.

    Raises:
        ConfigError: If the user names none.
    """
    if not is_own_network(info.arch):
        return info
    if is_own_network(given.get("arch", "")):
        return replace(info, arch=given["arch"])
    raise ConfigError(
        f"{printable(weights)} was made with a network of somebody's own "
        f"({place_of(info.arch)}), and no file makes bdclean import code: name the module "
        "yourself with arch, on the command line --model.arch."
    )


def build_for(info: ModelInfo, state: Mapping[str, Tensor], weights: str | Path) -> SplitModel:
    """Builds a freshly initialised model, if weights fit it.

    Args:
        info: What to build, as a file describes it.
        state: The weights of the file.
        weights: What the file is called.

    Raises:
        WeightsError: If names or shapes do not fit. No memory is taken before that is known.
    """
    try:
        info = canonical(info)
    except ConfigError as error:
        raise WeightsError(
            f"{weights}: its metadata describes no model ({_inner(error)})."
        ) from error
    skeleton = _skeleton(info, weights)
    _check(skeleton, state, weights)
    check_memory(skeleton.backbone, printable(weights))
    return _assemble(make_parts(info, skeleton.num_features), info)


def _skeleton(info: ModelInfo, weights: str | Path) -> SplitModel:
    """A model of shapes alone: a file may ask for any size, and is not to take memory for it."""
    try:
        parts = shapes(info, printable(weights))
        with torch.device("meta"):
            return _assemble(parts, info)
    except ConfigError as error:
        raise WeightsError(
            f"{weights}: its metadata describes no model ({_inner(error)})."
        ) from error
    except (RuntimeError, TypeError, ValueError, OverflowError) as error:
        raise WeightsError(
            f"{weights}: no {info.arch} can be built with the width, num_classes and input_size in "
            "its metadata."
        ) from error


def _inner(error: BdcleanError) -> str:
    """What an error says, for the middle of another sentence."""
    return printable(error).rstrip(".")


def _load_foreign(
    weights: str | Path,
    nests: Sequence[Nest],
    given: dict[str, Any],
    usual: tuple[RGB, RGB] | None,
) -> SplitModel:
    if "arch" not in given:
        taken = _guess(weights, nests, given, usual)
        model = _load_foreign(weights, nests, {**given, **taken.settings}, usual)
        warnings.warn(taken_for(taken, model.info, given, weights), stacklevel=2)
        return model
    arch = full_name(given["arch"])
    mean, std = usual or usual_colours(arch)
    defaults = {"input_size": usual_size(arch) or DEFAULT_INPUT_SIZE, "mean": mean, "std": std}
    info = canonical(ModelInfo(**{**defaults, **given, "num_classes": None}))
    if info.arch in ("resnet18", "resnet34") and info.stem == "cifar":
        warn_of_solo_learn(nests, weights, info.arch)
    parts = make_parts(info)
    found = split_foreign(nests, parts, weights)
    if found.told:
        warnings.warn(f"{printable(weights)}: {'; '.join(found.told)}.", stacklevel=2)
    asked = given.get("num_classes", found.num_classes)
    if found.num_classes is not None and asked != found.num_classes:
        raise ConfigError(
            f"num_classes={asked}, but the head in {weights} has {found.num_classes} classes."
        )
    for key, values in found.normalisation.items():
        if key in given and not torch.allclose(torch.tensor(getattr(info, key)), values):
            raise ConfigError(f"{key}={given[key]}, but {weights} holds {values.tolist()}.")
    mean, std = (
        tuple(found.normalisation[key].tolist()) if key in found.normalisation else known
        for key, known in (("mean", info.mean), ("std", info.std))
    )
    info = replace(info, num_classes=found.num_classes, mean=mean, std=std)
    model = _assemble(parts, info)
    own = {f"normalize.{key}": value for key, value in model.normalize.state_dict().items()}
    state = {**own, **found.state}
    _check(model, state, weights, lambda: _hint(nests, model, state, weights))
    _load(model, state)
    return model


def _hint(
    nests: Sequence[Nest], model: SplitModel, state: Mapping[str, Tensor], weights: str | Path
) -> str:
    """What the file fits instead of what was asked for, as a sentence that follows another one."""
    for info in (each.info for each in guess_own(nests, weights)):
        if info.arch in CIFAR:
            keys = ("arch", "width")
            given = ", ".join(f"{key}={getattr(info, key)}" for key in keys)
            options = " ".join(f"{option_of(key)} {getattr(info, key)}" for key in keys)
            return f" It fits {given}; on the command line {options}."
    return what_fits(nests, model, state, weights)


def _guess(
    weights: str | Path,
    nests: Sequence[Nest],
    given: Mapping[str, Any],
    usual: tuple[RGB, RGB] | None,
) -> Guess:
    """The architecture that the file fits; it is to be the only one."""
    colours_known = usual is not None or {"mean", "std"} <= given.keys()
    guesses = guess(nests, weights, given, colours_known=colours_known)
    if not guesses:
        raise ConfigError(
            f"{weights} does not say which architecture it is for; name it with arch, on the "
            "command line --model.arch (for example resnet18, timm:vit_tiny_patch16_224, or "
            f"your own class, my_module:MyNet).{nearest(nests, weights)}"
        )
    return one_of(guesses, weights)


def _load(model: SplitModel, state: Mapping[str, Tensor]) -> None:
    # The versions of its layers, which a weights file does not keep: MNASNet asks for its own.
    versions = OrderedDict(state)
    versions._metadata = model.state_dict()._metadata  # type: ignore[attr-defined]
    model.load_state_dict(versions, strict=False)  # absent: num_batches_tracked at most


def _check(
    model: SplitModel,
    state: Mapping[str, Tensor],
    weights: str | Path,
    hint: Callable[[], str] = str,
) -> None:
    report = match(model.state_dict(), state)
    if not report.ok:
        raise WeightsError(
            f"{weights} does not fit {model.info.arch} (width {model.info.width}, stem "
            f"{model.info.stem}, input size {model.info.input_size}): {report.message()}.{hint()}"
        )


def start_from(
    facts: ImageFacts,
    num_classes: int | None,
    arch: str | None,
    width: int | None,
    stem: Stem | None,
    weights: str | None,
) -> SplitModel:
    """The network that a training starts from: a new one, or that of a file.

    Args:
        facts: Side of the images; mean and std of a new network or a file that holds none.
        num_classes: Outputs of the head; a head with others is replaced. None leaves it out.
        arch: None takes that of the file, or resnet18.
        width: None takes that of the file, or 64.
        stem: None takes that of the file, or `auto`.
        weights: The file; None builds a new network.

    Raises:
        ConfigError: If an argument contradicts the file.
        WeightsError: If the file cannot be read safely or does not fit.
    """
    given: dict[str, Any] = {"arch": arch, "width": width, "stem": stem}
    given = {key: value for key, value in given.items() if value is not None}
    if weights is None:
        arch = given.pop("arch", "resnet18")
        return build(ModelInfo(arch, num_classes, facts.input_size, facts.mean, facts.std, **given))
    usual = (facts.mean, facts.std)
    model = load_model(weights, input_size=facts.input_size, usual=usual, **given)
    if model.info.num_classes != num_classes:
        model.replace_head(num_classes)
    return model
