"""The methods of the field as settings of SparseMomentum: which combination of rules is which.

    options = method("rigl").options
    SparseMomentum(model, optimizer, total_steps=..., update_every=100, **options)

Each is the method's choice of masks, on this package's exact counts and order of ties; learning
rates, initial weights and lengths of training are the experiment's. docs/training.md has the table,
and says which numbers are the method's own and which were chosen here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Method:
    """options: arguments of SparseMomentum; what is not named keeps its default."""

    source: str
    options: Mapping[str, Any] = field(default_factory=dict)
    distribution: str = "uniform"  # of `sparsify`
    update_every: int | None = None  # steps between updates; None: once per epoch
    start_density: float | None = None  # of `sparsify`; None: the density that training ends with


_ALONE: dict[str, Any] = {"redistribution": "none"}
# Only sparse momentum's code prunes nearly dense layers at a lower rate.
_PLAIN = {**_ALONE, "spare_dense": False}
_RIGL = {
    **_PLAIN,
    "growth": "gradient",
    "prune_rate": 0.3,
    "final_prune_rate": 0.0,
    "update_until": 0.75,
}
METHODS: dict[str, Method] = {
    "sparse-momentum": Method("Dettmers & Zettlemoyer 2019, arXiv 1907.04840"),
    "snfs": Method("sparse momentum without redistribution: SNFS in RigL's tables", _ALONE),
    "momentum-neuron": Method(
        "mode 'momentum_neuron' of the official code of sparse momentum", {"growth": "neuron"}
    ),
    "static": Method(
        "a random mask that stays",
        {**_PLAIN, "growth": "random", "prune_rate": 0.0, "final_prune_rate": 0.0},
    ),
    "set": Method(
        "Mocanu et al. 2018, arXiv 1707.04780",
        {**_PLAIN, "prune": "set", "growth": "random", "prune_rate": 0.3, "decay": "constant"},
        distribution="er",
    ),
    "dsr": Method(
        "after Mostafa & Wang 2019, arXiv 1902.05967",
        {
            "prune": "global_magnitude",
            "growth": "random",
            "redistribution": "survivors",
            "spare_dense": False,
        },
    ),
    "rigl": Method("Evci et al. 2020, arXiv 1911.11134", _RIGL, "erk", 100),
    "set-itop": Method(
        "Liu et al. 2021, arXiv 2102.02887, and its official code",
        {**_PLAIN, "growth": "random"},  # its code: a rate of 0.5, cosine to 0.005
        distribution="erk",
        update_every=1500,
    ),
    "rigl-itop": Method(
        "Liu et al. 2021, arXiv 2102.02887, and its official code",
        {**_PLAIN, "growth": "gradient"},
        distribution="erk",
        update_every=4000,
    ),
    "fan-in": Method(
        "after SRigL, Lasby et al. 2023, arXiv 2305.02299, without its ablation of neurons",
        {**_RIGL, "growth": "fan_in", "signal": "gradient"},
        distribution="uniform",
        update_every=100,
    ),
    "gmp": Method(
        "Zhu & Gupta 2017, arXiv 1710.01878",
        {
            **_PLAIN,
            "growth": "random",
            "prune_rate": 0.0,
            "final_prune_rate": 0.0,
            "update_until": 0.75,
        },
        update_every=100,
        start_density=1.0,
    ),
}


def method(name: str) -> Method:
    """The method `name`. Raises ValueError naming those there are."""
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; expected one of {', '.join(METHODS)}")
    return METHODS[name]
