"""What every kernel that rounds shares: bfloat16 up or down at random."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rounded(value, noise, dtype: tl.constexpr):
    """``value`` in ``dtype``, bfloat16 up or down at random in proportion to the distance, by 16 bits of ``noise``."""
    if dtype == tl.bfloat16:
        bits = value.to(tl.int32, bitcast=True) + (noise.to(tl.int32, bitcast=True) & 0xFFFF)
        cut = (bits & -65536).to(tl.float32, bitcast=True)
        return tl.where(value == value, cut, value).to(tl.bfloat16)
    return value.to(dtype)
