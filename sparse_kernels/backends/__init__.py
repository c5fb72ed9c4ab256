"""Backends: modules of equal standing that implement the operators under the same names.

`reference` (plain dense torch, any dtype and device) is the oracle of every test; the others
compute with the stored non-zeros only. Signatures: see :mod:`sparse_kernels.backends.reference`.
"""
