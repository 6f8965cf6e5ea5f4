"""Ranks of a process group."""
