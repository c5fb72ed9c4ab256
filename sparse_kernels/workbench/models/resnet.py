"""ResNet-50 for images of 224 x 224 and 1,000 classes: the net of the paper's ImageNet runs.

The common version, whose bottlenecks stride in their 3x3 convolution. Convolutions have no bias.
Source: He, Zhang, Ren & Sun 2016 (arXiv 1512.03385).
"""

from __future__ import annotations

from torch import Tensor, nn

_EXPANSION = 4
_STEM = 64
_STAGES = (3, 4, 6, 3)


def _conv_norm(channels: int, width: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(channels, width, kernel, stride, kernel // 2, bias=False)
    return [conv, nn.BatchNorm2d(width)]


class Bottleneck(nn.Module):
    """[N, channels, H, W] -> [N, 4 width, H / stride, W / stride]: 1x1, 3x3 and 1x1 convolution.

    The sum with the input, which a 1x1 convolution brings to size where width or stride change,
    comes before the last ReLU.
    """

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        out = _EXPANSION * width
        # Sequentials, so that sparsify can prove which ReLU reads which norm.
        self.body = nn.Sequential(
            *_conv_norm(channels, width, 1),
            nn.ReLU(),
            *_conv_norm(width, width, 3, stride),
            nn.ReLU(),
            *_conv_norm(width, out, 1),
        )
        same = channels == out and stride == 1
        self.shortcut = None if same else nn.Sequential(*_conv_norm(channels, out, 1, stride))
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """The block's output, in the memory of its last norm's, which nobody else reads."""
        y: Tensor = self.body(x)
        return self.relu(y.add_(x if self.shortcut is None else self.shortcut(x)))


def resnet50(num_classes: int = 1000) -> nn.Sequential:
    """ResNet-50: images [N, 3, 224, 224] -> logits [N, num_classes]."""
    layers = [*_conv_norm(3, _STEM, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    channels = _STEM
    for stage, blocks in enumerate(_STAGES):
        width = _STEM * 2**stage
        for block in range(blocks):
            layers.append(Bottleneck(channels, width, 2 if stage and not block else 1))
            channels = _EXPANSION * width
    net = nn.Sequential(*layers, nn.AvgPool2d(7), nn.Flatten(), nn.Linear(channels, num_classes))
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return net
