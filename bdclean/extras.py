"""Packages that only some users need: an extra of the package, or installed one by one."""

from importlib.util import find_spec

from bdclean.errors import ConfigError

EXTRAS = {
    "onnx": ("onnx>=1.17", "onnxruntime>=1.20", "onnxscript>=0.5"),
}
"""What an extra installs, as pyproject.toml lists it; each is imported by its own name."""


def require(extra: str, what: str) -> None:
    """Checks that the packages of an extra are installed.

    Args:
        extra: A name of `EXTRAS`.
        what: Needs them, for the message.

    Raises:
        ConfigError: If some are missing, with the words that install these.
    """
    missing = {
        name: each for each in EXTRAS[extra] if find_spec(name := each.partition(">=")[0]) is None
    }
    if missing:
        listed = " ".join(f"'{each}'" for each in missing.values())
        raise ConfigError(
            f"{what} needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not "
            f"installed: pip install {listed}."
        )
