"""Which variants beat the built-in rule, layer by layer: what tune would choose, with its gains.

    python benchmarks/variants.py vgg --threads 2 --block 1x1

prints one line per layer and pass: the variants that apply, the one taken and rule time / its time.
"""

from __future__ import annotations

import argparse
import time

import torch

from sparse_kernels import SparseConv2d, SparseLinear, plan_variants
from sparse_kernels._load import native
from sparse_kernels.nn._tune_variants import PASSES, Site
from sparse_kernels.plan_measure import Measured, measure

#: (out, in, kernel, image, stride) of convolutions; (out, in) of linear layers.
GROUPS: dict[str, tuple[tuple[int, ...], ...]] = {
    "vgg": (
        *((64, 3, 3, 32, 1), (64, 64, 3, 32, 1), (128, 64, 3, 16, 1), (128, 128, 3, 16, 1)),
        *((256, 128, 3, 8, 1), (256, 256, 3, 8, 1), (512, 256, 3, 4, 1), (512, 512, 3, 4, 1)),
        (512, 512, 3, 2, 1),
    ),
    "resnet": (
        *((64, 256, 1, 28, 1), (256, 64, 1, 28, 1), (512, 128, 1, 14, 1), (1024, 256, 1, 14, 1)),
        *((2048, 512, 1, 7, 1), (128, 128, 3, 14, 2), (64, 3, 7, 56, 2), (256, 256, 3, 7, 1)),
    ),
    "linear": ((300, 784), (1024, 784), (4096, 784), (4096, 4096), (10, 4096)),
}


def layer_of(sizes: tuple[int, ...], density: float, block: tuple[int, int]):
    """A sparse layer of the sizes and the shape of its input without the batch."""
    generator = torch.Generator().manual_seed(0)
    if len(sizes) == 2:
        out, inn = sizes
        layer = SparseLinear(inn, out, density=density, block=block, generator=generator)
        return layer, (inn,)
    out, inn, kernel, image, stride = sizes
    layer = SparseConv2d(
        inn,
        out,
        kernel,
        stride,
        kernel // 2,
        density=density,
        block=block,
        generator=generator,
    )
    return layer, (inn, image, image)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("group", choices=GROUPS)
    parser.add_argument("--first", type=int, default=0, help="number of the first layer")
    parser.add_argument("--last", type=int, default=99)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--density", type=float, default=0.05)
    parser.add_argument("--block", default="1x1")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=1.0, help="cap per pass")
    parser.add_argument("--all", action="store_true", help="the ratio of every variant, too")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    block = tuple(map(int, args.block.split("x")))
    # One thread's own time is blind to what else the machine does.
    clock = time.thread_time if args.threads == 1 else time.perf_counter
    print(
        f"# {native().isa()}, {args.threads} threads, batch {args.batch}, {args.density}, {block}"
    )
    for sizes in GROUPS[args.group][args.first : args.last + 1]:
        layer, features = layer_of(sizes, args.density, (block[0], block[1]))
        site = Site(layer, (args.batch, *features), layer.pattern.capacity)
        calls = site.calls(layer.pattern)
        for name in PASSES:
            variants = site.variants(name)
            contenders = {variant: calls.of(name) for variant in variants.names}
            races: list[Measured] = []

            def timed(candidates, *, seconds, races=races):
                races.append(measure(candidates, seconds=seconds, clock=clock))
                return races[-1]

            made = plan_variants.choose(variants, contenders, seconds=args.seconds, measure=timed)
            first = races[0] if races else None
            cells = [f"{'x'.join(map(str, sizes)):>16} {name:8}"]
            if first is not None:
                cells.append(f"{1e3 * first.seconds['rule']:8.3f} ms n={first.rounds:3}")
            cells.append(f"{made.name:13} {made.gain:.3f}")
            if args.all and first is not None:
                ratios = {v: first.ratio("rule", v) for v in contenders if v != "rule"}
                cells.append(" ".join(f"{v}={r:.2f}" for v, r in ratios.items()))
            print(" ".join(cells), flush=True)
        plan_variants.clear()


if __name__ == "__main__":
    main()
