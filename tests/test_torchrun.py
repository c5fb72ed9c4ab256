"""`sparse-kernels train` under torchrun: a rank that dies, a restart, the same weights."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from kill_support import differences, outcome
from rank_support import TESTS, environment

from sparse_kernels.workbench.errors import WorkbenchError
from sparse_kernels.workbench.ranks import Ranks

WORDS = (
    "train --data mnist-sample --density 0.1 --batch-size 201 --epochs 2 --holdout 0.8 "
    "--update-every 3 --window-tolerance 0.6 --threads 1 --checkpoint-every 2 --name r --resume"
)
TIMEOUT = 280


def torchrun(
    out: Path, *, restarts: int = 0, kill: tuple[int, int] | None = None
) -> subprocess.CompletedProcess[str]:
    """A job of two ranks; kill: the rank that dies and the step before which it does."""
    out.mkdir()
    settings = environment()
    if kill is not None:
        settings |= {"KILL_RANK": str(kill[0]), "KILL_STEP": str(kill[1])}
    words = ["--standalone", "--nproc-per-node", "2", "--max-restarts", str(restarts)]
    script = str(TESTS / "torchrun_rank.py")
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *words, script, *WORDS.split(),
         "--out", str(out)],
        env=settings, capture_output=True, text=True, timeout=TIMEOUT, check=False, cwd=out,
    )  # fmt: skip


def end(folder: Path) -> Any:
    found = outcome(folder / "r")
    found["experiment"]["config"].pop("out")
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("job") / "whole"
    done = torchrun(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("written: ") == 1  # by rank 0 alone
    assert [path.name for path in folder.iterdir()] == ["r"]
    return end(folder)


@pytest.mark.parametrize(("rank", "step", "saved"), [(1, 7, 6), (0, 6, 6)])
def test_a_restarted_job_ends_with_the_same_weights(
    rank: int, step: int, saved: int, whole: Any, tmp_path: Path
) -> None:
    """Rank 0, which writes the checkpoints, or the other one."""
    done = torchrun(tmp_path / "killed", restarts=1, kill=(rank, step))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "resuming from" in done.stdout and f"(step {saved})" in done.stdout
    assert differences(end(tmp_path / "killed"), whole) == []
    # Two ranks, whose generators are not the same, are in the checkpoint.
    states = [whole["generators"]["torch"], *(g["torch"] for g in whole["rank_generators"])]
    assert len(states) == 2
    assert whole["sparse-masks"]["updates"] == 2
    # A thread that still works while the interpreter shuts down aborts the process (ranks.py).
    threads = dict(re.findall(r"threads of rank (\d): \[(.*?)\];", done.stderr))
    assert sorted(threads) == ["0", "1"] and "gloo" not in "".join(threads.values()), threads


def test_a_dead_rank_ends_the_job_with_its_name(tmp_path: Path) -> None:
    done = torchrun(tmp_path / "dead", kill=(1, 3))
    output = done.stdout + done.stderr
    assert done.returncode != 0
    root = output[output.index("Root Cause") :]
    assert "rank      : 1 (local_rank: 1)" in root and "SIGKILL" in root, output


def test_shares_of_a_batch() -> None:
    ranks = [Ranks(), Ranks()]
    for rank, each in enumerate(ranks):
        each.rank, each.world = rank, 2
    x, y = torch.arange(10).reshape(5, 2), torch.arange(5)
    shares = [each.share(x, y) for each in ranks]
    assert [share[1].tolist() for share in shares] == [[0, 2, 4], [1, 3]]
    assert torch.equal(shares[1][0], x[1::2])
    ranks[0].check_batches(100, 50)
    with pytest.raises(WorkbenchError, match="a batch of 1, expected at least one for each of 2"):
        ranks[0].check_batches(101, 50)
