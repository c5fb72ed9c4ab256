"""The benchmark suite: ``sparse-kernels bench ops|layers|networks|peers|scaling|inference``.

One problem list (``shapes``), one way to validate and to make contenders (``contest``), one timing
function (``workbench.timing``), one writer of results (``results``). Each benchmark is a module
with ``run(settings..., journal) -> dict``, ``tables(results) -> str`` and figures in ``plots``.
"""
