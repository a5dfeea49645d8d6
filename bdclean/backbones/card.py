"""What lies beside the weights on the Hugging Face Hub: config.json and the card."""

from typing import Any

from bdclean.backbones.architectures import is_made_for_a_size
from bdclean.backbones.split import SplitModel


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


def hub_card(model: SplitModel, name: str) -> str:
    """README.md with front matter.

    Args:
        model: The model.
        name: Of the repository, as a title.
    """
    info = model.info
    is_of_timm = info.arch.startswith("timm:")
    task = "image-feature-extraction" if info.num_classes is None else "image-classification"
    classes = "no classifier" if info.num_classes is None else f"{info.num_classes} classes"
    mean, std = (", ".join(f"{value:g}" for value in row) for row in (info.mean, info.std))
    if is_of_timm:
        lines = [
            "import timm",
            "",
            f'model = timm.create_model("hf-hub:USER/{name}", pretrained=True).eval()',
        ]
        images = f"Images are normalised first, with mean ({mean}) and std ({std})."
    else:
        lines = [
            "from bdclean.backbones import load_model",
            "",
            'model = load_model("model.safetensors").eval()',
        ]
        images = "Images are numbers in [0, 1]; the normalisation is part of the model."
    library = "timm" if is_of_timm else "bdclean"
    return "\n".join(
        [
            "---",
            f"library_name: {library}",
            f"pipeline_tag: {task}",
            "tags:",
            f"- {task}",
            f"- {library}",
            "---",
            f"# {name}",
            "",
            f"{info.arch}, {classes}, images of {info.input_size} x {info.input_size} pixels. "
            f"{images}",
            "",
            "```python",
            *lines,
            "```",
            "",
            "Written by bdclean. Whether a model holds a backdoor cannot be proven; nothing here "
            "says that this one holds none.",
            "",
        ]
    )
