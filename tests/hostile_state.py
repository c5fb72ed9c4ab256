"""Hostile calls on what a layer holds: index buffers, state dictionaries, attributes, devices."""

from __future__ import annotations

import copy
from typing import Any

import torch
from hostile_layers import LayerRules
from hostile_model import COUNT, REFUSALS, Draw, called, refused
from torch import Tensor, nn

from sparse_kernels.nn import COMPRESSED, DENSE_MASKED, SparseLayer

INDICES = ("crow_indices", "col_indices", "t_crow", "t_row", "t_perm")


class StateRules(LayerRules):
    """Rules that write where only the library writes, or that take the layer elsewhere."""

    def _image(self) -> Tensor:
        size = self.layer.in_features if self.linear else self.layer.in_channels
        shape = (3, size) if self.linear else (2, size, 6, 6)
        return torch.ones(shape, dtype=self.layer.values.dtype)

    def damage(self, draw: Draw) -> None:
        """One entry of an index array: the native checks see it, or it was in the unused tail."""
        if self.layer.storage != COMPRESSED or self.layer.values.dtype != torch.float32:
            return
        name = draw.choice(INDICES)
        broken = copy.deepcopy(self.layer)
        array = getattr(broken, name)
        entry = draw.integer(0, array.numel() - 1)
        before = int(array[entry])
        array[entry] = draw.choice((-1, before + 1, before - 1, 10**6, -(2**31), 2**31 - 1, 0))
        if int(array[entry]) == before:
            return
        unused = name != "crow_indices" and name != "t_crow" and entry >= self.layer.pattern.nnzb
        self._all_refused_or_right(broken, copy.deepcopy(self.layer), self._image(), unused)

    def _all_refused_or_right(
        self, broken: SparseLayer, right: SparseLayer, x: Tensor, unused: bool
    ) -> None:
        """Output, dx and dvalues of the damaged layer."""
        try:
            right(x)
        except REFUSALS:
            return  # a reflecting padding larger than the image
        for wanted in ("y", "x", "values"):
            called()
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

    def wrong_state(self, draw: Draw) -> None:
        """A state_dict that does not fit is refused whole: the layer stays as it was."""
        state = {k: v.clone() for k, v in self.layer.state_dict().items()}
        name = draw.choice(tuple(state))
        entry, kind = state[name], draw.integer(0, 5)
        if kind == 0:
            del state[name]
        elif kind == 1:
            state[name] = entry[None]
        elif kind == 2:
            state[name] = torch.cat([entry, entry])
        elif kind == 3:
            state["weight"] = torch.zeros(self.layer.weight_shape)
        elif kind == 4 or name in ("values", "bias"):
            state[name] = entry.tolist()  # type: ignore[assignment]
        elif name == "mask":
            state[name] = entry.float()
        else:
            at = draw.integer(0, entry.numel() - 1)
            beyond = name == "col_indices" and at >= self.layer.pattern.nnzb
            entry[at] = draw.choice((-1, 10**6, 2**31 - 1, -(2**31)))
            if beyond:  # nothing there is read: loading clears it
                called()
                self.layer.load_state_dict(state)
                self.layer.pattern.validate()
                self.check()
                return
        refused(lambda: self.layer.load_state_dict(state))
        self.layer.pattern.validate()
        self.check()

    def attributes(self, draw: Draw) -> None:
        """`weight` is made on demand: nothing may write to it or replace it."""
        layer, weight = self.layer, torch.zeros(self.layer.weight_shape)

        def fill() -> None:
            layer.weight.fill_(1.0)

        def assign() -> None:
            layer.weight = weight  # type: ignore[misc]

        def item() -> None:
            layer.weight[0] = 1.0

        def data() -> None:
            layer.weight.data.mul_(0.0)

        def parameter() -> None:
            layer.register_parameter("weight", nn.Parameter(weight))

        def norm() -> None:
            nn.utils.parametrizations.weight_norm(layer)

        call = draw.choice((fill, assign, item, data, parameter, norm))
        refused(call, (AttributeError,))
        self.check()

    def meta(self, draw: Draw) -> None:
        """On the meta device shapes are right, content is refused."""
        there = copy.deepcopy(self.layer).to("meta")
        x = self._image()
        kind = draw.integer(0, 3)
        if kind == 0:
            refused(lambda: there.pattern)
        elif kind == 1:
            refused(lambda: there(x))
        elif kind == 2:
            refused(lambda: there.set_pattern_(torch.tensor([0])))
        else:
            try:
                shape = self.layer(x).shape
            except REFUSALS:
                return  # a reflecting padding larger than the image
            called()
            y = there(x.to("meta"))
            assert y.is_meta and y.shape == shape
        self.check()

    def wrong_probe(self, draw: Draw) -> None:
        """A probe for a pattern of another geometry."""
        rows, cols = self.layer.matrix_shape
        other: Any = type(self.layer.pattern).random((rows + 1, cols), nnzb=1)
        refused(lambda: self.layer.make_probe(other))
        assert self.layer.probe is None
        self.check()

    def mask_written(self, draw: Draw) -> None:
        """The mask of a dense-masked layer written in place, block by block."""
        if self.layer.storage != DENSE_MASKED:
            return
        keys, _ = self._keys(draw, hostile=False)
        blocks = self.layer.pattern.block_mask()
        called()
        new = type(self.layer.pattern).from_keys(
            torch.tensor(keys, dtype=torch.int64), self.layer.matrix_shape, self.layer.block,
            self.layer.row_parts, self.layer.col_parts,
        )  # fmt: skip
        assert blocks.shape == new.block_mask().shape
        self.layer.mask.copy_(new.mask())
        self.layer._zero_outside()
        assert self.layer.pattern.keys().tolist() == keys
        self.remember()
