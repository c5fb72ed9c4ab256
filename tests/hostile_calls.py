"""Hypothesis against the layers: any order of calls with right and wrong arguments.

The model is a dense matrix in float64.  After every call the layer equals it, or the call was an
error that says something and changed nothing.

    python tests/hostile_calls.py --calls 1000000

runs until so many calls were made and prints the count; tests/test_hostile.py makes a few hundred.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import pickle
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from torch import Tensor

from sparse_kernels.nn import COMPRESSED, DENSE_MASKED, SparseConv2d, SparseLayer, SparseLinear

#: What a refusal may be; IndexError, AssertionError, SystemError and the like are findings.
REFUSALS = (ValueError, TypeError, RuntimeError, NotImplementedError)
DTYPES = (torch.float32, torch.float64)
INDICES = ("crow_indices", "col_indices", "t_crow", "t_row", "t_perm")
COUNT = {"calls": 0, "refused": 0}

small = st.integers(1, 9)
seeds = st.integers(0, 2**31)


class Layers(RuleBasedStateMachine):
    """One layer of random kind and shape, and its dense model."""

    layer: SparseLayer

    @initialize(data=st.data())
    def make(self, data: Any) -> None:
        draw = data.draw
        options: dict[str, Any] = {
            "density": draw(st.sampled_from((0.01, 0.2, 0.5, 1.0))),
            "block": draw(st.tuples(st.integers(1, 4), st.integers(1, 4))),
            "bias": draw(st.booleans()),
            "dtype": draw(st.sampled_from(DTYPES)),
            "generator": torch.Generator().manual_seed(draw(seeds)),
        }
        self.linear = draw(st.booleans())
        groups = draw(st.sampled_from((1, 1, 2)))
        sizes = [draw(small), draw(small)]
        if not self.linear:
            sizes = [groups * n for n in sizes]
            options |= {"stride": draw(st.integers(1, 3)), "padding": draw(st.integers(0, 3))}
            options |= {"dilation": draw(st.integers(1, 2)), "groups": groups}
            sizes.append((draw(st.integers(1, 3)), draw(st.integers(1, 3))))  # type: ignore
        kind = SparseLinear if self.linear else SparseConv2d
        rows, cols = (
            (sizes[1], sizes[0]) if self.linear else (sizes[1] // groups, sizes[0] // groups)
        )
        bh, bw = options["block"]
        if bh > rows or bw > cols:
            self.refused(lambda: kind(*sizes, **options))
            options["block"] = (min(bh, rows), min(bw, cols))
        self.layer = kind(*sizes, **options)
        self.remember()

    # ---- the model -----------------------------------------------------------------------------

    def remember(self) -> None:
        self.dense = self.layer.to_dense().double()

    def check(self) -> None:
        """The layer still holds what the model holds."""
        assert torch.equal(self.layer.weight.detach().double(), self.dense.weight)

    def refused(self, call: Any) -> None:
        COUNT["calls"] += 1
        try:
            call()
        except REFUSALS as problem:
            COUNT["refused"] += 1
            assert len(str(problem)) > 20, f"no message: {problem!r}"
        else:
            raise AssertionError("accepted what is wrong")

    # ---- calls ---------------------------------------------------------------------------------

    def _shape(self, draw: Any) -> list[int]:
        size = self.layer.in_features if self.linear else self.layer.in_channels
        wrong = draw(st.integers(0, 5)) == 0
        size = draw(st.integers(0, 12)) if wrong else size
        if self.linear:
            return [*draw(st.lists(st.integers(0, 6), max_size=3)), size]
        image = [draw(st.integers(0 if wrong else 1, 8)), draw(st.integers(1, 8))]
        return [*draw(st.lists(st.integers(0, 5), max_size=1)), size, *image]

    def _input(self, draw: Any, shape: list[int]) -> Tensor:
        """Numbers of ``shape`` in some memory order: plain, permuted, sliced, expanded, offset."""
        g = torch.Generator().manual_seed(draw(seeds))
        x = torch.randn(shape, generator=g, dtype=torch.float64)
        form = draw(st.integers(0, 4))
        if form == 1:
            order = draw(st.permutations(range(x.dim())))
            x = x.permute(order).contiguous().permute([order.index(i) for i in range(x.dim())])
        elif form == 2:
            x = torch.stack([torch.full_like(x, float("nan")), x], -1)[..., 1]
        elif form == 3 and x.dim() and x.shape[0]:
            x = x[:1].expand_as(x)
        elif form == 4:
            x = torch.cat([x.new_full((3,), float("nan")), x.reshape(-1)])[3:].view(shape)
        return x

    @rule(data=st.data(), backward=st.booleans(), twice=st.booleans())
    def forward(self, data: Any, backward: bool, twice: bool) -> None:
        x = self._input(data.draw, self._shape(data.draw))
        dtype = self.layer.values.dtype
        other = data.draw(st.sampled_from((dtype,) * 6 + (torch.int64, torch.float64, torch.bool)))
        given = x.to(other) if other != torch.float64 or dtype == other else x
        if given.dtype != dtype:
            self.refused(lambda: self.layer(given))
            return
        given = given.detach().requires_grad_(backward)
        theirs = given.detach().double().requires_grad_(backward)
        try:
            expected = self.dense(theirs)
        except REFUSALS:
            if 0 not in given.shape:  # of an image without pixels, padding alone makes an output
                self.refused(lambda: self.layer(given))
            return
        COUNT["calls"] += 1
        for _ in range(1 + twice):
            y = self.layer(given)
        self._near(y, expected)
        if backward:
            grad = self._input(data.draw, list(y.shape))
            self._backward(y, expected, grad, given, theirs)

    def _backward(self, y: Tensor, want: Tensor, grad: Tensor, x: Tensor, theirs: Tensor) -> None:
        COUNT["calls"] += 1
        values = self.layer.values
        found = torch.autograd.grad(y, (x, values), grad.to(y.dtype))
        rounded = grad.to(y.dtype).double()
        dx, dw = torch.autograd.grad(want, (theirs, self.dense.weight), rounded)
        self._near(found[0], dx)
        matrix = self.layer.weight_to_matrix(dw)
        masked = self.layer.storage == DENSE_MASKED
        stored = matrix * self.layer.mask if masked else self.layer.pattern.compress(matrix)
        self._near(found[1], stored)

    def _near(self, found: Tensor, expected: Tensor) -> None:
        assert found.shape == expected.shape
        limit = 1e-4 if found.dtype == torch.float32 else 1e-10
        scale = float(expected.detach().abs().max()) if expected.numel() else 1.0
        assert torch.allclose(found.double(), expected, rtol=limit, atol=limit * max(scale, 1e-3))

    @rule(seed=seeds, hostile=st.sampled_from((None,) * 4 + ("order", "range", "negative")))
    def set_pattern(self, seed: int, hostile: str | None) -> None:
        pattern = self.layer.pattern
        everywhere = torch.arange(pattern.block_rows * pattern.block_cols)
        g = torch.Generator().manual_seed(seed)
        count = max(1, min(pattern.nnzb, everywhere.numel()))
        keys = everywhere[torch.randperm(everywhere.numel(), generator=g)[:count]].sort().values
        if hostile is None:
            COUNT["calls"] += 1
            self.layer.set_pattern_(keys)
            self.layer._zero_outside()
            self.layer.pattern.validate()
            self.remember()
            return
        if hostile == "order":
            keys = torch.cat([keys, keys[:1]])
        else:
            keys = torch.cat([keys, torch.tensor([-1 if hostile == "negative" else 10**6])])
            keys = keys.sort().values
        self.refused(lambda: self.layer.set_pattern_(keys))
        self.layer.pattern.validate()
        self.check()

    @rule(storage=st.sampled_from((COMPRESSED, DENSE_MASKED, "sparse", "")))
    def convert(self, storage: str) -> None:
        if storage in (COMPRESSED, DENSE_MASKED):
            COUNT["calls"] += 1
            self.layer.to_storage_(storage)
        else:
            self.refused(lambda: self.layer.to_storage_(storage))
        self.check()

    @rule(dtype=st.sampled_from(DTYPES))
    def move(self, dtype: torch.dtype) -> None:
        COUNT["calls"] += 1
        self.layer.to(dtype)
        self.remember()

    @rule(way=st.sampled_from(("pickle", "deepcopy", "state")))
    def copy(self, way: str) -> None:
        COUNT["calls"] += 1
        if way == "pickle":
            self.layer = pickle.loads(pickle.dumps(self.layer))
        elif way == "deepcopy":
            self.layer = copy.deepcopy(self.layer)
        else:
            self.layer.load_state_dict(copy.deepcopy(self.layer.state_dict()))
        self.check()

    @rule(name=st.sampled_from(INDICES), seed=seeds, value=st.integers(-(2**31), 2**31 - 1))
    def damage(self, name: str, seed: int, value: int) -> None:
        """One entry of an index array: the native checks see it, or it was in the unused tail."""
        if self.layer.storage != COMPRESSED or self.layer.values.dtype != torch.float32:
            return
        broken = copy.deepcopy(self.layer)
        array = getattr(broken, name)
        entry = seed % array.numel()
        array[entry] = value
        unused = name != "crow_indices" and name != "t_crow" and entry >= broken.pattern.nnzb
        right = copy.deepcopy(self.layer)
        if any(not torch.equal(getattr(right, n), getattr(broken, n)) for n in INDICES):
            size = right.in_features if self.linear else right.in_channels
            x = torch.ones(3, size) if self.linear else torch.ones(2, size, 6, 6)
            self._all_refused_or_right(broken, right, x, unused)

    def _all_refused_or_right(
        self, broken: SparseLayer, right: SparseLayer, x: Tensor, unused: bool
    ) -> None:
        """Output, dx and dvalues of the damaged layer."""
        for wanted in ("y", "x", "values"):
            COUNT["calls"] += 1
            results = []
            for layer in (broken, right):
                given = x.clone().requires_grad_(wanted == "x")
                try:
                    y = layer(given)
                    target = {"y": None, "x": given, "values": layer.values}[wanted]
                    results.append(
                        y.detach() if target is None else torch.autograd.grad(y.sum(), target)[0]
                    )
                except ValueError as problem:
                    assert layer is broken and "SparsityPattern.validate()" in str(problem)
                    COUNT["refused"] += 1
                    break
            if len(results) == 2:
                self._same_or_legal(results, unused)

    def _same_or_legal(self, results: list[Tensor], unused: bool) -> None:
        """What no check can refuse is a legal array by itself: then only memory safety is left.

        unused: the damage lies beyond the stored blocks, which nothing reads.
        """
        assert all(result.isfinite().all() for result in results)
        assert not unused or torch.equal(*results)


def run(examples: int, steps: int, seed: int | None = None) -> None:
    machine = settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        database=None,
        derandomize=seed is None,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )
    factory = type("Layers", (Layers,), {})  # the seed is written on the class
    run_state_machine_as_test(factory if seed is None else seeded(seed)(factory), settings=machine)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1, help="of the first 200 examples")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for seed in itertools.count(args.seed):
        if COUNT["calls"] >= args.calls:
            break
        print(f"seed {seed}", flush=True)
        run(200, 40, seed=seed)
        print(f"{COUNT['calls']} calls, {COUNT['refused']} refused, 0 findings", flush=True)


if __name__ == "__main__":
    main()
