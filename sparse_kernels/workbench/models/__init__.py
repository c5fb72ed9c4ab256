"""The nets of the experiments by name: how to build one, which data it takes, the paper's settings.

They are ordinary torch modules, written with ``nn.Sequential`` so that ``sparsify`` can prove which
ReLU follows which layer and fuse it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn

from ..errors import WorkbenchError
from .alexnet import alexnet_b, alexnet_s
from .lenet import lenet5_caffe, lenet_300_100
from .mlp import wide_mlp
from .resnet import resnet50
from .vgg import vgg16_c, vgg16_d, vgg16_like
from .wrn import wide_resnet

__all__ = [
    "NETS",
    "NetSpec",
    "alexnet_b",
    "alexnet_s",
    "build",
    "lenet5_caffe",
    "lenet_300_100",
    "resnet50",
    "spec",
    "vgg16_c",
    "vgg16_d",
    "vgg16_like",
    "wide_mlp",
    "wide_resnet",
]


@dataclass(frozen=True)
class NetSpec:
    """One net: its builder, the kind of images it takes, and the settings it is trained with.

    ``defaults`` are fields of ``TrainConfig``; what is not named there keeps that class's default.
    """

    name: str
    build: Callable[..., nn.Module]
    kind: str  # "mnist" (1 x 28 x 28), "cifar10" (3 x 32 x 32) or "imagenet" (3 x 224 x 224)
    input_shape: tuple[int, int, int]
    default_data: str
    defaults: dict[str, Any] = field(default_factory=dict)


_MNIST = {"kind": "mnist", "input_shape": (1, 28, 28), "default_data": "mnist"}
_CIFAR = {"kind": "cifar10", "input_shape": (3, 32, 32), "default_data": "cifar10"}

# Settings: the official scripts (batch 100, 100 epochs, decay every 25,000 steps) for MNIST, the
# paper's runs (250 epochs, batch 128, decay every 30,000 steps) for CIFAR-10.
# For ImageNet: rate 0.1 per 256 images, times 0.1 every 30 epochs of 5,005 steps, prune rate 0.2.
_IMAGENET = {"kind": "imagenet", "input_shape": (3, 224, 224), "default_data": "imagenet"}
_IMAGENET_DEFAULTS = {
    "epochs": 90, "batch_size": 256, "lr_decay_every": 30 * 5005, "weight_decay": 1e-4,
    "prune_rate": 0.2, "augment": True,
}  # fmt: skip
_CIFAR_DEFAULTS = {"epochs": 250, "batch_size": 128, "lr_decay_every": 30_000, "augment": True}
NETS: dict[str, NetSpec] = {
    s.name: s
    for s in (
        NetSpec("lenet-300-100", lenet_300_100, **_MNIST),  # type: ignore[arg-type]
        NetSpec("lenet-5-caffe", lenet5_caffe, **_MNIST),  # type: ignore[arg-type]
        NetSpec("wide-mlp", wide_mlp, **_MNIST),  # type: ignore[arg-type]
        *(
            NetSpec(name, build_net, defaults=_CIFAR_DEFAULTS, **_CIFAR)  # type: ignore[arg-type]
            for name, build_net in (
                ("vgg16-d", vgg16_d),
                ("vgg16-c", vgg16_c),
                ("vgg16-like", vgg16_like),
                ("alexnet-s", alexnet_s),
                ("alexnet-b", alexnet_b),
                ("wrn-16-8", partial(wide_resnet, 16, 8)),
                ("wrn-22-8", partial(wide_resnet, 22, 8)),
                ("wrn-28-2", partial(wide_resnet, 28, 2)),
                ("wrn-16-10", partial(wide_resnet, 16, 10)),
            )
        ),
        NetSpec("resnet-50", resnet50, defaults=_IMAGENET_DEFAULTS, **_IMAGENET),  # type: ignore[arg-type]
    )
}


def spec(name: str) -> NetSpec:
    """The entry of a net. Raises WorkbenchError naming the nets there are."""
    if name not in NETS:
        raise WorkbenchError(f"unknown net {name!r}; expected one of {', '.join(NETS)}")
    return NETS[name]


def build(name: str, **options: Any) -> nn.Module:
    """Build the net ``name``, freshly initialised from torch's global random state.

    ``options`` go to the builder (``width`` and ``hidden_layers`` of ``wide-mlp``); one that the
    builder does not know, or a size that memory does not hold, raises WorkbenchError.
    """
    entry = spec(name)
    try:
        return entry.build(**options)
    except TypeError as error:
        raise WorkbenchError(f"net {name!r} does not take {sorted(options)}: {error}") from error
    except (RuntimeError, MemoryError) as error:
        # torch's allocator; its message goes on for lines about its own sources.
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise WorkbenchError(
            f"net {name!r} with {options or 'its default size'} cannot be built ({reason}); "
            "choose a smaller one (--width)"
        ) from error
