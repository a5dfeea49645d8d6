"""`bdclean attack preview | export`: what an attack does to a data set, without a model.

Both read the files of `bdclean fit` for data and attack, and overrides such as
`--data.attack.rate 0.01`.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from jsonargparse import Namespace
from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt

from bdclean.attacks import Attack
from bdclean.commands.attack_export import export
from bdclean.commands.attack_preview import write_preview
from bdclean.commands.class_help import asked_for, class_page
from bdclean.commands.making import make_attack
from bdclean.commands.parsing import Parser, in_users_words
from bdclean.commands.words import expanded
from bdclean.data import ImageDataModule
from bdclean.errors import ConfigError
from bdclean.shipped import path_of

_EXAMPLES = {
    "preview": "bdclean attack preview -c data/digits --attacks attack/badnets/cbd attack/sig/cbd",
    "export": "bdclean attack export -c data/digits -c attack/badnets/cbd --out exported",
}
_MORE = "docs/how_to/attacks.md"


_MAKERS = [(make_attack, Attack, True)]
"""For jsonargparse: an own attack is made with a look at what it lacks."""


def run_attack(args: Sequence[str]) -> None:
    """The command.

    Args:
        args: The words after `bdclean attack`.

    Raises:
        ConfigError: If there is no attack, or the result cannot be written.
    """
    words = expanded(args)
    if asked_for(words) is not None:
        print(class_page(f"attack {words[0]}", words))
        return
    parser = make_parser()
    config = parser.parse_args(words)
    with in_users_words(lambda: config[config.subcommand]):
        if config.subcommand == "export":
            chosen = parser.instantiate(config, instantiators=_MAKERS).export
            export(chosen.data, chosen.out, test=chosen.test)
            print(f"Written to {chosen.out}; rows.csv and plan.* hold the ground truth")
        else:
            chosen = config.preview
            write_preview(
                _modules(parser, words, config),
                chosen.out,
                images=chosen.images,
                amplify=chosen.amplify,
                seed=chosen.seed,
                overwrite=chosen.overwrite,
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
        yield name, parser.instantiate(each, instantiators=_MAKERS).preview.data


def _title(file: str) -> str:
    """`badnets/cbd` for attack/badnets/cbd, by name or by path."""
    return "/".join(Path(file).with_suffix("").parts[-2:])


def make_parser() -> Parser:
    """The parser of both commands."""
    parser = Parser(
        prog="bdclean attack",
        usage="bdclean attack {preview,export} ...",
        description="Shows or writes poisoned images.",
        example=_EXAMPLES["preview"],
        more=_MORE,
    )
    commands = parser.add_subcommands()
    preview = _data_parser(
        "preview",
        "Draws one row per attack: a test image, the same with the trigger, the difference, and "
        "the PSNR of the image and in the mean. A further column shows training images if they "
        "carry another version of the trigger.",
    )
    add = preview.add_argument
    add(
        "--attacks",
        metavar="NAME",
        nargs="+",
        type=str,
        default=[],
        help="Configs of attacks, each on top of the data. Without: the attack given with -c.",
    )
    add("--out", metavar="FILE", type=str, default="preview.png", help="PNG file to write.")
    add("--overwrite", action="store_true", help="Replace the file if it exists.")
    add("--images", metavar="N", type=PositiveInt, default=1, help="Test images per attack.")
    add("--amplify", metavar="X", type=PositiveFloat, default=5.0, help="Of the difference.")
    add("--seed", metavar="N", type=NonNegativeInt, default=0, help="Of the choice of images.")
    commands.add_subcommand("preview", preview, help="A picture of triggers on test images.")

    writer = _data_parser(
        "export",
        "Writes the poisoned training set as OUT/train/CLASS/NUMBER.png, where CLASS is the label "
        "seen, the test set as OUT/test and, with the trigger, OUT/test_triggered; beside them "
        "the ground truth: rows.csv, the plan and the trigger.",
    )
    add = writer.add_argument
    add("--out", metavar="OUT", type=str, required=True, help="New folder; required.")
    add("--test", type=bool, default=True, help="Write the test sets as well.")
    commands.add_subcommand("export", writer, help="The poisoned data set as image folders.")
    return parser


def _data_parser(name: str, description: str) -> Parser:
    parser = Parser(
        usage=f"bdclean attack {name} -c FILE ... [--data.KEY VALUE ...] [options]",
        description=description,
        epilog=f"`bdclean attack {name} --data.help CLASS` shows the options of a data set; so "
        "does --data.attack.help for an attack.",
        example=_EXAMPLES[name],
        more=_MORE,
    )
    parser.add_argument(
        *("-c", "--config"),
        action="config",
        metavar="FILE",
        help="Config, a name or a file; several stack, and later ones win.",
    )
    parser.add_argument(
        "--data",
        metavar="CLASS",
        type=ImageDataModule,
        required=True,
        help="The data set and its attack, where no config names them.",
    )
    return parser
