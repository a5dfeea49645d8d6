"""VGG with batch norm for small images: one linear layer follows the convolutions.

Simonyan and Zisserman, ICLR 2015, as github.com/kuangliu/pytorch-cifar cuts it for CIFAR; its
names.
"""

import torch
from torch import Tensor, nn

# Convolutions between the five max-pools.
DEPTHS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
LEAST_SIDE = 32
"""Pixels; five max-pools leave nothing of smaller images."""


class CifarVGG(nn.Module):
    """A VGG without hidden linear layers that ends after global average pooling.

    Args:
        depth: 11, 13, 16 or 19.
        width: Channels of the first layer, 64 for the published networks.
    """

    def __init__(self, depth: int, width: int = 64) -> None:
        super().__init__()
        self.num_features = 8 * width
        layers: list[nn.Module] = []
        before = 3
        for step, count in enumerate(DEPTHS[depth]):
            channels = width * min(2**step, 8)
            for _ in range(count):
                layers += [nn.Conv2d(before, channels, 3, padding=1), nn.BatchNorm2d(channels)]
                layers += [nn.ReLU(inplace=True)]
                before = channels
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)

    def forward(self, x: Tensor) -> Tensor:
        """Maps normalised images (B, 3, H, W) of at least 32 pixels to features (B, 8 * width)."""
        return torch.flatten(self.avgpool(self.features(x)), 1)
