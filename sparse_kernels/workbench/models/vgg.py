"""VGG16-D for 32 x 32 images, as the official sparse momentum code (after SNIP) defines it.

Thirteen 3x3 convolutions with bias, batch norm and ReLU; the classifier is 512, 512, 10 with ReLU
and *then* batch norm, which stands where the original has dropout.
Source: Dettmers & Zettlemoyer 2019 (arXiv 1907.04840), official repository, ``VGG16('D')``.
"""

from __future__ import annotations

from torch import nn

# A number: convolution to so many channels; "M": 2x2 max pooling.
_D = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M")


def _features() -> nn.Sequential:
    layers: list[nn.Module] = []
    channels = 3
    for entry in _D:
        if isinstance(entry, str):
            layers.append(nn.MaxPool2d(kernel_size=2, stride=2))
            continue
        layers += [
            nn.Conv2d(channels, entry, kernel_size=3, padding=1),
            nn.BatchNorm2d(entry),
            nn.ReLU(inplace=True),
        ]
        channels = entry
    return nn.Sequential(*layers)


def vgg16_d(num_classes: int = 10) -> nn.Sequential:
    """Images [N, 3, 32, 32] -> logits [N, num_classes]."""
    classifier = nn.Sequential(
        nn.Linear(512, 512),
        nn.ReLU(inplace=True),
        nn.BatchNorm1d(512),
        nn.Linear(512, 512),
        nn.ReLU(inplace=True),
        nn.BatchNorm1d(512),
        nn.Linear(512, num_classes),
    )
    return nn.Sequential(_features(), nn.Flatten(), classifier)
