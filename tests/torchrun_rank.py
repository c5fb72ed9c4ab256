"""`sparse-kernels` on a rank that torchrun starts; KILL_RANK and KILL_STEP name one that dies.

It dies by SIGKILL before that step, the first time that the job is started only. A rank that ends
tells the names of its threads.
"""

from __future__ import annotations

import atexit
import gc
import os
import signal
import sys
from pathlib import Path
from typing import Any

from sparse_kernels import cli
from sparse_kernels.workbench import contenders


def arrange_death() -> None:
    first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if not first or os.environ.get("KILL_RANK") != os.environ["RANK"]:
        return
    whole, when = contenders.Contender.step, int(os.environ["KILL_STEP"])

    def step(self: contenders.Contender, *batch: Any) -> float:
        if self.steps_done == when:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(self, *batch)

    contenders.Contender.step = step  # type: ignore[method-assign]


def tell_threads() -> None:
    names = sorted(task.read_text().strip() for task in Path("/proc/self/task").glob("*/comm"))
    print(f"threads of rank {os.environ['RANK']}: {names};", file=sys.stderr)


if __name__ == "__main__":
    gc.disable()  # what lies in cycles goes when the code asks for it, not by luck
    atexit.register(tell_threads)
    arrange_death()
    cli.main()
