"""The emulator itself: what runs right gives right numbers, and every fault is found."""

from __future__ import annotations

import os

import pytest
import torch
from emulator import address, load, nan_like, registered

BLOCKS = 3
ASAN = os.environ.get("SPARSE_KERNELS_EMULATION") == "asan"


# Elements of nobody's memory on both sides of a tensor: more than the 4096 bytes by which an
# address past a neighbour is still counted as that neighbour's (runtime/memory.cpp), wherever the
# heap puts them.
APART = 2048


def alone(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in the middle of a larger buffer of its own."""
    held = tensor.new_zeros(tensor.numel() + 2 * APART)
    return held[APART:-APART].copy_(tensor)


def run(kernel: str, fault: str = "none", seed: int = 0) -> torch.Tensor:
    x = alone(torch.randn(BLOCKS * 64))
    y = alone(nan_like((BLOCKS * 64,)))
    with registered(seed, x=x, out_y=y) as emulated:
        emulated.run(kernel, address(y), address(x), BLOCKS, emulated.faults[fault])
    run.x = x  # type: ignore[attr-defined]
    return y


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kernel", ["reverse", "reverse_copied"])
def test_shared_memory_barriers_and_copies(kernel: str, seed: int) -> None:
    y = run(kernel, seed=seed)
    assert torch.equal(y.view(BLOCKS, 64), run.x.view(BLOCKS, 64).flip(1))  # type: ignore[attr-defined]


@pytest.mark.parametrize("seed", range(3))
def test_lanes_of_a_warp_exchange_by_shared_memory(seed: int) -> None:
    y = run("warp_reverse", seed=seed)
    assert torch.equal(y.view(-1, 32), run.x.view(-1, 32).flip(1))  # type: ignore[attr-defined]


@pytest.mark.parametrize("seed", range(3))
def test_shuffles_add_up(seed: int) -> None:
    y = run("warp_sum", seed=seed)
    sums = run.x.view(-1, 32).sum(1, keepdim=True)  # type: ignore[attr-defined]
    torch.testing.assert_close(y.view(-1, 32), sums.expand(-1, 32), rtol=1e-5, atol=1e-5)


def test_votes_and_atomics() -> None:
    x = torch.randn(BLOCKS * 64)
    y = torch.zeros(1 + 2 * BLOCKS, dtype=torch.int32)
    with registered(x=x, out_y=y) as emulated:
        emulated.run("votes", address(y), address(x), BLOCKS, 0)
    assert int(y[0]) == int((x > 0).sum())
    for warp, votes in enumerate(y[1:].tolist()):
        expected = sum(1 << i for i in range(32) if x[32 * warp + i] > 0)
        assert votes & 0xFFFFFFFF == expected


FAULTS = [
    ("reverse", "barrier_skipped", "__syncthreads at line .* is not reached by all its threads"),
    ("reverse", "barrier_divergent", "__syncthreads in divergent code"),
    ("reverse", "barrier_dropped", "no barrier in between|before anything was written"),
    ("reverse", "shared_past_end", "shared memory: 4 bytes at byte 256, of 256 that there are"),
    ("reverse", "global_past_end", "read of 4 bytes at byte 768 of x, which has 768"),
    ("reverse", "global_before", "read of 4 bytes at .*, which no allocation holds; next is x"),
    ("reverse", "write_to_input", "write of 4 bytes at byte .* of x, which is an input"),
    ("reverse", "misaligned", "misaligned access"),
    ("reverse_copied", "wait_dropped", "under way|returns while"),
    ("reverse_copied", "wait_unpaired", "wait with no group committed"),
    ("reverse_copied", "copy_abandoned", "returns while 1 cp.async copies"),
    ("reverse_copied", "copy_barrier_dropped", "no barrier in between|before anything|under way"),
    ("warp_sum", "wrong_lane", "which is not in the mask"),
    ("warp_sum", "shuffle_diverged", "shuffle at line .*: lane .* has returned|not reached by all"),
    ("warp_reverse", "shuffle_for_sync", "no barrier in between|before anything was written"),
    ("shared_unwritten", "none", "shared memory byte 28: read before anything was written"),
    ("read_null", "index_null", "null pointer|no allocation holds"),
]


@pytest.mark.skipif(ASAN, reason="the checks of accesses are those of the other variant")
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("kernel", "fault", "message"), FAULTS, ids=lambda v: str(v)[:24])
def test_faults_are_found(kernel: str, fault: str, message: str, seed: int) -> None:
    with pytest.raises(RuntimeError, match=rf"^selftest {kernel}: launch failed: .*({message})"):
        run(kernel, fault, seed)


def test_a_fault_leaves_the_emulator_usable() -> None:
    if not ASAN:
        with pytest.raises(RuntimeError, match="seed 7"):
            run("reverse", "barrier_skipped", 7)
    test_shared_memory_barriers_and_copies("reverse", 0)


def test_the_limits_of_a_launch_are_checked() -> None:
    with pytest.raises(RuntimeError, match="invalid configuration argument"):
        load().run("reverse", 64, 64, 0, 0)


def test_what_was_run_is_counted() -> None:
    before = load().counters()
    run("reverse")
    after = load().counters()
    assert after["threads"] - before["threads"] == BLOCKS * 64
    assert after["barriers"] - before["barriers"] == BLOCKS
