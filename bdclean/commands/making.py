"""Makes the models of a command, those of users' own classes among them."""

from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LightningArgumentParser, _InstantiatorFn

from bdclean.commands.parsing import OneDialect
from bdclean.errors import ConfigError
from bdclean.modules import BackdoorModule, StagedModule, Training

# What the __init__ of each class leaves behind.
_MARKS = {
    LightningModule: "_modules",
    BackdoorModule: "_counts",
    StagedModule: "_before",
    Training: "_steps_before",
}


class LightningParser(OneDialect, LightningArgumentParser):  # type: ignore[misc]
    """The parser of the commands of Lightning."""


class ModelMaker(_InstantiatorFn):
    """Makes models as Lightning does, and also those that take no facts of the data."""

    def __call__(
        self,
        class_type: type[Any],
        *args: Any,
        applied_instantiation_links: dict[str, Any],
        **kwargs: Any,
    ) -> Any:
        """Makes one; a link whose target the class does not have is none.

        Raises:
            ConfigError: If the class does not begin with the `__init__` of the one above.
        """
        links = applied_instantiation_links if "facts" in kwargs else {}
        try:
            made = super().__call__(class_type, *args, applied_instantiation_links=links, **kwargs)
        except AttributeError as error:
            if "before Module.__init__() call" not in str(error):
                raise
            raise _unfinished(class_type) from error
        for kind, mark in _MARKS.items():
            if isinstance(made, kind) and mark not in vars(made):
                raise _unfinished(class_type)
        return made


def _unfinished(kind: type[Any]) -> ConfigError:
    return ConfigError(f"{kind.__name__}: its __init__ must begin with super().__init__(...).")
