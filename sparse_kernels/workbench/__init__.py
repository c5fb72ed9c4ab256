"""Experiments: nets, data, the training loop, reports. Used by cli and benchmarks."""
