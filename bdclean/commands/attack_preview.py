"""`bdclean attack preview`: test images with the triggers of attacks, as a picture."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from bdclean.commands.pictures import png_path, save_picture
from bdclean.data import ImageDataModule, RoleImages
from bdclean.errors import ConfigError, counted
from bdclean.figures.triggers import Preview, draw, psnr
from bdclean.functional.seeds import derive_seed

_CHUNK = 100  # images whose errors are summed at a time


def preview(name: str, data: ImageDataModule, images: int = 1, seed: int = 0) -> Preview:
    """Triggers test images.

    The images shown are the first in a random order of the test set that count for the attack's
    success rate; so attacks with the same target show the same images.

    Args:
        name: Of the attack.
        data: The data set with its attack.
        images: How many to show.
        seed: Of the choice.

    Raises:
        ConfigError: There is no attack, or fewer images than asked for.
    """
    if data.attack is None:
        raise ConfigError(f"{name}: --data.attack=null; give attacks with --attacks.")
    data.prepare_data()
    _ = data.plan  # tells of settings that do not fit the data
    triggered = cast(RoleImages, data.test_dataloader()[1].dataset)
    if len(triggered) < images:
        raise ConfigError(
            f"--images is {images}, but only "
            f"{counted(len(triggered), 'test image counts', 'test images count')} for the success "
            f"rate of {name}; ask for no more."
        )
    generator = torch.Generator().manual_seed(derive_seed("preview", seed))
    order = torch.randperm(len(data.test_set), generator=generator)
    chosen = order[torch.isin(order, triggered.rows)][:images]
    clean, stamped = _pairs(triggered, torch.searchsorted(triggered.rows, chosen).tolist())
    count = len(triggered)
    chunks = (range(start, min(start + _CHUNK, count)) for start in range(0, count, _CHUNK))
    return Preview(
        name=name,
        clean=clean,
        triggered=stamped,
        as_trained=_as_trained(data, images, generator),
        psnr=psnr(clean, stamped),
        psnr_all=torch.cat([psnr(*_pairs(triggered, rows)) for rows in chunks]),
    )


def _pairs(images: RoleImages, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The images under the overlay, and as they are handed out."""
    return images.clean(rows), images.shown(rows)


def _as_trained(data: ImageDataModule, images: int, generator: torch.Generator) -> Tensor | None:
    """Poisoned training images that differ from what the test trigger makes of them."""
    plan, trigger = data.plan, data.trigger
    if plan is None or trigger is None or (data.attack is not None and data.attack.dynamic):
        return None
    clean, stored = _pairs(data.role_images("train", labels=True), plan.poison_index.tolist())
    other = stored[(stored != trigger.poison(clean)).flatten(1).any(1)]
    drawn = torch.randperm(len(other), generator=generator)[:images]
    return other[drawn] if len(other) else None


def write_preview(
    modules: Iterable[tuple[str, ImageDataModule]],
    out: str | Path,
    *,
    images: int = 1,
    amplify: float = 5.0,
    seed: int = 0,
    overwrite: bool = True,
) -> None:
    """Writes the picture, and prints one line per attack.

    Args:
        modules: Name of an attack and the data set with it; taken one at a time.
        out: The PNG file.
        images: Test images per attack.
        amplify: Factor of the difference.
        seed: Of the choice of images.
        overwrite: Replace a file that exists.

    Raises:
        ConfigError: An attack is missing, or the file is no PNG, exists or cannot be written.
    """
    out = png_path(out, overwrite=overwrite)
    previews = []
    for name, data in modules:
        previews.append(preview(name, data, images, seed))
        print(previews[-1].summary(), flush=True)
    save_picture(draw(previews, amplify), out)
    print(f"Written to {out}")
