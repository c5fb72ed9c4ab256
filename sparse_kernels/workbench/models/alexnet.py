"""AlexNet-s and -b for 32 x 32 images, as the official sparse momentum code (after SNIP) has them.

Source: Dettmers & Zettlemoyer 2019 (arXiv 1907.04840), official repository, ``AlexNet``.
"""

from __future__ import annotations

from torch import nn

# channels, kernel, stride, padding
_CONVOLUTIONS = ((96, 11, 2, 2), (256, 5, 2, 2), (384, 3, 2, 1), (384, 3, 2, 1), (256, 3, 2, 1))


def _alexnet(hidden: int, num_classes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    channels = 3
    for width, kernel, stride, padding in _CONVOLUTIONS:
        layers += [
            nn.Conv2d(channels, width, kernel, stride, padding),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
        ]
        channels = width
    classifier: list[nn.Module] = []
    features = channels  # 32 -> 13 -> 7 -> 4 -> 2 -> 1 pixel
    for _ in range(2):
        classifier += [
            nn.Linear(features, hidden),
            nn.BatchNorm1d(hidden),
            nn.ReLU(inplace=True),
        ]
        features = hidden
    return nn.Sequential(*layers, nn.Flatten(), *classifier, nn.Linear(features, num_classes))


def alexnet_s(num_classes: int = 10) -> nn.Sequential:
    """Images [N, 3, 32, 32] -> logits [N, num_classes], hidden layers of 1024."""
    return _alexnet(1024, num_classes)


def alexnet_b(num_classes: int = 10) -> nn.Sequential:
    """Images [N, 3, 32, 32] -> logits [N, num_classes], hidden layers of 2048."""
    return _alexnet(2048, num_classes)
