"""Every reader on damaged files: its own error, or an answer; never another exception.

A few seconds of plain mutation here; ``python tools/fuzz_readers.py`` does it guided by coverage
and for as long as wanted.
"""

from __future__ import annotations

import random

import pytest

pytest.importorskip("safetensors", reason="checkpoints need safetensors")
from reader_targets import TARGETS

ROUNDS = 300
INTERESTING = (b"\xff" * 8, b"\x00" * 8, b"-1", b"1e999", b"NaN", b'"', b"{", b"[", b"null", b"$")


def mutated(data: bytes, rng: random.Random) -> bytes:
    """``data`` with a few bytes changed, cut out, doubled or replaced by awkward ones."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at, length = rng.randrange(len(out) + 1), rng.choice((1, 2, 8, 64))
        kind = rng.randrange(5)
        if kind == 0 and out:
            out[at % len(out)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del out[at : at + length]
        elif kind == 2:
            out[at:at] = out[at : at + length]
        elif kind == 3:
            new = rng.choice(INTERESTING)
            out[at : at + len(new)] = new
        else:
            out[at:] = b"" if rng.random() < 0.5 else out[at:] + out[:length]
    return bytes(out)


@pytest.mark.parametrize("name", TARGETS)
def test_reader_refuses_or_reads(name: str) -> None:
    target, seeds = TARGETS[name]
    rng = random.Random(20)
    for seed in seeds:
        target(seed)
        for _ in range(ROUNDS):
            data = mutated(seed, rng)
            try:
                target(data)
            except Exception as problem:
                raise AssertionError(f"{name} on {data[:200]!r}: {problem!r}") from problem
