"""The ways in which libraries write the names of a network that are otherwise the same."""

from collections.abc import Mapping

from torch import Tensor, nn

from bdclean.weights import Spelling

# What PyTorch puts into names: data parallel training, and torch.compile.
_INSERTED = ("module", "_orig_mod")


def spellings(expected: Mapping[str, Tensor], backbone: nn.Module) -> tuple[Spelling, ...]:
    """The ways in which libraries write the names of a network, the usual one first.

    Args:
        expected: State dict of the network.
        backbone: The network.
    """

    def usual(name: str) -> str:
        # The CIFAR ResNets of github.com/kuangliu/pytorch-cifar say shortcut for downsample.
        other = name.replace(".shortcut.", ".downsample.")
        return other if other in expected else name

    def without_inserted(name: str) -> str:
        first, dot, others = name.partition(".")
        kept = [part for part in others.split(".") if part not in _INSERTED]
        return usual(f"{first}{dot}{'.'.join(kept)}")

    if not {"conv1.weight", "layer4.0.conv1.weight"} <= expected.keys():
        return usual, without_inserted
    pooling = [True]
    if isinstance(getattr(backbone, "maxpool", None), nn.Identity):
        pooling.append(False)
    return usual, without_inserted, *(_numbered(with_pooling) for with_pooling in pooling)


def _numbered(with_pooling: bool) -> Spelling:
    """For the parts of torchvision's ResNet in an `nn.Sequential`; ReLU and pooling count.

    lightly's own ResNet for CIFAR loses a ReLU when it is taken apart, so that it is another
    network, and its numbers are left to the report of names that do not fit.
    """
    first = 4 if with_pooling else 3
    names = {"0": "conv1", "1": "bn1"} | {str(first + i): f"layer{i + 1}" for i in range(4)}

    def spell(name: str) -> str:
        number, dot, end = name.partition(".")
        return f"{names.get(number, number)}{dot}{end}"

    return spell
