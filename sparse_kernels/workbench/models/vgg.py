"""VGG16 for 32 x 32 images, as the official sparse momentum code (after SNIP) defines it.

Thirteen convolutions with bias, batch norm and ReLU. VGG16-D: all 3x3, classifier 512, 512, 10
with ReLU and *then* batch norm, which stands where the original has dropout. VGG16-C: the third
convolution of each group of three is 1x1 (with padding 1, as that code has it: its images grow by
two pixels, and 2048 features reach the classifier). VGG16-like: D with a single hidden layer.
Source: Dettmers & Zettlemoyer 2019 (arXiv 1907.04840), official repository, ``VGG16``.
"""

from __future__ import annotations

from torch import nn

# A number: 3x3 convolution to so many channels; (channels, 1): 1x1; "M": 2x2 max pooling.
_Entry = int | str | tuple[int, int]
_D: tuple[_Entry, ...] = (
    64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M",
)  # fmt: skip
_C: tuple[_Entry, ...] = (
    64, 64, "M", 128, 128, "M", 256, 256, (256, 1), "M", 512, 512, (512, 1), "M",
    512, 512, (512, 1), "M",
)  # fmt: skip


def _features(entries: tuple[_Entry, ...]) -> nn.Sequential:
    layers: list[nn.Module] = []
    channels = 3
    for entry in entries:
        if isinstance(entry, str):
            layers.append(nn.MaxPool2d(kernel_size=2, stride=2))
            continue
        width, kernel = entry if isinstance(entry, tuple) else (entry, 3)
        layers += [
            nn.Conv2d(channels, width, kernel_size=kernel, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
        ]
        channels = width
    return nn.Sequential(*layers)


def _vgg16(
    entries: tuple[_Entry, ...], features: int, hidden_layers: int, num_classes: int
) -> nn.Sequential:
    classifier: list[nn.Module] = []
    for _ in range(hidden_layers):
        classifier += [nn.Linear(features, 512), nn.ReLU(inplace=True), nn.BatchNorm1d(512)]
        features = 512
    classifier.append(nn.Linear(features, num_classes))
    return nn.Sequential(_features(entries), nn.Flatten(), nn.Sequential(*classifier))


def vgg16_d(num_classes: int = 10) -> nn.Sequential:
    """Images [N, 3, 32, 32] -> logits [N, num_classes]."""
    return _vgg16(_D, 512, 2, num_classes)


def vgg16_c(num_classes: int = 10) -> nn.Sequential:
    """Images [N, 3, 32, 32] -> logits [N, num_classes]; three 1x1 convolutions."""
    return _vgg16(_C, 2048, 2, num_classes)


def vgg16_like(num_classes: int = 10) -> nn.Sequential:
    """Images [N, 3, 32, 32] -> logits [N, num_classes]; one hidden layer in the classifier."""
    return _vgg16(_D, 512, 1, num_classes)
