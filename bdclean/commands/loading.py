"""The lines of Python that load a cleaned file, in the library that it came from."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bdclean.backbones import ModelInfo
from bdclean.backbones.architectures import is_made_for_a_size
from bdclean.files import SAFETENSORS
from bdclean.weights import match

_ANY = "# network: an object of the class that the file was made for"


def loading_lines(
    out: Path, info: ModelInfo, state: Mapping[str, Tensor], keys: tuple[Any, ...]
) -> str:
    """Lines that end with `network` in evaluation mode or, of an unknown class, filled.

    Args:
        out: The file.
        info: Of the model.
        state: Its tensors by the names of the file.
        keys: Under which the file has them; a safetensors file has none.
    """
    if out.suffix == SAFETENSORS:
        lines, content = ["from safetensors.torch import load_file"], f"load_file({str(out)!r})"
    else:
        way = "".join(f"[{key!r}]" for key in keys)
        lines, content = ["import torch"], f"torch.load({str(out)!r}, weights_only=True){way}"
    lines += _construction(info, state) or [_ANY]
    return "\n".join([*lines, f"network.load_state_dict({content})"])


def loading_ours(weights: Path) -> str:
    """Lines that load a file of bdclean."""
    return (
        "from bdclean.backbones import load_model\n"
        f"model = load_model({str(weights)!r}).eval()  # images in [0, 1], not normalised"
    )


def _construction(info: ModelInfo, state: Mapping[str, Tensor]) -> list[str]:
    """Lines that make a network which these weights fit; none where nobody knows them."""
    library, _, name = info.arch.partition(":")
    classes = info.num_classes or 0
    sized = library in ("timm", "torchvision") and is_made_for_a_size(info.arch)
    if library == "torchvision":
        size = f", image_size={info.input_size}" if sized else ""
        lines = [
            f"from torchvision.models import {name}",
            f"network = {name}(num_classes={classes}{size})",
        ]
    elif library == "timm":
        size = f", img_size={info.input_size}" if sized else ""
        lines = [
            "import timm",
            f"network = timm.create_model({name!r}, num_classes={classes}{size})",
        ]
    else:
        return []
    return lines if _fits(library, name, info, state, sized=sized) else []


def _fits(
    library: str, name: str, info: ModelInfo, state: Mapping[str, Tensor], *, sized: bool
) -> bool:
    """Whether the constructor of the library makes a network of these names and shapes."""
    classes = info.num_classes or 0
    try:
        with torch.device("meta"):
            network = _made(library, name, classes, info.input_size if sized else None)
    except Exception:  # a library's own code
        return False
    return match(network.state_dict(), state).ok


def _made(library: str, name: str, classes: int, size: int | None) -> nn.Module:
    if library == "timm":
        import timm

        settings: dict[str, Any] = {} if size is None else {"img_size": size}
        made: nn.Module = timm.create_model(name, num_classes=classes, **settings)
        return made
    import torchvision

    settings = {} if size is None else {"image_size": size}
    network: nn.Module = torchvision.models.get_model(
        name, weights=None, num_classes=classes, **settings
    )
    return network
