"""Measurements. Each module is a command (``python -m benchmarks.NAME``) that writes JSON lines."""
