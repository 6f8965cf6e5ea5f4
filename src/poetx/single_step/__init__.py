"""The single-step form: rotations folded into the weight at every step (method, section 7)."""

from poetx.single_step.optimizer import POETX

__all__ = ["POETX"]
