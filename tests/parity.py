"""Parity of the public operators with float64 dense torch, over random and curated shapes.

The command beside the figure in docs/results.md:

    python tests/parity.py --configurations 300

prints, per instruction set of this machine, the worst ||error|| / ||reference|| of output and
gradients in float32, and that of the reference backend in float64.
"""

from __future__ import annotations

import argparse
import itertools
import random
from collections.abc import Iterator
from typing import Any

import torch
from cases import (
    CONV_CASES,
    LINEAR_CASES,
    ConvCase,
    LinearCase,
    make_conv,
    make_linear,
    random_conv_cases,
    random_linear_cases,
    relative_error,
)

from sparse_kernels import ops
from sparse_kernels._load import native
from sparse_kernels.layout import to_feature_major

Case = LinearCase | ConvCase
LAYOUTS = ("contiguous", "channels_last", "feature_major", "sliced")


def configurations(n: int, seed: int) -> Iterator[Case]:
    """Every curated case, then random ones (two convolutions per linear layer) up to ``n``."""
    curated: list[Case] = [*LINEAR_CASES, *CONV_CASES]
    rest = max(0, n - len(curated))
    linear = random_linear_cases(rest // 3, seed)
    conv = random_conv_cases(rest - rest // 3, seed)
    return itertools.islice(itertools.chain(curated, linear, conv), n)


def _strided(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The same numbers in another memory order."""
    if layout == "channels_last" and x.dim() == 4:
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "feature_major":
        return to_feature_major(x)
    if layout == "sliced":
        wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1] + 1), float("nan"))
        wide[..., 1::2] = x
        return wide[..., 1::2]
    return x.contiguous()


def _dense(case: Case, t: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    """Output and gradients of x, weight matrix and bias by dense torch in float64."""
    x = t["x"].double().requires_grad_()
    bias = None if t["bias"] is None else t["bias"].double().requires_grad_()
    matrix = t["matrix"].double().requires_grad_()
    if isinstance(case, LinearCase):
        y = torch.nn.functional.linear(x, matrix, bias)
    else:
        g = case.geometry
        weight = matrix.view(g.out_channels, g.kernel_height, g.kernel_width, -1)
        padded = torch.nn.functional.pad(x, (g.pad_left, g.pad_right, g.pad_top, g.pad_bottom))
        y = torch.nn.functional.conv2d(
            padded,
            weight.permute(0, 3, 1, 2),
            bias,
            (g.stride_h, g.stride_w),
            0,
            (g.dilation_h, g.dilation_w),
            g.groups,
        )
    y = y.relu() if case.relu else y
    inputs = [x, matrix] + ([] if bias is None else [bias])
    gradients = torch.autograd.grad(y, inputs, t["grad"].double())
    return y.detach(), *gradients


def errors(case: Case, dtype: torch.dtype, layout: str, seed: int) -> dict[str, float]:
    """Relative errors of one configuration: output, dx, dvalues and, with a bias, dbias."""
    make = make_linear if isinstance(case, LinearCase) else make_conv
    t = make(case, dtype, torch.Generator().manual_seed(seed))  # type: ignore[arg-type]
    # A threshold on rounded sums may fall either way: keep outputs away from ReLU's kink.
    if case.relu:
        t["bias"] = torch.full((t["matrix"].shape[0],), 0.5, dtype=dtype)
        t["bias"][::2] = -0.5
    expected_y, expected_dx, expected_dw, *expected_db = _dense(case, t)
    x = _strided(t["x"], layout).detach().requires_grad_()
    values = t["values"].requires_grad_()
    bias = None if t["bias"] is None else t["bias"].requires_grad_()
    if isinstance(case, LinearCase):
        y = ops.linear(
            x, values, *t["indices"], bias, out_features=case.out_features, relu=case.relu
        )
    else:
        y = ops.conv2d(x, values, *t["indices"], bias, geometry=case.geometry, relu=case.relu)
    y.backward(_strided(t["grad"], layout))
    found = {
        "output": relative_error(y, expected_y),
        "dx": relative_error(x.grad, expected_dx),
        "dvalues": relative_error(values.grad, t["pattern"].compress(expected_dw)),
    }
    if bias is not None:
        found["dbias"] = relative_error(bias.grad, expected_db[0])
    return found


def worst(n: int, seed: int, dtype: torch.dtype) -> dict[str, tuple[float, str]]:
    """The largest error of each quantity over ``n`` configurations, with the case's id."""
    table: dict[str, tuple[float, str]] = {}
    rng = random.Random(seed)
    for i, case in enumerate(configurations(n, seed)):
        layout = rng.choice(LAYOUTS)
        for name, error in errors(case, dtype, layout, seed + i).items():
            if error >= table.get(name, (-1.0, ""))[0]:
                table[name] = (error, f"{case.id} {layout}")
    return table


def _print(title: str, table: dict[str, tuple[float, str]]) -> None:
    cells = ", ".join(f"{name} {error:.1e} ({where})" for name, (error, where) in table.items())
    print(f"{title}: {cells}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--configurations", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    chosen = native().isa()
    for isa in native().supported_isas():
        native().set_isa(isa)
        _print(f"float32 {isa}", worst(args.configurations, args.seed, torch.float32))
    native().set_isa(chosen)
    _print("float64 reference", worst(args.configurations, args.seed, torch.float64))


if __name__ == "__main__":
    main()
