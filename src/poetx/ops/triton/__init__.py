"""Triton kernels, each the twin of a plain-torch function in :mod:`poetx.ops`; nothing here is imported before use."""
