"""A test set that is wrong is told before the training, not after it."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from bdclean.errors import ConfigError
from bdclean.modules import BackdoorModule
from bdclean.modules.reading import data_of
from bdclean.modules.trainer import is_trial


class ReadTestSet(Callback):
    """Has the data module read its test set before a fit that ends with a test.

    By then all `setup` hooks have passed, so that it is known whether the model gets a head.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Calls `setup("test")` of the data module, which tells of what is missing."""
        data = data_of(trainer)
        if data is not None and has_head(pl_module) and not is_trial(trainer):
            data.setup("test")
            if trainer.limit_test_batches == 0:
                raise ConfigError(
                    "trainer.limit_test_batches=0: it must be above 0, or nothing is measured; to "
                    "fit without a test, set --test_after_fit false."
                )


def has_head(module: LightningModule) -> bool:
    """Whether the product of a run can be tested; False for a backbone without a classifier."""
    return not isinstance(module, BackdoorModule) or module.product().head is not None


def has_test_images(data: Any) -> bool:
    """Whether there is a test set; a data module of another package has one."""
    return bool(getattr(data, "has_test_images", True))


def why_untested(module: LightningModule, data: Any, *, wanted: bool) -> str | None:
    """Why a result is not tested; None if it is. What no setting can change comes first.

    Args:
        module: Which made the result.
        data: The data module.
        wanted: Whether the user wants a test after the fit.
    """
    if isinstance(module, BackdoorModule) and module.untested is not None:
        return f"There is no test. {module.untested}"
    if not has_test_images(data):
        return "Nothing was measured: the data has no labelled test images."
    if not has_head(module):
        return (
            "Nothing was measured: the result has no classifier head; train a probe to measure it."
        )
    return None if wanted else "Nothing was measured, because --test_after_fit is false."
