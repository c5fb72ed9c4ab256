"""The report's HTML page in a real headless browser without a network: all of it is shown."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from test_sweep import row

from sparse_kernels.workbench import sweep_report

BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome")
     if (found := shutil.which(name))),
    None,
)  # fmt: skip
# Appended to a copy of the page: what the browser made of it, written where --dump-dom shows it.
LOOK = """<script>addEventListener("load", () => {
  const images = [...document.images].map(i => [i.alt, i.complete && i.naturalWidth > 100]);
  const fetched = performance.getEntriesByType("resource").map(e => e.name);
  document.body.dataset.seen = JSON.stringify({
    images, outside: fetched.filter(n => !n.startsWith("data:")), mode: document.compatMode,
    rows: document.querySelectorAll("table tr").length, title: document.title,
    commands: [...document.querySelectorAll("li code")].map(c => c.textContent),
    wide: document.documentElement.scrollWidth > innerWidth});
});</script>"""


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs a browser: apt-get install chromium")
def test_a_browser_shows_tables_figures_and_commands(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the figures are matplotlib's")
    rows = [row(m, s, 0.9 + s / 100) for m in ("set", "sparse-momentum") for s in (0, 1)]
    rows += [
        {**row("snfs", s, 0.9 + s / 100), "variant": f"prune-rate={p}"}
        for s in (0, 1)
        for p in (0.2, 0.5)
    ]
    rows[0]["command"] = f"sparse-kernels train --out {tmp_path} --name run"
    layer = {"0": 0.05}
    run = {"contender": "sparse", "initial_layers": layer,
           "layers": [{"name": "0", "shape": [2, 3]}],
           "epochs": [{"epoch": 1, "density": 0.05, "layers": layer}]}  # fmt: skip
    results = {"runs": [run], "config": {}, "command": "", "machine": {}}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "results.json").write_text(json.dumps(results))
    (tmp_path / "sweep.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    sweep_report.write(tmp_path)
    page = tmp_path / "looked.html"
    text = (tmp_path / "sweep.html").read_text()
    page.write_text(text.replace("</body>", LOOK + "</body>"))
    assert BROWSER is not None
    done = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/p",
         "--host-resolver-rules=MAP * ~NOTFOUND", "--window-size=1600,1200",
         "--virtual-time-budget=20000", "--dump-dom", page.as_uri()],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    match = re.search(r'data-seen="([^"]*)"', done.stdout)
    assert match is not None, done.stderr[-2000:]
    seen = json.loads(html.unescape(match[1]))
    assert seen["images"] == [
        ["sweep-density", True], ["sweep-time", True], ["sweep-sensitivity", True],
        ["sweep-layers", True],
    ]  # fmt: skip
    assert seen["outside"] == [] and seen["mode"] == "CSS1Compat" and not seen["wide"]
    assert seen["rows"] == (1 + 4) + (1 + 3) and seen["title"] == "Sweep"
    assert seen["commands"] == [row["command"] for row in rows]
