"""Python that loads a model from an exported file, for people to copy."""

from collections.abc import Iterator
from pathlib import Path

from bdclean.backbones.architectures import is_made_for_a_size
from bdclean.backbones.split import ModelInfo, SplitModel
from bdclean.files import SAFETENSORS


def load_lines(model: SplitModel, path: str | Path, kind: str) -> Iterator[str]:
    """The lines.

    Args:
        model: The model that was exported.
        path: The file or folder.
        kind: "safetensors", "state_dict", "hf" or "bdclean".
    """
    path, info = Path(path), model.info
    library = info.arch.rpartition(":")[0]
    if kind == "hf" and library == "timm":
        yield "import timm"
        yield f"network = timm.create_model({f'local-dir:{path}'!r}, pretrained=True)"
    elif kind in ("hf", "bdclean") or library not in ("timm", "torchvision"):
        weights = path / f"model{SAFETENSORS}" if kind == "hf" else path
        known = "" if kind in ("hf", "bdclean") else _known(info)
        yield "from bdclean.backbones import load_model"
        yield f"model = load_model({str(weights)!r}{known})"
    else:
        yield from _network(info)
        strict = ", strict=False" if library == "torchvision" and info.num_classes is None else ""
        if kind == "safetensors":
            yield "from safetensors.torch import load_file"
            yield f"network.load_state_dict(load_file({str(path)!r}){strict})"
        else:
            yield "import torch"
            read = f"torch.load({str(path)!r}, weights_only=True)"
            yield f"network.load_state_dict({read}{strict})"


def _network(info: ModelInfo) -> Iterator[str]:
    """The library's own network."""
    library, _, name = info.arch.rpartition(":")
    sized = is_made_for_a_size(info.arch)
    if library == "timm":
        size = f", img_size={info.input_size}" if sized else ""
        yield "import timm"
        yield f"network = timm.create_model({name!r}, num_classes={info.num_classes or 0}{size})"
        return
    given = [] if info.num_classes is None else [f"num_classes={info.num_classes}"]
    given += [f"image_size={info.input_size}"] if sized else []
    given += ["aux_logits=False"] if name in ("googlenet", "inception_v3") else []
    yield "import torchvision"
    yield f"network = torchvision.models.{name}({', '.join(given)})"


def _known(info: ModelInfo) -> str:
    """Arguments of `load_model` for a file that does not say them."""
    keys = ["arch", "input_size", "mean", "std"]
    if ":" not in info.arch:
        keys += ["width", "stem"]
    return "".join(f", {key}={getattr(info, key)!r}" for key in keys)
