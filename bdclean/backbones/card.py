"""What lies beside the weights on the Hugging Face Hub: config.json and the card."""

from typing import Any

from bdclean.backbones.architectures import is_made_for_a_size
from bdclean.backbones.loading_lines import load_call
from bdclean.backbones.split import ModelInfo, SplitModel
from bdclean.errors import counted
from bdclean.files import SAFETENSORS
from bdclean.markdown import code_block, plain


def hub_config(model: SplitModel) -> dict[str, Any]:
    """config.json as timm writes it; for networks of others with the library's name."""
    info = model.info
    library, _, name = info.arch.rpartition(":")
    is_of_timm = library == "timm"
    config: dict[str, Any] = {
        "architecture": name if is_of_timm else info.arch,
        "num_classes": info.num_classes or 0,
        "num_features": model.num_features,
    }
    if is_of_timm and is_made_for_a_size(info.arch):
        config["model_args"] = {"img_size": info.input_size}
    if not is_of_timm:
        config |= {"library": "bdclean", "width": info.width, "stem": info.stem, "head": info.head}
    config["pretrained_cfg"] = {
        **(_of_timm(name) if is_of_timm else {}),
        "input_size": [3, info.input_size, info.input_size],
        "mean": list(info.mean),
        "std": list(info.std),
        "num_classes": info.num_classes or 0,
        "custom_load": False,
    }
    return config


def _of_timm(name: str) -> dict[str, Any]:
    """What timm needs to know of an architecture to load and to prepare images."""
    import timm

    settings = timm.get_pretrained_cfg(name)
    keys = ("interpolation", "crop_pct", "fixed_input_size", "pool_size", "first_conv")
    found = {key: getattr(settings, key, None) for key in (*keys, "classifier")}
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in found.items()
        if value is not None
    }


def in_short(info: ModelInfo) -> str:
    """Architecture, classes and images, in words."""
    classes = info.num_classes
    head = "no classifier" if classes is None else counted(classes, "class", "classes")
    return f"{info.arch}, {head}, images of {info.input_size} pixels"


def normalisation(info: ModelInfo) -> str:
    """Mean and std, in words."""
    mean, std = (", ".join(f"{value:.4g}" for value in row) for row in (info.mean, info.std))
    return f"mean {mean}, std {std}"


def images_taken(info: ModelInfo, *, inside: bool) -> str:
    """What is done to images first, in a sentence.

    Args:
        info: Of the model.
        inside: Whether the normalisation is part of what was written.
    """
    if inside:
        return "It takes images in [0, 1]; the normalisation is inside."
    mean, std = (", ".join(f"{value:g}" for value in row) for row in (info.mean, info.std))
    return f"It takes normalised images: mean ({mean}), std ({std}) of pixels in [0, 1]."


def hub_card(model: SplitModel, name: str) -> str:
    """README.md with front matter.

    Args:
        model: The model.
        name: Of the repository, as a title.
    """
    info = model.info
    is_of_timm = info.arch.startswith("timm:")
    task = "image-feature-extraction" if info.num_classes is None else "image-classification"
    library = "timm" if is_of_timm else "bdclean"
    if is_of_timm:
        made = f"timm.create_model({f'hf-hub:USER/{name}'!r}, pretrained=True)"
        code = f"import timm\n\nmodel = {made}.eval()"
    else:
        call = load_call(f"model{SAFETENSORS}", info.arch)
        code = f"from bdclean.backbones import load_model\n\nmodel = {call}.eval()"
    front = ["---", f"library_name: {library}", f"pipeline_tag: {task}", "tags:", f"- {task}"]
    return "\n".join(
        [
            *front,
            f"- {library}",
            "---",
            f"# {plain(name)}",
            "",
            f"{plain(in_short(info))}. {images_taken(info, inside=not is_of_timm)}",
            "",
            code_block(code),
            "",
            "Written by bdclean. Whether a model holds a backdoor cannot be proven; nothing here "
            "says that this one holds none.",
            "",
        ]
    )
