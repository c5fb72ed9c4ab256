"""The one list of layers that benchmarks time, and their counts of work and of bytes."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from ..errors import WorkbenchError

_FLOAT = _INDEX = 4  # bytes
PASSES = ("forward", "dgrad", "wgrad")


@dataclass(frozen=True)
class LayerShape:
    """A layer. ``size``: side of the input image, 0 for a linear layer; ``net``: where it is from.

    ``batch`` is the layer's own batch size; 0 takes that of the command.
    """

    name: str
    rows: int
    columns: int
    kernel: int = 0
    size: int = 0
    stride: int = 1
    net: str = ""
    bias: bool = False
    batch: int = 0

    def dense(self) -> nn.Linear | nn.Conv2d:
        """The dense layer, freshly initialised."""
        if self.size == 0:
            return nn.Linear(self.columns, self.rows, bias=self.bias)
        return nn.Conv2d(
            self.columns, self.rows, self.kernel, self.stride, self.kernel // 2, bias=self.bias
        )

    @property
    def out_size(self) -> int:
        """Side of the output image; 0 for a linear layer."""
        if self.size == 0:
            return 0
        return (self.size + 2 * (self.kernel // 2) - self.kernel) // self.stride + 1

    def input_shape(self, batch: int) -> tuple[int, ...]:
        """[batch, columns] or [batch, columns, size, size]."""
        return (batch, self.columns) + ((self.size, self.size) if self.size else ())

    @property
    def weights(self) -> int:
        """Weights of the dense layer."""
        return self.rows * self.columns * max(1, self.kernel) ** 2

    @property
    def positions(self) -> int:
        """Outputs of one example per row of the weight."""
        return max(1, self.out_size) ** 2

    @property
    def is_wide_3x3(self) -> bool:
        """A 3x3 convolution of 64 channels and more on both sides."""
        return self.kernel == 3 and min(self.rows, self.columns) >= 64


def compulsory_bytes(shape: LayerShape, batch: int, nnz: int) -> dict[str, int]:
    """Bytes that each pass must read or write at least once, values and one index included.

    Everything is counted as if no cache outlived a pass: x and values are read again in backward.
    """
    x = _FLOAT * batch * shape.columns * max(1, shape.size) ** 2
    y = _FLOAT * batch * shape.rows * shape.positions
    values, index = _FLOAT * nnz, _INDEX * nnz
    return {
        "forward": x + y + values + index,
        "dgrad": y + x + values + index,
        "wgrad": y + x + values + index,
        # One pass over grad-output can serve both gradients: it is compulsory once.
        "total": (x + y + values + index) + (y + 2 * x + 2 * values + index),
    }


def _vgg() -> tuple[LayerShape, ...]:
    sizes = (
        (64, 3, 32), (64, 64, 32), (128, 64, 16), (128, 128, 16), (256, 128, 8), (256, 256, 8),
        (512, 256, 4), (512, 512, 4), (512, 512, 2),
    )  # fmt: skip
    convolutions = tuple(
        LayerShape(f"vgg-{c}-{r}-{s}", r, c, 3, s, net="VGG16-D", bias=True) for r, c, s in sizes
    )
    return (*convolutions, LayerShape("vgg-fc-512", 512, 512, net="VGG16-D", bias=True))


def _wrn() -> tuple[LayerShape, ...]:
    # rows, columns, kernel, size, stride; widths 128, 256, 512 of WRN-16-8
    sizes = (
        (16, 3, 3, 32, 1), (128, 16, 3, 32, 1), (128, 16, 1, 32, 1), (128, 128, 3, 32, 1),
        (256, 128, 3, 32, 2), (256, 128, 1, 32, 2), (256, 256, 3, 16, 1),
        (512, 256, 3, 16, 2), (512, 256, 1, 16, 2), (512, 512, 3, 8, 1),
    )  # fmt: skip
    return tuple(_named("wrn", "WRN-16-8", *size) for size in sizes)


def _resnet() -> tuple[LayerShape, ...]:
    # ResNet-50 on 224 x 224, version with the stride in the 3x3 convolution (torchvision's)
    sizes = (
        (64, 3, 7, 224, 2), (64, 64, 1, 56, 1), (64, 64, 3, 56, 1), (256, 64, 1, 56, 1),
        (128, 128, 3, 56, 2), (512, 256, 1, 56, 2), (128, 128, 3, 28, 1), (128, 512, 1, 28, 1),
        (256, 256, 3, 14, 1), (1024, 256, 1, 14, 1), (512, 512, 3, 7, 1), (2048, 512, 1, 7, 1),
    )  # fmt: skip
    return tuple(replace(_named("resnet", "ResNet-50", *size), batch=32) for size in sizes)


def _named(
    prefix: str, net: str, rows: int, columns: int, kernel: int, size: int, stride: int
) -> LayerShape:
    step = "s2" if stride == 2 else ""
    name = f"{prefix}-{columns}-{rows}-{size}-{kernel}x{kernel}{step}"
    return LayerShape(name, rows, columns, kernel, size, stride, net)


_LINEAR = (
    LayerShape("linear-784-300", 300, 784, net="linear", bias=True),
    LayerShape("linear-1024", 1024, 1024, net="linear", bias=True),
    LayerShape("linear-4096", 4096, 4096, net="linear", bias=True),
)

LAYERS = (*_vgg(), *_wrn(), *_resnet(), *_LINEAR)

# The layers whose times for peers were published or measured before: 3x3 at every image size.
CORE = tuple(
    s for s in LAYERS
    if (s.net == "VGG16-D" and s.rows == s.columns and s.size) or s.net == "linear"
)  # fmt: skip

# For rehearsals and CI: odd sizes, seconds instead of minutes.
SMALL = (
    LayerShape("conv-small", 13, 8, 3, 6, net="small", batch=33),
    LayerShape("linear-small", 70, 96, net="small", batch=33),
)
SETS = {"all": LAYERS, "core": CORE, "small": SMALL}


def choose(names: tuple[str, ...], default: str) -> tuple[LayerShape, ...]:
    """The layers called ``names`` (a name or the beginning of names, such as "vgg"), or a set.

    Raises WorkbenchError for a name that fits no layer.
    """
    if not names:
        return SETS[default]
    chosen: list[LayerShape] = []
    for name in names:
        exact = [s for s in (*LAYERS, *SMALL) if s.name == name]
        found = exact or [s for s in LAYERS if s.name.startswith(name)]
        if not found:
            known = ", ".join(s.name for s in (*LAYERS, *SMALL))
            raise WorkbenchError(f"--layer: expected one of {known}; got {name!r}")
        chosen += [shape for shape in found if shape not in chosen]
    return tuple(chosen)
