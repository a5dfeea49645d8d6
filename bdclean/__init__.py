"""Training, poisoning and label-free purification of image models."""

__version__: str


def __getattr__(name: str) -> str:
    """The version, read when it is asked for: `python -m bdclean` begins in the user's folder."""
    if name != "__version__":
        raise AttributeError(f"module 'bdclean' has no attribute {name!r}")
    from importlib.metadata import version

    return version("bdclean")
