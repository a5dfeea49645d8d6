"""`bdclean attack preview | export`: what an attack does to a data set, without a model.

Both read the files of `bdclean fit` for data and attack, and overrides such as
`--data.attack.rate 0.01`.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from jsonargparse import Namespace
from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt

from bdclean.commands.attack_export import export
from bdclean.commands.attack_preview import write_preview
from bdclean.commands.parsing import Parser, in_users_words
from bdclean.data import ImageDataModule
from bdclean.errors import ConfigError
from bdclean.shipped import path_of


def run_attack(args: Sequence[str]) -> None:
    """The command.

    Args:
        args: The words after `bdclean attack`.

    Raises:
        ConfigError: If there is no attack, or the result cannot be written.
    """
    parser = make_parser()
    config = parser.parse_args(list(args))
    with in_users_words(lambda: config[config.subcommand]):
        if config.subcommand == "export":
            chosen = parser.instantiate(config).export
            export(chosen.data, chosen.out, test=chosen.test)
            print(f"Written to {chosen.out}; rows.csv and plan.* hold the ground truth")
        else:
            chosen = config.preview
            write_preview(
                _modules(parser, list(args), config),
                chosen.out,
                images=chosen.images,
                amplify=chosen.amplify,
                seed=chosen.seed,
            )


def _modules(
    parser: Parser, words: list[str], config: Namespace
) -> Iterator[tuple[str, ImageDataModule]]:
    """A data module per attack: each file on top of the same words, all parsed beforehand."""
    files, attack = config.preview.attacks, config.preview.data.get("init_args.attack")
    if files and attack is not None:
        raise ConfigError(
            f"--attacks: the data has the attack {attack.class_path} already, which another one "
            "would mix with; leave it out of the files given with -c."
        )
    if files:
        configs = [
            (_title(file), parser.parse_args([*words, "-c", path_of(file, "--attacks")]))
            for file in files
        ]
    else:
        name = "no attack" if attack is None else attack.class_path.rpartition(".")[2]
        configs = [(name, config)]
    for name, each in configs:
        yield name, parser.instantiate(each).preview.data


def _title(file: str) -> str:
    """`badnets/cbd` for attack/badnets/cbd, by name or by path."""
    return "/".join(Path(file).with_suffix("").parts[-2:])


def make_parser() -> Parser:
    """The parser of both commands."""
    parser = Parser(prog="bdclean attack", description="Shows or writes poisoned images.")
    commands = parser.add_subcommands()

    preview = _data_parser(
        "Draws one row per attack: a test image, the same with the trigger, the difference, and "
        "the PSNR of the image and in the mean. A further column shows training images if they "
        "carry another version of the trigger. "
        "Example: bdclean attack preview -c data/digits "
        "--attacks attack/badnets/cbd attack/blend/cbd"
    )
    preview.add_argument(
        "--attacks",
        nargs="+",
        type=str,
        default=[],
        help="Configs of attacks, each on top of the data. Without: the attack given with -c.",
    )
    preview.add_argument("--out", type=str, default="preview.png", help="PNG file to write.")
    preview.add_argument("--images", type=PositiveInt, default=1, help="Test images per attack.")
    preview.add_argument(
        "--amplify", type=PositiveFloat, default=5.0, help="Factor of the difference."
    )
    preview.add_argument("--seed", type=NonNegativeInt, default=0, help="Of the choice of images.")
    commands.add_subcommand("preview", preview, help="A picture of triggers on test images.")

    writer = _data_parser(
        "Writes the poisoned training set as OUT/train/CLASS/NUMBER.png, where CLASS is the label "
        "seen, the test set as OUT/test and, with the trigger, OUT/test_triggered; beside them "
        "the ground truth: rows.csv, the plan and the trigger. "
        "Example: bdclean attack export -c data/digits "
        "-c attack/badnets/cbd --out exported"
    )
    writer.add_argument("--out", type=str, required=True, help="Folder to make; must be new.")
    writer.add_argument("--test", type=bool, default=True, help="Write the test sets as well.")
    commands.add_subcommand("export", writer, help="The poisoned data set as image folders.")
    return parser


def _data_parser(description: str) -> Parser:
    parser = Parser(description=description)
    parser.add_argument(
        "-c", "--config", action="config", help="Config, a name or a file; several stack in order."
    )
    parser.add_argument(
        "--data", type=ImageDataModule, required=True, help="The data set and its attack."
    )
    return parser
