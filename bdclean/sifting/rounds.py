"""The rounds of AdvrBD."""

from dataclasses import dataclass

from bdclean.checks import check_not_negative, check_positive, check_share


@dataclass(frozen=True)
class Rounds:
    """The rounds of algorithms 1 and 2, in which D_c grows and f forgets it.

    Attributes:
        count: T.
        of_all: The first so many take the largest scores of all, the others of each label.
        partition_rate: p: so much of all samples, or of each label, joins D_c in a round.
        max_clean_fraction: Share of them at which D_c stops growing.
        candidates: Scored again in each round: so many times p, the largest so far.
        ascent_steps: Fewest steps of a round's ascent; a small D_c is repeated.
        agreement: Considered clean in the end is what fewer of the rounds than this share still
            name,
        label_share: and of each label so much at least; see `fewest_rounds`.

    Raises:
        ConfigError: If a value is out of its range.
    """

    count: int = 8
    of_all: int = 3
    partition_rate: float = 0.02
    max_clean_fraction: float = 0.9
    candidates: int = 4
    ascent_steps: int = 96
    agreement: float = 0.5
    label_share: float = 0.3

    def __post_init__(self) -> None:
        """Checks the values."""
        for name in ("count", "candidates", "ascent_steps"):
            check_positive(f"rounds.{name}", getattr(self, name))
        for name in ("partition_rate", "max_clean_fraction", "agreement", "label_share"):
            check_share(f"rounds.{name}", getattr(self, name))
        check_not_negative("rounds.of_all", self.of_all)
