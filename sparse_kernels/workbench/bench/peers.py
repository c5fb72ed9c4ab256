"""Against other sparse libraries: forward + backward where they train, else forward."""

from __future__ import annotations

import math
from importlib import metadata
from typing import Any

from .. import machine
from ..timing import interleave
from . import contest, peer_entries
from .results import Journal, markdown, milliseconds
from .shapes import LayerShape, choose

_MIN_SAMPLE = 0.01
_PACKAGES = ("sparseprop", "sparselab", "scipy", "torch")


def run(
    *,
    names: tuple[str, ...],
    density: float,
    batch_size: int,
    rounds: int,
    seconds: float,
    journal: Journal,
) -> dict[str, Any]:
    """One row per layer, element blocks (the peers know no others); plain data.

    A peer that is not installed, does not serve a layer or computes it wrongly is noted as missing
    with the reason. Raises WorkbenchError if our own layer is wrong.
    """
    rows = []
    for shape in choose(names, "core"):
        row = journal.row(
            shape.name,
            lambda shape=shape: _measure(shape, density, batch_size, rounds, seconds),  # type: ignore[misc]
        )
        shown = [
            f"{name} {ratio:.2f}x" for part in ("forward", "both")
            for name, ratio in row[part]["against"].items()
        ]  # fmt: skip
        print(f"{shape.name:<20} {', '.join(shown) or 'no peer runs'}", flush=True)
        rows.append(row)
    return {"rows": rows, "versions": _versions(), "summary": summary(rows)}


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _measure(
    shape: LayerShape, density: float, batch: int, rounds: int, seconds: float
) -> dict[str, Any]:
    race = contest.set_up(shape, density, (1, 1), batch)
    sparse = contest.sparse_entry(race)
    race.admit(sparse)
    entries = [sparse, *contest.dense_entries(race, compiled=False)]
    for name in peer_entries.NAMES:
        entry = race.invite(name, lambda name=name: peer_entries.make(name, race))  # type: ignore[misc]
        if entry is not None:
            entries.append(entry)
    row: dict[str, Any] = {"layer": shape.name, "batch": race.x.shape[0], "errors": race.errors,
                           "missing": race.missing}  # fmt: skip
    for part in ("forward", "both"):
        calls = {e.name: getattr(e, part) for e in entries if getattr(e, part) is not None}
        timings = interleave(calls, rounds, 1, budget=seconds / 2, min_seconds=_MIN_SAMPLE)
        own = timings["sparse"].median
        row[part] = contest.compare(timings)
        # Of a peer that trains, forward + backward counts; its forward is in the timings.
        counted = peer_entries.FORWARD_ONLY if part == "forward" else peer_entries.TRAINING
        row[part]["against"] = {n: t.median / own for n, t in timings.items() if n in counted}
    _keep_faster_variant(row)
    return row


def _keep_faster_variant(row: dict[str, Any]) -> None:
    """sparseprop counts once, by the faster of its two ways."""
    against = row["both"]["against"]
    variant = peer_entries.TRAINING[1]
    if variant in against:
        against["sparseprop"] = min(against.get("sparseprop", math.inf), against.pop(variant))
    for name in list(row["missing"]):
        if name == variant and "sparseprop" in against:
            del row["missing"][name]


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Geometric mean and least of our speedup, over everything and by peer."""
    by_peer: dict[str, list[float]] = {}
    for row in rows:
        for part in ("forward", "both"):
            for name, ratio in row[part]["against"].items():
                by_peer.setdefault(name, []).append(ratio)
    # scipy uses one thread, so it is reported and not counted.
    counted = [ratios for name, ratios in by_peer.items() if name != "scipy.sparse"]
    groups = {**by_peer, "all but scipy": [ratio for ratios in counted for ratio in ratios]}
    return {
        name: {
            "geomean": math.exp(sum(map(math.log, ratios)) / len(ratios)),
            "least": min(ratios),
            "layers": len(ratios),
        }
        for name, ratios in groups.items()
        if ratios
    }


def tables(results: dict[str, Any]) -> str:
    """Markdown: milliseconds of everybody, our speedup over each peer, who is missing and why."""
    settings = results["settings"]
    lines = [
        f"Peers at density {100 * settings['density']:g} %, element blocks, batch "
        f"{settings['batch_size']}; milliseconds, median [quartiles]; in brackets how much faster "
        "ours is.",
        machine.one_line(results["machine"]),
        "Versions: " + ", ".join(f"{n} {v}" for n, v in results["versions"].items()) + ".",
        "",
    ]
    for part, title, names in (
        ("both", "forward + backward", peer_entries.TRAINING),
        ("forward", "forward", peer_entries.NAMES),
    ):
        rows = []
        for row in results["rows"]:
            timings, best = row[part]["timings"], row[part]["dense_best"]
            own = timings["sparse"]["median"]
            cells = [row["layer"], milliseconds(timings["sparse"])]
            for name in (best, *names):
                timing = timings.get(name)
                ratio = f" ({timing['median'] / own:.2f}x)" if timing else ""
                cells.append(milliseconds(timing) + ratio if timing else "missing")
            rows.append(cells)
        lines += [*markdown([title, "sparse_kernels", "best dense", *names], rows), ""]
    for name, found in results["summary"].items():
        lines.append(
            f"Against {name}: geometric mean {found['geomean']:.2f}x, least {found['least']:.2f}x "
            f"({found['layers']} measurements)."
        )
    lines.append("")
    reasons = {(name, why): None for row in results["rows"] for name, why in row["missing"].items()}
    lines += [f"Missing: {name} ({why})." for name, why in reasons]
    return "\n".join(lines)
