"""Models for other programs: state dicts by the names of the library, ONNX, folders for the Hub."""

import importlib
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bdclean.backbones.architectures import whole_network
from bdclean.backbones.card import hub_card, hub_config
from bdclean.backbones.skeleton import shapes
from bdclean.backbones.split import SplitModel
from bdclean.errors import ConfigError, FileError, WeightsError
from bdclean.extras import require
from bdclean.files import SAFETENSORS, replacing, write_text
from bdclean.printable import printable
from bdclean.weights import TORCH_SUFFIXES, match, write, write_torch

ONNX = ".onnx"
_CLOSE = 1e-3  # of the largest answer


def library_state(model: SplitModel) -> dict[str, Tensor]:
    """The state dict that the library's own network loads with `strict=True`.

    Args:
        model: Any model. Networks of ours have the names of torchvision's.

    Returns:
        Tensors by the names of torchvision or timm. Without a classifier where the model has none.

    Raises:
        WeightsError: If the network has no place for the head of the model.
    """
    parts = shapes(model.info, "the model", model.num_features)
    state = dict(model.backbone.state_dict())
    if model.head is not None and not isinstance(model.head, nn.Linear):
        raise WeightsError(
            f"The head of the model ({model.info.head}) normalises features first, for which "
            f"{model.info.arch} has no layer. Export it to ONNX, or take the model's own file."
        )
    network = whole_network(model.info)
    expected = None if network is None else network.state_dict()
    if model.head is not None:
        state |= _head_of(model.head, parts.heads, expected, model.info.arch)
    if expected is not None:
        report = match(expected, state)
        heads = tuple(f"{name}." for name in parts.heads)
        without_head = model.head is None and all(n.startswith(heads) for n in report.missing)
        if report.unexpected or report.misshaped or not (without_head or not report.missing):
            raise WeightsError(
                f"The model cannot be written by the names of {model.info.arch}: "
                f"{report.message()}."
            )
        state = {name: state[name] for name in expected if name in state}
    return state


def _head_of(
    head: nn.Linear, names: tuple[str, ...], expected: dict[str, Tensor] | None, arch: str
) -> dict[str, Tensor]:
    """The classifier by the names of the library, which may average several."""
    if not names:
        raise WeightsError(f"{arch} has no layer for the classifier; take the model's own file.")
    weight, bias = head.weight.detach(), head.bias.detach()
    like = [weight if expected is None else expected[f"{name}.weight"] for name in names]
    sizes = [tensor.flatten(1).shape[1] for tensor in like]
    state: dict[str, Tensor] = {}
    for name, part, old in zip(
        names, torch.split(weight * len(names), sizes, dim=1), like, strict=True
    ):
        state[f"{name}.weight"] = part.reshape(old.shape)
        if expected is None or f"{name}.bias" in expected or bool(bias.any()):
            state[f"{name}.bias"] = bias
    return state


def export_state(model: SplitModel, path: str | Path) -> str:
    """Writes `library_state`, as `.safetensors` or as what `torch.load` reads.

    Returns:
        The SHA-256 of the file's content, in hexadecimal.

    Raises:
        ConfigError: If the ending is another one, or the file exists.
        WeightsError: As `library_state`, or if the file cannot be written.
    """
    path = _new(path)
    if path.suffix not in (SAFETENSORS, *TORCH_SUFFIXES):
        raise ConfigError(f"{printable(path)}: it must end in {SAFETENSORS} or .pth.")
    state = library_state(model)
    if path.suffix == SAFETENSORS:
        return write(state, path, {"format": "pt"})
    return write_torch(state, path)


def export_onnx(model: SplitModel, path: str | Path) -> float:
    """Writes an ONNX file: images (N, 3, H, W) in [0, 1] to logits, or features without a head.

    The normalisation is inside, and N is free. The file gets its name when its answers are those of
    the model.

    Returns:
        The largest difference to an answer of the model, as a share of the largest answer.

    Raises:
        ConfigError: If the packages for ONNX are not installed, or the file exists.
        WeightsError: If the network cannot be exported, or the file answers something else.
    """
    path = _new(path)
    require("onnx", "ONNX")
    training = model.training
    try:
        with replacing(path) as temporary:
            _write_onnx(model.eval(), temporary)
            difference = _difference(model, temporary)
            if not difference <= _CLOSE:
                raise WeightsError(
                    f"{printable(path)}: ONNX answers otherwise than the model, by up to "
                    f"{difference:.2g} of the largest answer, so it is not kept. Use .safetensors."
                )
    except FileError as error:
        raise WeightsError(str(error)) from error
    finally:
        model.train(training)
    return difference


def _write_onnx(model: SplitModel, path: Path) -> None:
    side = model.info.input_size
    images = torch.zeros(2, 3, side, side, device=model.normalize.mean.device)
    whole = _Answers(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on the way in which torch exports
        try:
            torch.onnx.export(
                whole,
                (images,),
                path,
                input_names=["images"],
                output_names=["features" if model.head is None else "logits"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                external_data=False,
                verbose=False,
            )
        except (torch.onnx.errors.OnnxExporterError, RuntimeError, ValueError) as error:
            told = str(error).strip().partition("\n")[0]
            raise WeightsError(
                f"torch cannot write {model.info.arch} as ONNX ({printable(told)}). Use "
                ".safetensors."
            ) from error


class _Answers(nn.Module):
    """Logits, or features without a head.

    Args:
        model: The model.
    """

    def __init__(self, model: SplitModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """Maps images (B, 3, H, W) in [0, 1]."""
        answers: Tensor = (
            self.model.features(images) if self.model.head is None else self.model(images)
        )
        return answers


@torch.no_grad()
def _difference(model: SplitModel, path: Path) -> float:
    """Between the answers of the model and of the file, for batches of two sizes."""
    runtime: Any = importlib.import_module("onnxruntime")
    session = runtime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    side, draw = model.info.input_size, torch.Generator().manual_seed(0)
    worst = 0.0
    for count in (1, 3):
        images = torch.rand(count, 3, side, side, generator=draw)
        (found,) = session.run(None, {"images": images.numpy()})
        expected = _Answers(model)(images.to(model.normalize.mean.device)).cpu()
        off = (torch.from_numpy(found) - expected).abs().max() / expected.abs().max().clamp(1e-6)
        worst = max(worst, float(off)) if bool(off.isfinite()) else float("inf")
    return worst


def export_hub(model: SplitModel, folder: str | Path) -> str:
    """Writes a folder as the Hugging Face Hub lays it out: config.json, weights, README.md.

    timm loads that of a network of timm, by `local-dir:FOLDER` or, once uploaded, `hf-hub:NAME`.
    The weights of other networks are a file of ours, which `load_model` reads. Nothing is uploaded.

    Returns:
        The SHA-256 of the weights, in hexadecimal.

    Raises:
        ConfigError: If the folder exists.
        WeightsError: As `library_state`, or if a file cannot be written.
    """
    folder = _new(folder)
    is_of_timm = model.info.arch.startswith("timm:")
    if is_of_timm:
        state, metadata = library_state(model), {"format": "pt"}
    else:
        state, metadata = dict(model.state_dict()), model.info.to_metadata()
    sha256 = write(state, folder / f"model{SAFETENSORS}", metadata)
    try:
        config = json.dumps(hub_config(model), indent=2)
        write_text(folder / "config.json", f"{config}\n")
        write_text(folder / "README.md", hub_card(model, folder.name))
    except FileError as error:
        raise WeightsError(str(error)) from error
    return sha256


def _new(path: str | Path) -> Path:
    """A path at which nothing is."""
    path = Path(path)
    if path.exists() or path.is_symlink():
        raise ConfigError(f"{printable(path)} exists already; give a new name.")
    return path
