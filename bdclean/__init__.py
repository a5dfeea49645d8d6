"""Training, poisoning and label-free purification of image models."""

from importlib.metadata import version

__version__ = version("bdclean")
