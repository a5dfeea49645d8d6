"""Writes what `bdclean.backbones.guess` looks architectures up in, from the installed libraries.

    python tests/benchmarks/signatures.py

Takes ten minutes. Run it after a new release of timm or torchvision, and commit the file.
"""

import gzip
import hashlib
import json
import time
import warnings
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
import torchvision
from torch import Tensor, nn

from bdclean.backbones.architectures import (
    Parts,
    canonical,
    is_made_for_a_size,
    make_parts,
    usual_size,
)
from bdclean.backbones.guess import INDEX
from bdclean.backbones.skeleton import shapes
from bdclean.backbones.split import ModelInfo
from bdclean.errors import BdcleanError

HALF = (0.5, 0.5, 0.5)
LARGEST = 150e6  # parameters of networks that are compared by what they compute
TOLERANCE = 1e-4  # of the largest output
PLAIN = (bool, int, float, str, tuple, list, type(None))


@dataclass
class Network:
    """An architecture, by its tensors that do not depend on the size of the images."""

    arch: str
    size: int
    tensors: dict[str, tuple[int, ...]]
    parameters: int

    @property
    def key(self) -> str:
        """Equal for networks with the same names and shapes."""
        return hashlib.sha256(json.dumps(sorted(self.tensors.items())).encode()).hexdigest()

    @property
    def shapes(self) -> Counter[tuple[int, ...]]:
        """How many weights (not biases or statistics) have each shape."""
        return Counter(shape for shape in self.tensors.values() if len(shape) > 1)


def describe(arch: str, size: int) -> ModelInfo:
    return canonical(ModelInfo(arch, None, size, HALF, HALF))


def of_shapes(arch: str, size: int) -> dict[str, Tensor]:
    return shapes(describe(arch, size), arch, 1).backbone.state_dict()


def of_larger_shapes(arch: str, size: int) -> dict[str, Tensor]:
    """As `of_shapes`; a classifier may be there too."""
    library, _, name = arch.partition(":")
    if library != "timm":
        return of_shapes(arch, size)
    with torch.device("meta"):
        state: dict[str, Tensor] = timm.create_model(name, img_size=size).state_dict()
    return state


def network(arch: str) -> Network | None:
    size = usual_size(arch) or 224
    try:
        state = of_shapes(arch, size)
    except (BdcleanError, RuntimeError, TypeError, ValueError, AttributeError, KeyError) as error:
        print(f"{arch}: left out, {error}", flush=True)
        return None
    tensors = {name: tuple(tensor.shape) for name, tensor in state.items()}
    parameters = sum(tensor.numel() for tensor in state.values())
    if is_made_for_a_size(arch):
        try:
            larger = of_larger_shapes(arch, 2 * size)
        except (BdcleanError, RuntimeError, TypeError, ValueError):
            larger = state
        tensors = {
            name: shape
            for name, shape in tensors.items()
            if name in larger and tuple(larger[name].shape) == shape
        }
    return Network(arch, size, tensors, parameters)


def text(parts: Parts) -> str:
    """What its modules are, with their plain attributes: equal for equal functions alone."""
    lines = []
    for name, module in parts.backbone.named_modules():
        values = {k: v for k, v in vars(module).items() if isinstance(v, PLAIN) and k[0] != "_"}
        lines.append(f"{name} {type(module)} {sorted(values.items(), key=str)} {module}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def answers(arch: str, size: int) -> Tensor:
    """Features of a fixed image by a network of fixed weights, in their order."""
    backbone: nn.Module = make_parts(describe(arch, size)).backbone.eval()
    draw = torch.Generator().manual_seed(0)
    for name, tensor in sorted(backbone.state_dict().items()):
        if tensor.is_floating_point():
            fresh = torch.randn(tensor.shape, generator=draw)
            if name.endswith("running_var") or tensor.ndim < 2:
                tensor.copy_(fresh.abs() + 0.5 if name.endswith("var") else fresh * 0.2 + 0.5)
            else:
                tensor.copy_(fresh / max(1, tensor[0].numel()) ** 0.5)
    with torch.no_grad():
        return backbone(torch.rand(1, 3, size, size, generator=draw)).flatten()


def alike(first: Tensor, other: Tensor) -> bool:
    if first.shape != other.shape or not bool(first.isfinite().all() & other.isfinite().all()):
        return False
    return bool((first - other).abs().max() <= TOLERANCE * first.abs().max())


def functions(members: list[Network]) -> list[list[str]]:
    """The networks of equal tensors, those that compute the same together."""
    if len(members) == 1:
        return [[members[0].arch]]
    size = min(each.size for each in members)
    written: dict[str, list[str]] = defaultdict(list)
    for each in members:
        try:
            written[text(shapes(describe(each.arch, size), each.arch, 1))].append(each.arch)
        except (BdcleanError, RuntimeError, TypeError, ValueError):
            written[each.arch].append(each.arch)
    kinds = list(written.values())
    if len(kinds) == 1 or members[0].parameters > LARGEST:
        return kinds
    found: list[tuple[Tensor, list[str]]] = []
    for kind in kinds:
        try:
            output = answers(kind[0], size)
        except (BdcleanError, RuntimeError, TypeError, ValueError):
            output = torch.tensor([float("nan")])
        for other, group in found:
            if alike(other, output):
                group += kind
                break
        else:
            found.append((output, list(kind)))
    return [group for _, group in found]


def main() -> None:
    warnings.simplefilter("ignore")
    known = [f"torchvision:{n}" for n in torchvision.models.list_models(module=torchvision.models)]
    known += [f"timm:{name}" for name in timm.list_models()]
    classes: dict[str, list[Network]] = defaultdict(list)
    start = time.time()
    with ProcessPoolExecutor(2) as pool:
        for number, made in enumerate(pool.map(network, known, chunksize=20)):
            if made is not None:
                classes[made.key].append(made)
            if number % 100 == 0:
                print(number, round(time.time() - start), flush=True)
    numbers: dict[tuple[int, ...], int] = {}
    entries = []
    for members in classes.values():
        for shape in members[0].shapes:
            numbers.setdefault(shape, len(numbers))
        counts = [[numbers[shape], count] for shape, count in members[0].shapes.items()]
        entries.append({"shapes": counts, "functions": functions(members)})
        if len(members) > 1:
            print(round(time.time() - start), entries[-1]["functions"], flush=True)
    content = {
        "timm": timm.__version__,
        "torchvision": torchvision.__version__.partition("+")[0],
        "shapes": list(numbers),
        "networks": entries,
    }
    packed = gzip.compress(json.dumps(content, separators=(",", ":")).encode(), 9, mtime=0)
    target = Path(__file__).parents[2] / "bdclean" / "backbones" / INDEX
    target.write_bytes(packed)
    print(f"{target}: {len(entries)} networks, {len(packed):,} bytes")


if __name__ == "__main__":
    main()
