"""A whole training step, captured once, survives twelve mask updates.

On a GPU by a CUDA graph; interpreted by a recording of all operators and launches.
"""

from __future__ import annotations

import pytest
import torch
from float64_parity import DEVICE
from graph_support import Recording, capture
from interpreter_support import HOW, INTERPRETING
from torch import nn

from sparse_kernels import SparseMomentum, plan
from sparse_kernels.backends import triton as backend
from sparse_kernels.nn import sparsify
from sparse_kernels.training import reserve
from sparse_kernels.training.layers import sparse_layers

pytestmark = [
    pytest.mark.skipif(not backend.installed(), reason="triton is not installed"),
    pytest.mark.skipif(not INTERPRETING and not torch.cuda.is_available(), reason=HOW),
    *([] if INTERPRETING else [pytest.mark.gpu]),
]
WARMING = 2  # momentum, gradients and machine code exist before the capture
UPDATES, BATCH = WARMING + 12, 2  # one after every step


class Run:
    """A small net, its optimizer and masks, and the step to be captured on fixed inputs."""

    def __init__(self, block: tuple[int, int]) -> None:
        torch.manual_seed(0)
        width = 32 if block[0] > 4 else 8
        self.model = nn.Sequential(
            nn.Conv2d(width, width, 2),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(width, width),
        )
        sparsify(self.model, density=0.4, block=block)
        self.model.to(DEVICE)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)
        reserve(self.model, self.optimizer, room=float("inf"))
        self.masks = SparseMomentum(
            self.model,
            self.optimizer,
            total_steps=4 * UPDATES,
            update_every=1,
            signal="random",
            dense_above=1.0,
        )
        self.x = torch.zeros(BATCH, width, 2, 2, device=DEVICE)
        self.target = torch.zeros(BATCH, dtype=torch.int64, device=DEVICE)
        self.loss = torch.zeros((), device=DEVICE)
        self.draw = torch.Generator().manual_seed(1)
        self.losses: list[float] = []
        self.patterns: list[torch.Tensor] = []

    def step(self) -> None:
        self.optimizer.zero_grad(set_to_none=False)
        loss = nn.functional.cross_entropy(self.model(self.x), self.target)
        loss.backward()
        self.optimizer.step()
        self.loss.copy_(loss.detach())

    def train(self, monkeypatch: pytest.MonkeyPatch | None) -> None:
        """With ``monkeypatch`` steps after the warming ones are replays: twelve updates."""
        step = self.step
        while self.masks.updates < UPDATES:
            self.x.copy_(torch.randn(self.x.shape, generator=self.draw))
            self.target.copy_(torch.randint(self.x.shape[1], (BATCH,), generator=self.draw))
            if monkeypatch is not None and len(self.losses) == WARMING:
                step = capture(self.step, DEVICE, monkeypatch)
            else:
                step()
            self.losses.append(float(self.loss))
            # A replay does not call optimizer.step(), by which masks.step() would know.
            record = self.masks.step(skipped=False)
            if record is not None:
                assert not record.reallocated and not record.storage_changes
                layers = sparse_layers(self.model)
                self.patterns.append(
                    torch.cat([layer.pattern.to("cpu").mask().flatten() for _, layer in layers])
                )


@pytest.mark.parametrize("block", [(16, 16), pytest.param((4, 1), marks=pytest.mark.slow)], ids=str)
def test_a_captured_step_survives_twelve_updates(
    block: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses, patterns, statistics and parameters are those of a run without capture."""
    runs = {}
    with plan.use_backend("triton,torch"):
        for name, how in (("eager", None), ("captured", monkeypatch)):
            runs[name] = Run(block)
            runs[name].train(how)
    eager, captured = runs["eager"], runs["captured"]
    assert len(eager.patterns) == len(captured.patterns) == UPDATES
    assert not torch.equal(eager.patterns[0], eager.patterns[-1])
    for found, expected in zip(captured.patterns, eager.patterns, strict=True):
        assert torch.equal(found, expected)
    torch.testing.assert_close(torch.tensor(captured.losses), torch.tensor(eager.losses))
    expected = eager.model.state_dict()
    for name, tensor in captured.model.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.skipif(not INTERPRETING, reason="CUDA itself refuses these in a capture")
def test_a_recording_repeats_what_ran_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    x, total = torch.ones(3), torch.zeros(3)
    factors = [2.0]

    def step() -> None:
        total.add_((x * factors[0]).view(1, 3).sum(0))

    recording = Recording(monkeypatch)
    recording.record(step)
    assert total.tolist() == [2.0] * 3
    factors[0] = 100.0  # a host's number is frozen, as in a graph
    x.fill_(5.0)
    recording.replay()
    assert total.tolist() == [12.0] * 3
    with pytest.raises(AssertionError, match="waits for the device"):
        Recording(monkeypatch).record(lambda: float(x.sum()))
