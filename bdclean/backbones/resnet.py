"""ResNet-18 and ResNet-34 without a classifier, for small and for large images.

He et al., "Deep Residual Learning for Image Recognition", CVPR 2016. Blocks and parameter names
are torchvision's, so that their weights fit; the stem and the width can be chosen.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, conv1x1

from bdclean.errors import ConfigError

ResNetStem = Literal["cifar", "imagenet"]


class ResNet(nn.Module):
    """A residual network of basic blocks that ends after global average pooling.

    Args:
        blocks: Blocks in each of the four layers, for example (2, 2, 2, 2) for ResNet-18.
        width: Channels of the first layer; each further layer has twice as many. 64 is the
            published network.
        stem: "imagenet" is a 7x7 convolution of stride 2 and a max-pool; "cifar" is a 3x3
            convolution of stride 1 without pooling, as He et al. and SimCLR use it at 32 pixels.

    Raises:
        ConfigError: If `width` is below 1.
    """

    def __init__(
        self, blocks: tuple[int, int, int, int], width: int = 64, stem: ResNetStem = "cifar"
    ) -> None:
        super().__init__()
        if width < 1:
            raise ConfigError(f"width={width}: it must be at least 1.")
        self.num_features = 8 * width
        if stem == "cifar":
            self.conv1 = nn.Conv2d(3, width, kernel_size=3, padding=1, bias=False)
            self.maxpool: nn.Module = nn.Identity()
        else:
            self.conv1 = nn.Conv2d(3, width, kernel_size=7, stride=2, padding=3, bias=False)
            self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _layer(width, width, blocks[0], stride=1)
        self.layer2 = _layer(width, 2 * width, blocks[1], stride=2)
        self.layer3 = _layer(2 * width, 4 * width, blocks[2], stride=2)
        self.layer4 = _layer(4 * width, 8 * width, blocks[3], stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self._initialise()

    def forward(self, x: Tensor) -> Tensor:
        """Maps normalised images (B, 3, H, W) to features (B, 8 * width)."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return torch.flatten(self.avgpool(x), 1)

    def _initialise(self) -> None:
        # As torchvision: He et al. (2015), fan-out; batch norm keeps its ones and zeros.
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def _layer(inputs: int, outputs: int, blocks: int, stride: int) -> nn.Sequential:
    shortcut = None
    if stride != 1 or inputs != outputs:
        shortcut = nn.Sequential(conv1x1(inputs, outputs, stride), nn.BatchNorm2d(outputs))
    first = BasicBlock(inputs, outputs, stride, shortcut)
    return nn.Sequential(first, *(BasicBlock(outputs, outputs) for _ in range(blocks - 1)))


def resnet18(width: int = 64, stem: ResNetStem = "cifar") -> ResNet:
    """ResNet-18 without classifier; see `ResNet`."""
    return ResNet((2, 2, 2, 2), width, stem)


def resnet34(width: int = 64, stem: ResNetStem = "cifar") -> ResNet:
    """ResNet-34 without classifier; see `ResNet`."""
    return ResNet((3, 4, 6, 3), width, stem)
