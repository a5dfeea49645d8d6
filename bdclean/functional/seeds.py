"""Seeds derived from other numbers, so that every draw is a function of where it happens."""

import hashlib
import os


def derive_seed(*parts: int | str) -> int:
    """Mixes `parts` (for instance seed, epoch, step, rank) into one 63-bit seed.

    Equal parts give equal seeds on every machine; neighbouring parts give unrelated ones.
    """
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def global_seed() -> int | None:
    """The global seed of the process as Lightning set it (`seed_everything`), or None."""
    seed = os.environ.get("PL_GLOBAL_SEED")
    return None if seed is None else int(seed)
