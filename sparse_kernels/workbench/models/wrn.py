"""Wide residual networks for 32 x 32 images, as the official sparse momentum code builds them.

Pre-activation blocks: norm, ReLU, 3x3 convolution, norm, ReLU, dropout, 3x3 convolution, then the
sum with the input, which a 1x1 convolution brings to size where width or stride change; it takes
the input after norm and ReLU. Convolutions have no bias.
Sources: Zagoruyko & Komodakis 2016 (arXiv 1605.07146); Dettmers & Zettlemoyer 2019 (arXiv
1907.04840), official repository, ``WideResNet``.
"""

from __future__ import annotations

from torch import Tensor, nn

from ..errors import WorkbenchError

_STEM = 16


def _norm_relu(channels: int) -> nn.Sequential:
    # A Sequential of its own, so that sparsify can prove who reads the norm's output.
    return nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU())


class WideBlock(nn.Module):
    """[N, channels, H, W] -> [N, width, H / stride, W / stride]."""

    def __init__(self, channels: int, width: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.first = _norm_relu(channels)
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        rest: list[nn.Module] = [nn.BatchNorm2d(width), nn.ReLU()]
        if dropout > 0:
            rest.append(nn.Dropout(dropout))
        self.second = nn.Sequential(*rest, nn.Conv2d(width, width, 3, 1, 1, bias=False))
        same = channels == width and stride == 1
        self.shortcut = None if same else nn.Conv2d(channels, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """The block's output, in the memory of its last convolution's, which nobody else reads."""
        active = self.first(x)
        residual = x if self.shortcut is None else self.shortcut(active)
        y: Tensor = self.second(self.conv1(active))
        return y.add_(residual)


def wide_resnet(
    depth: int, widen: int, dropout: float = 0.3, num_classes: int = 10
) -> nn.Sequential:
    """WRN-``depth``-``widen``: images [N, 3, 32, 32] -> logits [N, num_classes].

    Three groups of (depth - 4) / 6 blocks with 16, 32 and 64 times ``widen`` channels. Raises
    WorkbenchError for another depth than 6 n + 4.
    """
    if depth < 10 or (depth - 4) % 6 or widen < 1:
        raise WorkbenchError(
            f"wide_resnet: expected depth 6 n + 4 (10, 16, 22, 28, ...) and a widening of at least "
            f"1, got {depth} and {widen}"
        )
    layers: list[nn.Module] = [nn.Conv2d(3, _STEM, 3, 1, 1, bias=False)]
    channels = _STEM
    for group, width in enumerate((16 * widen, 32 * widen, 64 * widen)):
        for block in range((depth - 4) // 6):
            stride = 2 if group > 0 and block == 0 else 1
            layers.append(WideBlock(channels, width, stride, dropout))
            channels = width
    tail = (nn.BatchNorm2d(channels), nn.ReLU(), nn.AvgPool2d(8), nn.Flatten())
    net = nn.Sequential(*layers, *tail, nn.Linear(channels, num_classes))
    _initialise(net)
    return net


def _initialise(net: nn.Module) -> None:
    """He's normal initialisation over the fan-out, norms at (1, 0), the classifier's bias at 0."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
