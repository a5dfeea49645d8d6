"""Lines of Python that load a weights file, for people to copy."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from bdclean.backbones.architectures import AUXILIARY, is_made_for_a_size, whole_network
from bdclean.backbones.own_network import is_named, is_own_network, lines_of, make_whole
from bdclean.backbones.split import ModelInfo
from bdclean.files import FORMAT_KEY, SAFETENSORS, safetensors_metadata
from bdclean.weights import match, read_nests

_ANY = "# network: an object of the class that the file was made for"
_OURS = "from bdclean.backbones import load_model"
_IMAGES = "  # images in [0, 1], not normalised"


def loading_lines(path: str | Path, info: ModelInfo, called: str | Path | None = None) -> str:
    """Lines that end with a `network` of the library or the user, or with a `model` of ours.

    A constructor is named where it makes a network of the names and shapes in the file.

    Args:
        path: The file, or a folder for the Hub.
        info: Of the model in it.
        called: The path in the lines, of the same file seen from elsewhere; None takes `path`.
    """
    path = Path(path)
    named = path if called is None else Path(called)
    library, _, _ = info.arch.partition(":")
    if path.is_dir() and library == "timm":
        made = f"timm.create_model({f'local-dir:{named}'!r}, pretrained=True)"
        return f"import timm\nnetwork = {made}"
    file, shown = path, str(named)
    if path.is_dir():
        file, shown = path / f"model{SAFETENSORS}", str(named / f"model{SAFETENSORS}")
    is_safetensors = file.suffix == SAFETENSORS
    if is_safetensors and FORMAT_KEY in safetensors_metadata(file):
        return f"{_OURS}\nmodel = {load_call(shown, info.arch)}.eval(){_IMAGES}"
    nest = max(read_nests(file)[0], key=lambda each: len(each.tensors))
    construction = _construction(info, nest.tensors)
    if construction is None and (library in ("timm", "torchvision") or _can_be_built(info)):
        return f"{_OURS}\nmodel = load_model({shown!r}{_known(info)}).eval(){_IMAGES}"
    lines, strict = construction or ([_ANY], True)
    if is_safetensors:
        lines, content = ["from safetensors.torch import load_file", *lines], "load_file({})"
    else:
        way = "".join(f"[{key!r}]" for key in nest.keys)
        lines, content = ["import torch", *lines], f"torch.load({{}}, weights_only=True){way}"
    given = content.replace("{}", repr(shown)) + ("" if strict else ", strict=False")
    return "\n".join([*lines, f"network.load_state_dict({given})", "network.eval()"])


def load_call(path: str | Path, arch: str, quoted: Callable[[str], str] = repr) -> str:
    """The call of `load_model` for a file of ours.

    Args:
        path: The file.
        arch: Its architecture. One of the user's own has to be named, as no file makes code run.
        quoted: Writes a text of Python.
    """
    named = f", arch={quoted(arch)}" if is_own_network(arch) else ""
    return f"load_model({quoted(str(path))}{named})"


def _can_be_built(info: ModelInfo) -> bool:
    """Whether `load_model` knows the architecture; not that of a network in memory."""
    return is_named(info.arch) or not is_own_network(info.arch)


def _construction(info: ModelInfo, state: Mapping[str, Tensor]) -> tuple[list[str], bool] | None:
    """Lines that make a network which these weights fit; None where nobody knows them.

    Returns:
        The lines, and whether all of the network's weights are there; its head may be missing.
    """
    library, _, name = info.arch.partition(":")
    auxiliary = any(key.startswith(AUXILIARY.get(name, ())) for key in state)
    try:
        if is_named(info.arch):
            with torch.device("meta"):
                lines, network = lines_of(info.arch), make_whole(info.arch)
        elif library in ("timm", "torchvision"):
            lines = _lines(library, name, info, auxiliary=auxiliary)
            made = whole_network(info, auxiliary=auxiliary)
            assert made is not None  # noqa: S101
            network = made
        else:
            return None
        report = match(network.state_dict(), state)
    except Exception:  # a library's own code, or the user's
        return None
    if report.ok:
        return lines, True
    linear = [key for key, module in network.named_modules() if isinstance(module, nn.Linear)]
    head = f"{linear[-1]}." if linear else ""
    others = [key for key in report.missing if not key.startswith(head)]
    if info.num_classes is not None or report.unexpected or report.misshaped or others:
        return None
    return lines, False


def _lines(library: str, name: str, info: ModelInfo, *, auxiliary: bool) -> list[str]:
    sized = is_made_for_a_size(info.arch)
    if library == "timm":
        size = f", img_size={info.input_size}" if sized else ""
        made = f"timm.create_model({name!r}, num_classes={info.num_classes or 0}{size})"
        return ["import timm", f"network = {made}"]
    given = [] if info.num_classes is None else [f"num_classes={info.num_classes}"]
    given += [f"image_size={info.input_size}"] if sized else []
    given += ["aux_logits=False"] if name in AUXILIARY and not auxiliary else []
    return [f"from torchvision.models import {name}", f"network = {name}({', '.join(given)})"]


def _known(info: ModelInfo) -> str:
    """Arguments of `load_model` for a file that does not say them."""
    keys = ["arch", "input_size", "mean", "std"]
    if ":" not in info.arch:
        keys += ["width", "stem"]
    return "".join(f", {key}={getattr(info, key)!r}" for key in keys)
