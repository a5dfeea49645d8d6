"""Whether images are those that a run has begun with: a hash that is cheap to make."""

import hashlib
from pathlib import Path

from bdclean.attacks import PoisonPlan
from bdclean.data.decoding import is_plain
from bdclean.data.images import ImageSet

_LARGEST = 160 << 20  # bytes; 50,000 images of 32 pixels are read whole
_FILES = 1000  # of which the content is read, where its size says little


def identities(
    training: ImageSet | None, defence: ImageSet | None, plan: PoisonPlan | None
) -> dict[str, str]:
    """What a fit reads, by names that users know; None where there is no such thing."""
    sets = {"training images": training, "defence images": defence}
    found = {name: identity(images) for name, images in sets.items() if images is not None}
    return found if plan is None else found | {"poison plan": plan.hash[:16]}


def identity(images: ImageSet) -> str:
    """The number of images, and a hash of what they are.

    Of files, their names below the folder and their sizes are hashed; where all pictures of one
    size have files of one size, so is the content of some. What was decoded is not: another machine
    may decode a picture otherwise. Of images that came as numbers, the numbers are hashed; of many,
    those of every so manieth image. Labels count as well.
    """
    digest = hashlib.sha256(f"v1 {tuple(images.images.shape)}\n".encode())
    if images.labels is not None:
        digest.update(images.labels.numpy().tobytes())
    if images.root is not None and images.files:
        _add_files(digest, images.root, images.files)
    else:
        _add_rows(digest, images)
    return f"{len(images):,} images, {digest.hexdigest()[:16]}"


def _add_files(digest: "hashlib._Hash", root: Path, names: tuple[str, ...]) -> None:
    plain = [name for name in names if is_plain(Path(name))]
    read = set(plain[:: _step(len(plain), _FILES)])
    for name in names:
        file = root / name
        try:
            size, content = file.stat().st_size, file.read_bytes() if name in read else b""
        except OSError:  # the decoded images are in a cache
            size, content = -1, b""
        digest.update(f"{name}\0{size}\n".encode(errors="surrogateescape"))
        digest.update(content)


def _add_rows(digest: "hashlib._Hash", images: ImageSet) -> None:
    if not len(images):
        return
    size = images.images[0].numel()
    rows = images.images[:: _step(len(images) * size, _LARGEST)]
    for start in range(0, len(rows), 4096):
        digest.update(rows[start : start + 4096].contiguous().numpy().tobytes())


def _step(number: int, largest: int) -> int:
    return max(1, -(-number // largest))
