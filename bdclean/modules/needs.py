"""What a method needs to know and to have: the one source for views, records and refusals."""

from dataclasses import dataclass
from typing import Literal

from bdclean.errors import ConfigError
from bdclean.types import Role, View

LabelSource = Literal["train", "clean", "pseudo", "untrusted"]
"""Which labels a method reads: those that the attacker trains on (`train`), correct ones of a few
images (`clean`), its own model's answers (`pseudo`), or those of a data set that may be poisoned
(`untrusted`)."""

ImageSource = Literal["defense", "train", "probe", "none"]
"""The role whose images a method reads first of all."""


@dataclass(frozen=True)
class Needs:
    """What a method needs.

    Attributes:
        labels: Which labels; empty for a method without labels.
        images: Which images.
        head: Whether the suspect must have a classifier head.
        batch_norm: Whether the network must have batch norm layers.
    """

    labels: tuple[LabelSource, ...] = ()
    images: ImageSource = "defense"
    head: bool = False
    batch_norm: bool = False

    @property
    def labels_name(self) -> str:
        """For records and tables: `none`, or the kinds joined by " + "."""
        return " + ".join(self.labels) or "none"

    def check(self, view: View, method: str, *, probes: bool = False) -> None:
        """Checks that a view shows no more than the method has declared.

        Args:
            view: What a stage is about to read.
            method: Its name, for the message.
            probes: Whether the method ends with a linear probe, which reads clean labels.

        Raises:
            ConfigError: If the view shows images of another role, or labels, the method's own
                included.
        """
        allowed = {self.images} | ({"probe"} if probes or "clean" in self.labels else set())
        if view.role not in allowed:
            raise ConfigError(
                f"{method} asks for images of the role {view.role!r}, but declares "
                f"needs.images={self.images!r}."
            )
        own = view.subset is not None and view.subset.labels is not None
        if not own and (not view.labels or (view.role == "probe" and "probe" in allowed)):
            return
        shown: dict[Role, set[LabelSource]] = {
            "train": {"train", "untrusted"},
            "defense": {"clean"},
            "probe": {"clean"},
        }
        if not (shown[view.role] | ({"pseudo"} if own else set())) & set(self.labels):
            asks = "gives labels of its own to" if own else "asks for the labels of"
            raise ConfigError(
                f"{method} {asks} the role {view.role!r}, but declares "
                f"needs.labels={self.labels_name!r}."
            )
