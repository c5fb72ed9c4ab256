"""Hostile calls on one layer of random kind and shape, in any order.

After every call the layer equals its dense model (hostile_model.py), or the call was an error that
says something and changed nothing.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import torch
from hostile_model import COUNT, REFUSALS, Draw, Model, called, generator, mask_of, near, refused
from torch import Tensor

from sparse_kernels.nn import COMPRESSED, DENSE_MASKED, SparseConv2d, SparseLayer, SparseLinear
from sparse_kernels.training.rewrite import rewrite

DTYPES = (torch.float32, torch.float64)
STORAGES = (COMPRESSED, DENSE_MASKED)
BATCHES = (1, 2, 3, 5, 8, 9, 16, 17, 0)  # around the kernels' 8 and 16 lanes


def memory_order(draw: Draw, x: Tensor) -> Tensor:
    """The numbers of ``x`` plain, permuted, sliced, expanded or behind an offset."""
    form = draw.integer(0, 4)
    if form == 1 and x.dim():
        order = torch.randperm(x.dim(), generator=generator(draw)).tolist()
        return x.permute(order).contiguous().permute([order.index(i) for i in range(x.dim())])
    if form == 2:
        return torch.stack([torch.full_like(x, float("nan")), x], -1)[..., 1]
    if form == 3 and x.dim() and x.shape[0]:
        return x[:1].expand_as(x)
    if form == 4:
        return torch.cat([x.new_full((3,), float("nan")), x.reshape(-1)])[3:].view(x.shape)
    return x


class LayerRules:
    """One layer, and its dense model."""

    layer: SparseLayer
    model: Model

    def make(self, draw: Draw) -> None:
        options: dict[str, Any] = {
            "density": draw.choice((0.01, 0.2, 0.5, 1.0)),
            "block": (draw.integer(1, 4), draw.integer(1, 4)),
            "bias": bool(draw.integer(0, 1)),
            "dtype": draw.choice((*DTYPES, torch.float32)),
            "generator": generator(draw),
        }
        self.linear = bool(draw.integer(0, 1))
        groups = 1 if self.linear else draw.choice((1, 1, 2))
        cols, rows = draw.integer(1, 9), draw.integer(1, 9)
        if rows * cols > 4 and draw.integer(0, 3) == 0:
            options["capacity"] = groups * rows * cols * 9
        kind: Callable[..., SparseLayer] = SparseLinear
        sizes: list[Any] = [groups * cols, groups * rows]
        if not self.linear:
            kind = SparseConv2d
            sizes.append((draw.integer(1, 3), draw.integer(1, 3)))
            options |= {"stride": draw.integer(1, 3), "padding": draw.integer(0, 3)}
            options |= {"dilation": draw.integer(1, 2), "groups": groups}
            mode = draw.choice(("zeros",) * 5 + ("reflect", "replicate", "circular"))
            options["padding_mode"] = mode
            if options["stride"] == 1 and draw.integer(0, 3) == 0:
                options["padding"] = "same"
        bh, bw = options["block"]
        if bh > rows or bw > cols:
            refused(lambda: kind(*sizes, **options))
            options["block"] = (min(bh, rows), min(bw, cols))
        self.layer = kind(*sizes, **options)
        self.remember()

    def remember(self) -> None:
        self.model = Model(self.layer)

    def check(self) -> None:
        self.model.check(self.layer)

    # ---- inputs --------------------------------------------------------------------------------

    def _shape(self, draw: Draw) -> list[int]:
        size = self.layer.in_features if self.linear else self.layer.in_channels
        wrong = draw.integer(0, 5) == 0
        if wrong and draw.integer(0, 1):
            size = draw.integer(0, 12)
        more = draw.integer(0, 3) if wrong else draw.choice((1, 1, 1, 0, 2))
        if self.linear:
            return [*(draw.choice(BATCHES) for _ in range(more)), size]
        low = 0 if draw.integer(0, 9) == 0 else 1
        image = [draw.integer(low, 8), draw.integer(low, 8)]
        return [*(draw.choice((*BATCHES[:6], 0)) for _ in range(min(more, 2))), size, *image]

    def _input(self, draw: Draw, shape: list[int]) -> Tensor:
        numbers = torch.randn(shape, generator=generator(draw), dtype=torch.float64)
        return memory_order(draw, numbers.to(self.layer.values.dtype))

    def _pair(self, draw: Draw) -> tuple[Tensor, Tensor, Tensor] | None:
        """Input, the same in float64, and the dense output; None for what dense torch refuses."""
        x = self._input(draw, self._shape(draw))
        theirs = x.double().requires_grad_()
        self.model.require_grad()
        try:
            expected = self.model.output(self.layer, theirs)
        except (RuntimeError, ValueError):
            refused(lambda: self.layer(x))
            return None
        if self.layer.storage == DENSE_MASKED and not self.linear and 0 in x.shape[-2:]:
            # torch's own convolution takes no image without pixels, whatever its padding makes.
            called()
            try:
                near(self.layer(x), expected)
            except REFUSALS as problem:
                COUNT["refused"] += 1
                assert len(str(problem)) > 20
            return None
        return x, theirs, expected

    # ---- products ------------------------------------------------------------------------------

    def forward(self, draw: Draw) -> None:
        """Output, and both gradients, of an input in some memory order; or a refusal."""
        pair = self._pair(draw)
        if pair is None:
            return
        x, theirs, expected = pair
        backward = draw.integer(0, 1)
        x = x.detach().requires_grad_(bool(backward))
        for _ in range(draw.integer(1, 2)):
            called()
            y = self.layer(x)
        near(y, expected)
        if backward:
            grad = self._input(draw, list(y.shape))
            self._backward(y, expected, grad, x, theirs, retain=bool(draw.integer(0, 1)))

    def _backward(
        self, y: Tensor, want: Tensor, grad: Tensor, x: Tensor, theirs: Tensor, retain: bool
    ) -> None:
        values = self.layer.values
        dx, dw = torch.autograd.grad(want, (theirs, self.model.weight), grad.double())
        for again in (True, False) if retain else (False,):
            called()
            found = torch.autograd.grad(y, (x, values), grad, retain_graph=again)
            near(found[0], dx)
            near(found[1], self.model.stored(self.layer, dw))
        if retain:  # its graph is gone now
            refused(lambda: torch.autograd.grad(y, (x, values), grad))

    def not_a_number(self, draw: Draw) -> None:
        """NaN and infinity in one sample stay in it: no lane of a vector reads its neighbour."""
        shape = self._shape(draw)
        if len(shape) != (2 if self.linear else 4) or shape[0] < 2 or 0 in shape:
            return
        x = self._input(draw, shape)
        try:
            expected = self.model.output(self.layer, x.double()).detach()
        except (RuntimeError, ValueError):
            return
        at = draw.integer(0, shape[0] - 1)
        x = x.clone(memory_format=torch.preserve_format) if draw.integer(0, 1) else x.contiguous()
        x = x.clone() if 0 in x.stride() else x
        x[at] = draw.choice((float("nan"), float("inf"), -float("inf")))
        others = [i for i in range(shape[0]) if i != at]
        x.requires_grad_()
        called()
        y = self.layer(x)
        near(y.detach()[others], expected[others])
        called()
        grad = torch.ones_like(y)
        grad[at] = float("nan")
        (dx,) = torch.autograd.grad(y, x, grad)
        theirs = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
        want = self.model.output(self.layer, theirs)
        near(dx[others], torch.autograd.grad(want.sum(), theirs)[0][others])

    def wrong_input(self, draw: Draw) -> None:
        """Another dtype, another device, no tensor at all."""
        size = [3, self.layer.in_features] if self.linear else [2, self.layer.in_channels, 6, 6]
        x = torch.ones(size, dtype=self.layer.values.dtype)
        other = torch.float64 if x.dtype == torch.float32 else torch.float32
        wrong: tuple[Any, ...] = (
            x.to(other), x.long(), x.bool(), x.to(torch.complex64), x.to("meta"), None,
            x.tolist(), x.numpy(), x.int(),
        )  # fmt: skip
        if self.layer.storage == COMPRESSED and x.dtype == torch.float32:  # not torch's product
            wrong = (*wrong, x.to_sparse())
        given = draw.choice(wrong)
        refused(lambda: self.layer(given), (AttributeError,))
        self.check()

    def wrong_grad(self, draw: Draw) -> None:
        """A gradient of another shape; then the right one still serves."""
        pair = self._pair(draw)
        if pair is None:
            return
        x, theirs, expected = pair
        x = x.detach().requires_grad_()
        called()
        y = self.layer(x)
        grad = torch.ones(list(y.shape), dtype=y.dtype)
        wrong = draw.choice((grad[None], grad[..., None], grad.new_ones(3, 5, 7, 1, 2),
                             torch.cat([grad, grad], -1)))  # fmt: skip
        if wrong.shape != y.shape:  # an output without elements: doubled, it is itself
            refused(lambda: torch.autograd.grad(y, (x, self.layer.values), wrong))
        self._backward(y, expected, grad, x, theirs, retain=False)

    def probe(self, draw: Draw) -> None:
        """A probe gathers the dense gradient, of a layer of either storage."""
        pair = self._pair(draw)
        if pair is None:
            return
        x, _, expected = pair
        called()
        probe = self.layer.make_probe()
        try:
            y = self.layer(x)
            near(y, expected)
            grad = self._input(draw, list(y.shape))
            dw = torch.autograd.grad(expected, self.model.weight, grad.double())[0]
            called()
            found = torch.autograd.grad(y, (probe, self.layer.values), grad)
        finally:
            self.layer.probe = None
        near(found[0], self.layer.weight_to_matrix(dw))
        near(found[1], self.model.stored(self.layer, dw))

    def without_gradients(self, draw: Draw) -> None:
        pair = self._pair(draw)
        if pair is None:
            return
        mode = draw.choice((torch.no_grad, torch.inference_mode))
        called()
        with mode():
            y = self.layer(pair[0])
        near(y.clone(), pair[2].detach())

    # ---- the pattern ---------------------------------------------------------------------------

    def _keys(self, draw: Draw, hostile: bool) -> tuple[list[int], Tensor]:
        blocks = len(self.model.rows) * len(self.model.cols)
        count = draw.integer(0, blocks)
        keys = sorted(torch.randperm(blocks, generator=generator(draw))[:count].tolist())
        if not hostile:
            return keys, torch.tensor(keys, dtype=torch.int64)
        kind = draw.integer(0, 4)
        wrong = keys or [0]
        if kind == 0:
            wrong = [*wrong, wrong[0]]
        elif kind == 1:
            wrong = sorted([*wrong, draw.choice((-1, blocks, 10**6, 2**40, -(2**40)))])
        elif kind == 2:
            return keys, torch.tensor(wrong, dtype=torch.int64)[None]
        elif kind == 3:
            return keys, torch.tensor(wrong, dtype=draw.choice((torch.int32, torch.float64)))
        else:
            wrong = [*wrong[::-1], blocks - 1, 0]
        return keys, torch.tensor(wrong, dtype=torch.int64)

    def set_pattern(self, draw: Draw) -> None:
        """New blocks under the old values, which are then given the room there is."""
        hostile = draw.integer(0, 2) == 0
        keys, given = self._keys(draw, hostile)
        if hostile:
            refused(lambda: self.layer.set_pattern_(given))
            self.layer.pattern.validate()
            self.check()
            return
        if self.layer.storage == COMPRESSED and len(keys) > self.layer.pattern.capacity:
            keys = keys[: self.layer.pattern.capacity]
            given = given[: len(keys)]
        called()
        self.layer.set_pattern_(given)
        self.layer._zero_outside()
        self.layer.pattern.validate()
        assert self.layer.pattern.keys().tolist() == keys
        self.remember()

    def rewrite(self, draw: Draw) -> None:
        """A mask update: kept blocks keep their values, new ones start at zero."""
        hostile = draw.integer(0, 2) == 0
        keys, given = self._keys(draw, hostile)
        storage = draw.choice((None, *STORAGES, "sparse" if hostile else None))
        if hostile:
            refused(lambda: rewrite(self.layer, None, given, storage=storage))
            self.layer.pattern.validate()
            self.check()
            return
        called()
        rewrite(self.layer, None, given, storage=storage)
        self.layer.pattern.validate()
        self.model.mask = mask_of(keys, self.model.rows, self.model.cols)
        kept = self.layer.weight_to_matrix(self.model.weight.detach()) * self.model.mask
        self.model.weight = self.layer.matrix_to_weight(kept)
        assert self.layer.pattern.keys().tolist() == keys
        self.check()

    def between(self, draw: Draw) -> None:
        """Something changes between forward and backward: the old gradient, or a refusal."""
        pair = self._pair(draw)
        if pair is None:
            return
        x, theirs, expected = pair
        x = x.detach().clone().requires_grad_()
        called()
        y = self.layer(x)
        grad = self._input(draw, list(y.shape))
        stored, old = self.layer.storage, self.model
        dx, dw = torch.autograd.grad(expected, (theirs, old.weight), grad.double())
        want = self.model.stored(self.layer, dw)
        changed = draw.choice((self.set_pattern, self.rewrite, self.convert, self.new_values,
                               self.copies, self.forward, self.move))  # fmt: skip
        changed(draw)
        called()
        wanted = draw.choice((x, self.layer.values))
        try:
            (found,) = torch.autograd.grad(y, wanted, grad)
        except REFUSALS as problem:
            assert len(str(problem)) > 20
            return
        if wanted is x:
            near(found, dx)
        elif stored == DENSE_MASKED == self.layer.storage and found.shape == want.shape:
            # torch's product: the mask may be that of either time.
            matrix = self.layer.weight_to_matrix(dw)
            new = matrix * self.layer.mask
            near(found, new if torch.allclose(found.double(), new, atol=1e-4) else want)
        else:
            near(found, want)

    # ---- storage, values, copies ---------------------------------------------------------------

    def convert(self, draw: Draw) -> None:
        storage = draw.choice((*STORAGES, "sparse", "", None))
        if storage in STORAGES:
            called()
            self.layer.to_storage_(storage)
        else:
            refused(lambda: self.layer.to_storage_(storage))
        self.check()

    def new_values(self, draw: Draw) -> None:
        """Values (and bias) written in place, as an optimizer does."""
        factor = draw.choice((-1.0, 0.5, 2.0, 0.0))
        called()
        with torch.no_grad():
            self.layer.values.mul_(factor)
            self.model.weight = self.model.weight.detach() * factor
            if self.layer.bias is not None:
                self.layer.bias.fill_(0.25)
                self.model.bias = torch.full_like(self.model.bias, 0.25)
        self.check()

    def move(self, draw: Draw) -> None:
        called()
        self.layer.to(draw.choice(DTYPES))
        self.remember()

    def copies(self, draw: Draw) -> None:
        way = draw.choice(("pickle", "deepcopy", "copy", "state", "file"))
        called()
        if way == "pickle":
            self.layer = pickle.loads(pickle.dumps(self.layer))
        elif way == "deepcopy":
            before, self.layer = self.layer, copy.deepcopy(self.layer)
            with torch.no_grad():
                before.values.fill_(3.0)  # the copy shares nothing
        elif way == "state":
            self.layer.load_state_dict(copy.deepcopy(self.layer.state_dict()))
        elif way == "file":
            file = io.BytesIO()
            torch.save(self.layer.state_dict(), file)
            file.seek(0)
            self.layer.load_state_dict(torch.load(file, weights_only=True))
        else:
            self.layer.to_dense().weight.data.fill_(3.0)
        self.check()
