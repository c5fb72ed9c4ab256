"""A plugin of pytest, ``-p gpu_recorder``: notes every test in a journal, runs none a second time.

tools/gpu_check.py starts it on a GPU machine; variables of the environment tell it what to do.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from gpu_journal import DEADLINE, IDENTITY, PATH, PREFIX, SHARE, Journal, cuda_works, left, share

COLLECTED = "collection of "


class Recorder:
    """Leaves out tests that the journal has, notes the others, stops when time is up.

    Also stops after a failure that leaves CUDA unusable: what follows in this process would fail.
    """

    def __init__(self, journal: Journal, deadline: float, index: int, count: int, prefix: str):
        self.journal, self.deadline, self.prefix = journal, deadline, prefix
        self.index, self.count = index, count
        self.reports: list[Any] = []
        self.uncollected: dict[str, str] = {}  # files that cannot be imported, and why

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.uncollected[COLLECTED + report.nodeid] = _why(report)

    @pytest.hookimpl(trylast=True)  # after -m and -k
    def pytest_collection_modifyitems(self, config: Any, items: list[Any]) -> None:
        names = [item.nodeid for item in items]
        if self.index == 0:
            self._note_uncollected()
            self.journal.count(self.prefix, len(names) + len(self.uncollected))
        mine = set(share(names, self.index, self.count))
        todo = set(left(self.journal, (self.prefix + n for n in names if n in mine)))
        if time.time() > self.deadline:
            todo.clear()
        config.hook.pytest_deselected(
            items=[i for i in items if self.prefix + i.nodeid not in todo]
        )
        items[:] = [item for item in items if self.prefix + item.nodeid in todo]

    def _note_uncollected(self) -> None:
        """A failed collection is a failed case; one that works now is no case any more."""
        mine = self.prefix + COLLECTED
        for key in [k for k in self.journal.entries if k.startswith(mine)]:
            if key.removeprefix(self.prefix) not in self.uncollected:
                self.journal.forget(key)
        for name, why in self.uncollected.items():
            self.journal.finish(self.prefix + name, "failed", why=why)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.reports.clear()
        self.journal.begin(self.prefix + nodeid)

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.reports.append(report)

    def pytest_runtest_protocol(self, item: Any, nextitem: Any) -> None:
        self.session = item.session  # None: pytest goes on with its own protocol

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        failed = [report for report in self.reports if report.failed]
        skipped = [report for report in self.reports if report.skipped]
        if failed:
            self.journal.finish(self.prefix + nodeid, "failed", why=_why(failed[0]))
            if not cuda_works():
                self.session.shouldstop = "CUDA is unusable after the last failure"
        else:
            outcome = {"why": _why(skipped[0])} if skipped else {}
            kind = "skipped" if skipped else "passed"
            self.journal.finish(self.prefix + nodeid, kind, **outcome)
        if time.time() > self.deadline:
            self.session.shouldstop = "time is up"


def _why(report: Any) -> str:
    if isinstance(report.longrepr, tuple):  # of a skipped test: file, line, reason
        return str(report.longrepr[2])
    crash = getattr(report.longrepr, "reprcrash", None)
    return str(report.longrepr if crash is None else crash.message)[-400:]


def pytest_configure(config: Any) -> None:
    """Register what the variables of the environment describe."""
    journal = Journal(Path(os.environ[PATH]), json.loads(os.environ[IDENTITY]))
    index, count = map(int, os.environ.get(SHARE, "0/1").split("/"))
    deadline = float(os.environ.get(DEADLINE, "inf"))
    config.pluginmanager.register(
        Recorder(journal, deadline, index, count, os.environ.get(PREFIX, "")), "gpu-recorder"
    )
