"""`bdclean figure tsne RUN...`: features in the plane, before and after a run.

The picture of figure 1 of CBD: clean test images of all classes, test images with the trigger,
and contrastive adversarial versions of clean ones (eq. 1), as one t-SNE for each model. Backbones
without a head and classifiers are alike here. Labels colour the points and do nothing else.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from bdclean.backbones import SplitModel, load_model
from bdclean.backbones.perturber import Perturber
from bdclean.backbones.source import WeightsSource
from bdclean.commands.own_modules import allow
from bdclean.commands.parsing import Parser
from bdclean.commands.pictures import png_path, save_picture
from bdclean.data import ImageDataModule
from bdclean.errors import ConfigError, counted
from bdclean.figures.features import FeatureMap, feature_map, plot_features
from bdclean.functional.contrastive import nt_xent
from bdclean.functional.pgd import PGD, pgd
from bdclean.functional.seeds import derive_seed
from bdclean.printable import printable
from bdclean.progress import follow
from bdclean.runs import RunFolder

_CHUNK = 100  # images at a time
_EXAMPLE = "bdclean figure tsne runs/cbd --out tsne.png"


def run_figure(args: Sequence[str]) -> None:
    """The command.

    Args:
        args: The words after `bdclean figure`.

    Raises:
        ConfigError: If a run has no test images, trigger or weights, or the picture cannot be
            written.
    """
    chosen = make_parser().parse_args(list(args)).tsne
    out = png_path(chosen.out, overwrite=chosen.overwrite)
    maps = []
    runs = [RunFolder(Path(folder)) for folder in dict.fromkeys(chosen.runs)]
    allow([run.read_config() for run in runs])  # a folder without a run is told at once
    for run in runs:
        data = make_data(run)
        images = choose(data, chosen)
        target = None if data.attack is None else data.attack.single_target()
        for title, model in models(run, run.read_config()):
            maps.append(draw_map(title, model, images, chosen, target))
            print(f"{printable(title)}: {counted(len(maps[-1].clean), 'clean image')}", flush=True)
    save_picture(plot_features(maps), out)
    print(f"Written to {out}")


def make_parser() -> Parser:
    """The parser of the command."""
    more = "docs/how_to/figures.md"
    parser = Parser(
        prog="bdclean figure",
        usage="bdclean figure {tsne} ...",
        description="Draws the pictures of the papers.",
        example=_EXAMPLE,
        more=more,
    )
    commands = parser.add_subcommands()
    tsne = Parser(
        usage="bdclean figure tsne RUN [RUN ...] [options]",
        description="Draws features of clean, triggered and contrastive adversarial test images by "
        "t-SNE: a panel for the model that each run started from, if it had one, and a panel for "
        "its product.",
        example=_EXAMPLE,
        more=more,
    )
    add = tsne.add_argument
    add("runs", metavar="RUN", nargs="+", type=str, help="Folders that `bdclean fit` has written.")
    add("--out", metavar="FILE", type=str, default="tsne.png", help="PNG file to write.")
    add("--overwrite", action="store_true", help="Replace the file if it exists.")
    add("--clean", metavar="N", type=PositiveInt, default=1000, help="Clean test images.")
    add("--triggered", metavar="N", type=PositiveInt, default=500, help="With the trigger.")
    add("--adversarial", metavar="N", type=NonNegativeInt, default=500, help="Adversarial ones.")
    add("--epsilon", metavar="E", type=NonNegativeFloat, default=8.0, help="8-bit pixel values.")
    add("--pgd_steps", metavar="N", type=PositiveInt, default=20, help="Of PGD.")
    add("--temperature", metavar="T", type=PositiveFloat, default=0.5, help="Of its loss.")
    add("--perplexity", metavar="P", type=PositiveFloat, default=30.0, help="Of the t-SNE.")
    add("--seed", metavar="N", type=NonNegativeInt, default=0, help="Of choice, PGD and t-SNE.")
    commands.add_subcommand("tsne", tsne, help="Features in the plane.")
    return parser


def make_data(run: RunFolder) -> ImageDataModule:
    """The data module of a run, its test set at hand.

    Raises:
        ConfigError: If the run had no attack.
    """
    data = run.make_data()
    if data.attack is None:
        raise ConfigError("data.attack: the run had no attack, so there is no trigger to show.")
    data.setup("test")
    return data


def choose(data: ImageDataModule, chosen: Namespace) -> dict[str, Tensor]:
    """Test images, uint8 (N, 3, H, W): `clean` with `labels`, `triggered` and `adversarial`.

    Those that become adversarial are clean images of the first group or others.
    """
    draw = torch.Generator().manual_seed(derive_seed("figure", chosen.seed))
    clean, triggered = data.test_dataloader()[:2]
    groups = {}
    for name, loader, count in (
        ("clean", clean, chosen.clean),
        ("triggered", triggered, chosen.triggered),
        ("adversarial", clean, chosen.adversarial),
    ):
        images, labels = (torch.cat([b[key] for b in loader]) for key in ("image", "label"))
        rows = torch.randperm(len(images), generator=draw)[:count].sort().values
        groups[name] = images[rows]
        if name == "clean":
            groups["labels"] = labels[rows]
    return groups


def models(run: RunFolder, config: dict[str, Any]) -> list[tuple[str, SplitModel]]:
    """The model that a run started from, if it had one and its file is there, and its product.

    A file that is not there is told of on standard error.

    Raises:
        ConfigError: If the run has no product yet.
    """
    if not run.weights.is_file():
        raise ConfigError(f"{run.path}: there is no model.safetensors; let the run end first.")
    given = config["model"].get("init_args", {})
    after = load_model(run.weights, arch=given.get("arch"))
    name = run.path.name
    found = [(f"{name}: after", after)]
    info = after.info
    source = WeightsSource(
        given.get("weights"),
        given.get("arch"),
        given.get("width"),
        info.input_size,
        info.mean,
        info.std,
        given.get("stem"),
    )
    if source.is_there:
        found.insert(0, (f"{name}: before", source.load()))
    elif source.weights is not None:
        print(
            printable(f"{name}: no panel of the model before, as {source.weights} is not there."),
            file=sys.stderr,
        )
    return found


def draw_map(
    title: str,
    model: SplitModel,
    images: dict[str, Tensor],
    chosen: Namespace,
    target: int | None = None,
) -> FeatureMap:
    """Features of all groups, and one t-SNE of them."""
    model.eval()
    groups = {name: images[name] for name in ("clean", "triggered", "adversarial")}
    pixels = {name: group.float() / 255 for name, group in groups.items() if len(group)}
    if "adversarial" in pixels:
        pixels["adversarial"] = perturb(model, pixels["adversarial"], chosen, title)
    features = {
        name: _features(model, group, f"{title}: {name} features") for name, group in pixels.items()
    }
    count = sum(map(len, features.values()))
    if chosen.perplexity >= count:
        raise ConfigError(f"--perplexity={chosen.perplexity}: it must be below the {count} points.")
    print(f"{title}: t-SNE of {count:,} points", file=sys.stderr, flush=True)
    return feature_map(
        title,
        features,
        images["labels"],
        chosen.seed,
        perplexity=chosen.perplexity,
        target=target,
    )


def perturb(model: SplitModel, images: Tensor, chosen: Namespace, title: str = "") -> Tensor:
    """Versions of `images` (N, 3, H, W) that leave their own features, by eq. (1) of CBD."""
    settings = PGD(chosen.epsilon, chosen.pgd_steps)
    perturber = Perturber(model)

    def move(chunk: Tensor) -> Tensor:
        with torch.no_grad():
            fixed = perturber.features(chunk)
        return pgd(
            chunk, lambda x: nt_xent(perturber.features(x), fixed, chosen.temperature), settings
        )

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed("figure, attack", chosen.seed))
        return _in_chunks(move, images, f"{title}: adversarial images")


@torch.no_grad()
def _features(model: SplitModel, images: Tensor, what: str) -> Tensor:
    return _in_chunks(model.features, images, what)


def _in_chunks(work: Callable[[Tensor], Tensor], images: Tensor, what: str) -> Tensor:
    """What `work` makes of all images, chunk by chunk; shows how far it is if that takes long."""
    done: list[Tensor] = []

    def counts() -> Iterator[int]:
        for chunk in _chunks(images):
            done.append(work(chunk))
            yield len(chunk)

    follow(counts(), len(images), what, brief=True)
    return torch.cat(done)


def _chunks(images: Tensor) -> list[Tensor]:
    """Sizes differ by one at most: an image by itself would have no negatives in `perturb`."""
    return list(images.tensor_split(-(-len(images) // _CHUNK)))
