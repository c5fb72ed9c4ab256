"""What the benchmarks of whole nets share: data, the check against masked dense, the account."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from itertools import chain, repeat
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...nn import densify
from ...nn.base import COMPRESSED, SparseLayer
from .. import account, models
from ..config import TrainConfig
from ..contenders import Contender
from ..datasets import BatchLoader, Dataset, Split, hold_out, load
from ..errors import WorkbenchError
from .contest import relative_error, results_of, weight_gradient

# MNIST and CIFAR-10 less the tenth that is held out; ImageNet is validated on images of its own.
EXAMPLES = {"mnist": 54_000, "cifar10": 45_000, "imagenet": 1_281_167}
_MOST_BYTES = 8 << 30  # of random images
FAR = 1_000_000  # steps to the first mask update: no window is entered
SEED = 0
# Of each layer inside the net, on its own input and gradient: float32 against float32.
_LAYER_TOLERANCE = 1e-4
# Of the whole net rounding is amplified, and a ReLU or a maximum near a tie goes the other way.
_LOGITS_TOLERANCE, _GRADIENT_FLOOR, _TIMES_ROUNDING = 1e-3, 0.05, 20.0
# Share of the layers whose gradient may be beyond dense float32 itself (see check_net).
_MOST_UNDETERMINED = 0.25
UNDETERMINED = "undetermined layers"
_WEIGHTS = "weight gradients"


def random_batch(config: TrainConfig) -> tuple[Tensor, Tensor]:
    """Images float32 [batch, C, H, W] and labels int64 [batch], by a fixed seed."""
    generator = torch.Generator().manual_seed(SEED)
    shape = (config.batch_size, *models.spec(config.net).input_shape)
    labels = torch.randint(0, 10, (shape[0],), generator=generator)
    return torch.randn(shape, generator=generator), labels


def epoch_steps(config: TrainConfig) -> int:
    """Steps of an epoch over the training data less the tenth that is held out."""
    return math.ceil(EXAMPLES[models.spec(config.net).kind] / config.batch_size)


def dataset_of(config: TrainConfig, examples: int | None = None) -> Dataset:
    """The net's data set from --data-dir, or random images in its format, held-out part removed.

    ``examples``: at most so many training images.
    """
    entry = models.spec(config.net)
    if config.data_dir is not None:
        data = load(entry.default_data, config.data_dir)
        train, _ = hold_out(data.train, config.holdout, SEED)
    else:
        generator = torch.Generator().manual_seed(SEED)
        size = (min(EXAMPLES[entry.kind], examples or EXAMPLES[entry.kind]), *entry.input_shape)
        if math.prod(size) > _MOST_BYTES:
            raise WorkbenchError(
                f"{config.net}: {size[0]:,} random images of {entry.kind}'s shape take "
                f"{math.prod(size) / 1e9:.0f} GB; time single steps, without --epoch"
            )
        images = torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)
        train = Split(images, torch.randint(0, 10, (size[0],), generator=generator))
        channels = entry.input_shape[0]
        data = Dataset("random", entry.kind, train, train, (0.5,) * channels, (0.25,) * channels,
                       "random images")  # fmt: skip
    if examples is not None:
        train = train.select(torch.arange(min(examples, len(train))))
    # Results are published: they name the data, not where somebody keeps them.
    source = data.source if config.data_dir is None else f"{data.name} of --data-dir"
    return Dataset(data.name, data.kind, train, data.test, data.mean, data.std, source)


def loader_of(data: Dataset, config: TrainConfig) -> BatchLoader:
    """The training loop's own loader, shuffled by the fixed seed, without augmentation."""
    return BatchLoader(data.train, data, config.batch_size, seed=SEED)


def endless(loader: BatchLoader) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of epoch after epoch."""
    return chain.from_iterable(repeat(loader))


def sparse_layers(model: nn.Module) -> dict[str, SparseLayer]:
    """The sparse layers by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, SparseLayer)}


def stored_blocks(model: nn.Module) -> dict[str, int]:
    """Stored blocks by layer; of a layer that is stored dense-masked those of its mask."""
    return {
        name: _as_compressed(layer).pattern.nnzb for name, layer in sparse_layers(model).items()
    }


def _as_compressed(layer: SparseLayer) -> SparseLayer:
    return layer if layer.storage == COMPRESSED else copy.deepcopy(layer).to_storage_(COMPRESSED)


def check_counts(contender: Contender, start: dict[str, int]) -> None:
    """Raise WorkbenchError unless every layer holds the blocks it started with.

    Where redistribution moves weights between layers the sum must hold.
    """
    now = stored_blocks(contender.model)
    if contender.config.redistribution == "none":
        wrong = [name for name in start if now[name] != start[name]]
        if wrong:
            listed = ", ".join(f"{n}: {start[n]} -> {now[n]}" for n in wrong)
            raise WorkbenchError(f"--redistribution none: the layers' blocks changed ({listed})")
        return
    if sum(now.values()) != sum(start.values()):
        raise WorkbenchError(
            f"the net's blocks changed from {sum(start.values())} to {sum(now.values())}, expected "
            "the same number after every mask update"
        )


def check_density(contender: Contender) -> None:
    """Raise WorkbenchError unless each layer has the asked share of blocks, to one or one per cent.

    Blocks, not elements: a block at the edge of a matrix that it does not divide covers fewer.
    For a net that has not been updated yet, uniform distribution.
    """
    config = contender.config
    if config.distribution != "uniform":
        return
    for name, layer in sparse_layers(contender.model).items():
        pattern = layer.pattern
        blocks = pattern.block_rows * pattern.block_cols
        wanted = config.density * blocks
        if abs(pattern.nnzb - wanted) > max(1.0, 0.01 * wanted):
            raise WorkbenchError(
                f"{name}: expected {wanted:.0f} of {blocks} blocks (density {config.density:g}), "
                f"got {pattern.nnzb}; a pattern of another density is not timed"
            )


def check_net(model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, float]:
    """The sparse net against the masked dense net on one batch, layer by layer and as a whole.

    Returns the largest relative errors: of any layer's output, dx and dvalues on the input and
    gradient that it meets in the net; of logits, input gradient and weight gradients of the net;
    and "rounding", the largest of the latter when the dense net's images change by their last bit:
    a ReLU near zero then goes the other way. Dropout is off. Raises WorkbenchError if a layer is
    off by more than 1e-4, the logits by 1e-3 or a gradient of the net by 5 % and 20 times the
    rounding (50 % at most). A weight gradient of the net that dense float32 itself misses by more
    than 5 % of float64's is no reference; it is left to the check of its layer and counted as
    "undetermined layers", of which there may be a quarter.
    """
    images, labels = batch
    sparse = copy.deepcopy(model)
    met = _watch(sparse)
    ours = _gradients(sparse, images.clone(), labels, model)
    errors = _check_layers(model, met)
    met.clear()
    dense = densify(copy.deepcopy(model))
    reference = _gradients(dense, images.clone(), labels, model)
    # Not dense in channels_last: torch's batch norm there loses digits where the variance is small.
    ulp = torch.finfo(images.dtype).eps * torch.randn(images.shape, generator=_noise())
    again = _gradients(dense, images * (1 + ulp), labels, model)
    rounding = max(_worst(again, reference).values())
    limit = min(0.5, max(_GRADIENT_FLOOR, _TIMES_ROUNDING * rounding))
    suspects = [
        name for name, value in ours.items()
        if name.startswith(_WEIGHTS) and not relative_error(value, reference[name]) <= limit
    ]  # fmt: skip
    if suspects:
        wide = _gradients(dense.double(), images.double(), labels, model)
        lost = _undetermined(suspects, reference, wide, len(sparse_layers(model)))
        ours = {name: value for name, value in ours.items() if name not in lost}
        errors[UNDETERMINED] = float(len(lost))
    own = _worst(ours, reference)
    for what, error in own.items():
        _expect(error, _LOGITS_TOLERANCE if what == "logits" else limit, f"the net's {what}")
    return {**errors, **own, "rounding": rounding}


def _undetermined(
    suspects: list[str], reference: dict[str, Tensor], wide: dict[str, Tensor], layers: int
) -> list[str]:
    """Those of the suspects whose dense float32 gradient is no reference; none if too many are.

    A filter whose weights have all just been grown puts out a constant: the norm divides rounding
    by the root of its epsilon, and the ReLU behind it passes or stops the gradient by chance.
    """
    lost = [n for n in suspects if relative_error(reference[n], wide[n]) > _GRADIENT_FLOOR]
    return lost if len(lost) <= _MOST_UNDETERMINED * layers else []


def _noise() -> torch.Generator:
    return torch.Generator().manual_seed(SEED)


def _expect(error: float, limit: float, what: str) -> None:
    if not error <= limit:
        raise WorkbenchError(
            f"{what}: differs from masked dense by {error:.1e} (relative), expected at most "
            f"{limit:.1e}; a wrong net is not timed"
        )


def _watch(net: nn.Module) -> dict[str, list[Tensor]]:
    """Let the net's sparse layers note their input and the gradient of their output, by name."""
    met: dict[str, list[Tensor]] = {}
    for name, layer in sparse_layers(net).items():

        def note(_: nn.Module, inputs: Any, output: Tensor, name: str = name) -> None:
            met[name] = [inputs[0].detach()]
            output.register_hook(lambda grad: met[name].append(grad))

        layer.register_forward_hook(note)
    return met


def _check_layers(model: nn.Module, met: dict[str, list[Tensor]]) -> dict[str, float]:
    worst: dict[str, float] = {}
    for name, layer in sparse_layers(model).items():
        x, grad = met.pop(name)
        ours = results_of(copy.deepcopy(layer), x, grad, layer)
        reference = results_of(layer.to_dense(), x.contiguous(), grad.contiguous(), layer)
        for key, value in ours.items():
            error = relative_error(value, reference[key])
            if not error <= _LAYER_TOLERANCE:
                # Sums that nearly cancel: then dense float32 is as far from float64 as we are.
                wide = layer.to_dense().double()
                exact = results_of(wide, x.double().contiguous(), grad.double(), layer)[key]
                limit = max(_LAYER_TOLERANCE, 2 * relative_error(reference[key], exact))
                _expect(relative_error(value, exact), limit, f"layer {name}: {key}")
            worst[f"layers' {key}"] = max(worst.get(f"layers' {key}", 0.0), error)
    return worst


def _gradients(net: nn.Module, x: Tensor, labels: Tensor, original: nn.Module) -> dict[str, Tensor]:
    """Logits, dx and the gradients of weights; of dense weights those at the stored positions."""
    net.train()
    for module in net.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.eval()
    net.zero_grad(set_to_none=True)
    x.requires_grad_(True)
    logits = net(x)
    F.cross_entropy(logits, labels).backward()
    assert x.grad is not None
    found = {"logits": logits.detach(), "input gradient": x.grad}
    for name, layer in sparse_layers(original).items():
        found[f"{_WEIGHTS}:{name}"] = weight_gradient(net.get_submodule(name), layer)
    return found


def _worst(ours: dict[str, Tensor], reference: dict[str, Tensor]) -> dict[str, float]:
    """Largest relative error by kind: logits, input gradient, weight gradients."""
    worst: dict[str, float] = {}
    for name, value in ours.items():
        kind = name.split(":")[0]
        worst[kind] = max(worst.get(kind, 0.0), relative_error(value, reference[name]))
    return worst


def densities(model: nn.Module, net: str) -> dict[str, Any]:
    """Weight density, FLOPs density by existing and by executed weights, density by layer."""
    positions = account.output_positions(model, models.spec(net).input_shape)
    costs = account.layer_costs(model, positions)
    return {
        "density": account.weight_density(costs),
        "flops_density": account.flops_density(costs),
        "executed_flops_density": account.executed_flops_density(costs),
        "layers": {cost.name: cost.density for cost in costs},
        "nnz": {cost.name: cost.nnz for cost in costs},
    }
