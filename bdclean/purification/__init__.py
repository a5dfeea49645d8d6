"""Purifiers of a model: one file per method, each readable beside its paper."""

from bdclean.purification.base import Purifier as Purifier
from bdclean.purification.projection import Projection as Projection

# isort: split
# One line for each method; `import X as X` offers it here as well.
from bdclean.purification.bcu import BCU as BCU
from bdclean.purification.cbd import CBD as CBD
from bdclean.purification.shortcut import ShortcutDistillation as ShortcutDistillation
