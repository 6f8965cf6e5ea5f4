"""POETX, the optimizer of the single step: what it is given, one matrix, its step, and what it saves."""
