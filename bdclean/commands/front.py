"""What commands share that are a thin front for `bdclean fit`, as `bdclean sift FOLDER` is.

Such a command has a few options of its own and hands all other words to the fit. The user's files
are read, never moved or changed; the run goes into a folder of its own, and the same command again
goes on with it.
"""

import shutil
from argparse import Action
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.pytorch.utilities import rank_zero_only

from bdclean.callbacks import SaveRunConfig
from bdclean.callbacks.products import stranger
from bdclean.commands import lightning
from bdclean.commands.parsing import Parser
from bdclean.commands.words import spelled, values_in
from bdclean.errors import ConfigError
from bdclean.functional.precision import cpu_has_bfloat16
from bdclean.locks import RunLock
from bdclean.runs import RunFolder

Fit = Callable[[list[str]], tuple[Any, Any]]
"""Runs `bdclean fit` with these words and returns model and data."""

Prepare = Callable[[Any, Any], None]
"""Changes model and data of a fit, such as what no word can name."""

CONTINUE = "--ckpt_path=last"


class FrontParser(Parser):
    """The options of a front; all other words are those of `bdclean fit`.

    Args:
        command: Its name.
        place: The words that come first, as the help shows them.
        taken: Options of `bdclean fit` that the front sets itself, and what to do instead.
        kwargs: Of the parser.
    """

    def __init__(self, command: str, place: str, taken: Mapping[str, str], **kwargs: Any) -> None:
        usage = f"bdclean {command} {place} [options]"
        self._own: dict[str, bool] = {}  # whether an option takes a value
        super().__init__(prog=f"bdclean {command}", usage=usage, **kwargs)
        self._command, self._place, self._taken = command, place, taken

    def add_argument(self, *args: Any, **kwargs: Any) -> Action:
        """As jsonargparse's."""
        action: Action = super().add_argument(*args, **kwargs)
        self._own |= dict.fromkeys(action.option_strings, action.nargs != 0)
        return action

    def divide(self, words: Sequence[str]) -> tuple[Namespace, list[str]]:
        """Parses our options; returns them and the words for `bdclean fit`.

        Raises:
            ConfigError: If a word is out of place, or an option is one that the front sets.
        """
        words = spelled(words)
        if {"-h", "--help"} & set(words):
            self.parse_args(["--help"])
        if words and words[0].startswith("-"):
            # Nobody but `bdclean fit` knows which of its options take a value.
            raise ConfigError(
                f"{words[0]} stands where {self._place} is expected; {self._place} comes first: "
                f"bdclean {self._command} {self._place} {words[0]} ..."
            )
        number = len(self._place.split())
        for word in words[1:number]:
            if word.startswith("-"):
                raise ConfigError(
                    f"{word} stands where {self._place} is expected; {self._place} comes first."
                )
        own, others = words[:number], []
        rest = iter(words[number:])
        for word in rest:
            name, equals, _ = word.partition("=")
            if name not in self._own:
                others.append(word)
                continue
            own.append(word)
            if self._own[name] and not equals:
                own += [value for value in (next(rest, None),) if value is not None]
        options = self.parse_args(own)
        self._check(own, others)
        return options, others

    def _check(self, own: Sequence[str], others: Sequence[str]) -> None:
        if others and not others[0].startswith("-"):
            raise ConfigError(
                f"{others[0]!r} is one word too many after {self._place} {own[0]}; give names with "
                "blanks in quotes."
            )
        for word in others:
            name = word.partition("=")[0]
            if name in self._taken:
                raise ConfigError(f"{name}: {self._taken[name]}.")
            near = get_close_matches(name, self._own, n=1, cutoff=0.8)
            near = near or [each for each in self._own if each.startswith(name)]
            if near and word.startswith("--"):
                raise ConfigError(f"{name}: there is no such option. Did you mean {near[0]}?")


class _FrontConfig(SaveRunConfig):
    """The run of a front goes on by itself, and only as it began."""

    may_change = False
    way_out = "Name another folder with --run, or delete that one."


class _FrontCLI(lightning.BdcleanCLI):
    """A fit whose end the front tells."""

    save = _FrontConfig

    def __init__(self, *args: Any, prepare: Prepare | None = None) -> None:
        self._prepare = prepare
        super().__init__(*args)

    def instantiate_classes(self) -> None:
        """Lets the front change model and data before they are used."""
        super().instantiate_classes()
        if self._prepare is not None:
            self._prepare(self.model, self.datamodule)

    def after_fit(self) -> None:
        """Nothing."""


class _FrontWords(_FrontCLI):
    """Words that are read, and values that are tried, and no more."""

    def before_instantiate_classes(self) -> None:
        """Looks at no file."""

    def instantiate_classes(self) -> None:
        """Builds model and data, which refuse values that are wrong."""
        with self.told():
            self.parser.instantiate_classes(self.config)

    def _run_subcommand(self, subcommand: str) -> None:
        """Runs nothing."""


def check_words(words: list[str]) -> Namespace:
    """Refuses words that `bdclean fit` does not know, before seconds of looking at images.

    Args:
        words: Those after `fit`.

    Returns:
        The settings.

    Raises:
        ConfigError: If an option or a value is wrong.
    """
    settings: Namespace = lightning.run("fit", words, _FrontWords, "").config["fit"]
    return settings


def fit(words: list[str], again: str, prepare: Prepare | None = None) -> tuple[Any, Any]:
    """Runs `bdclean fit` and returns model and data.

    Args:
        words: Those after `fit`.
        again: The command of the user, which goes on with a fit that was stopped.
        prepare: Gets model and data before they are used.
    """
    done = lightning.run("fit", words, partial(_FrontCLI, prepare=prepare), again)
    return done.model, done.datamodule


def is_first_process() -> bool:
    """Whether this process prints and copies; others train alone."""
    return getattr(rank_zero_only, "rank", 0) == 0


def as_words(settings: Mapping[str, str]) -> list[str]:
    """Settings as words of a command."""
    return [f"--{key}={value}" for key, value in settings.items()]


def defaults(settings: Mapping[str, str], others: Sequence[str]) -> list[str]:
    """Settings as words, without those that the user gives.

    Args:
        settings: By the keys of `bdclean fit`.
        others: The user's words for it.
    """
    given = {name.lstrip("-") for name, _ in values_in(others)}
    return as_words({key: value for key, value in settings.items() if key not in given})


def fast_precision() -> str:
    """The precision in which this machine trains fast."""
    half = torch.accelerator.is_available() or cpu_has_bfloat16()
    return "bf16-mixed" if half else "32-true"


def going_on(run: Path, others: Sequence[str]) -> list[str]:
    """The word that goes on with a run that was begun; none without one, or where it is given."""
    asked = any(word.partition("=")[0] == "--ckpt_path" for word in others)
    return [CONTINUE] if RunFolder(run).last_checkpoint.is_file() and not asked else []


# ---------------------------------------------------------------------- folders


def check_run(run: Path, places: Iterable[Path]) -> None:
    """Refuses a run folder in which files of the user could be overwritten.

    Args:
        run: As given with `--run`.
        places: The folders of the user.

    Raises:
        ConfigError: If it is no folder, lies in one of theirs, holds files of theirs, or another
            command works in it.
    """
    if not run.name:
        raise ConfigError(f"--run={str(run)!r}: name a folder, new or of a run.")
    above = next(path for path in (run, *run.absolute().parents) if path.exists())
    if not above.is_dir():
        raise ConfigError(f"--run {run}: {above} is a file; name a folder.")
    for place in places:
        if lies_in(run, place):
            raise ConfigError(
                f"--run {run}: it lies in {place}, which stays as it is; name a folder outside."
            )
    RunLock(run).refuse_if_held()
    held = RunFolder(run)
    if not held.is_run and (stranger(held) is not None or held.config.exists()):
        raise ConfigError(
            f"--run {run}: it holds files, but no run of bdclean; name a new or empty folder."
        )


def check_copy(key: str, target: Path, run: Path, places: Iterable[Path]) -> None:
    """Refuses a target of a copy that is in the way.

    Args:
        key: The option, for messages.
        target: The folder that is to be made.
        run: The run folder.
        places: The folders of the user.

    Raises:
        ConfigError: If it exists, or lies in another folder or around it.
    """
    if target.exists() or target.is_symlink():
        raise ConfigError(f"{key} {target}: it exists already; give a new folder.")
    for place in places:
        if lies_in(target, place):
            raise ConfigError(f"{key} {target}: it lies inside {place}; give a folder outside.")
    if lies_in(target, run) or lies_in(run, target):
        raise ConfigError(
            f"{key} {target}: neither it nor --run {run} may lie in the other; give a folder "
            "outside."
        )


def lies_in(path: Path, place: Path) -> bool:
    """Whether `path` is `place` or lies below it, whatever they are called."""
    whole, above = path.resolve(), place.resolve()
    chain = (whole, *whole.parents)
    if not above.exists():
        return above in chain
    # The same folder may have two names: another case, another mount.
    return any(folder.exists() and folder.samefile(above) for folder in chain)


@contextmanager
def beside(key: str, target: Path) -> Iterator[Path]:
    """An empty folder next to `target`, to be renamed; made before hours of training.

    Raises:
        ConfigError: If it cannot be made.
    """
    whole = target.resolve()
    new = [folder for folder in whole.parents if not folder.exists()]  # the innermost first
    try:
        whole.parent.mkdir(parents=True, exist_ok=True)
        temporary = TemporaryDirectory(dir=whole.parent, prefix=f".{whole.name}.")
    except OSError as error:
        raise ConfigError(
            f"{key} {target}: the folder cannot be written ({error.strerror or error}); give "
            "another one."
        ) from error
    try:
        with temporary as name:
            copy = Path(name) / whole.name
            copy.mkdir()
            yield copy
    finally:
        with suppress(OSError):  # it holds something, the copy at best
            for folder in new:
                folder.rmdir()


def _require_room(folder: Path, needed: int) -> None:
    """Raises the error of a full disk before it is full."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"{free / 2**20:,.1f} MiB are free there, and it takes {needed / 2**20:,.1f} MiB"
        )


def copy_files(key: str, source: Path, files: Iterable[str], copy: Path, target: Path) -> None:
    """Copies files into a folder of `beside`, which then gets its name.

    Raises:
        ConfigError: If there is no room for the copy, or it fails.
    """
    files = list(files)
    try:
        _require_room(copy, sum((source / name).stat().st_size for name in files))
        for name in files:
            place = copy / name
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source / name, place)
        copy.replace(target.resolve())
    except OSError as error:
        raise ConfigError(
            f"{key} {target}: the copy failed ({error.strerror or error}); make room and start "
            "the same command again, which does not train again."
        ) from error
