"""Rivals of POET-X on dense matrices, beside AdamW on the rest: what ``optimizer.name`` and ``method=`` call by a word.

Each is a class over matrices alone, with a float64 reference in its test; :data:`RULES` says on which matrices it runs.
"""
