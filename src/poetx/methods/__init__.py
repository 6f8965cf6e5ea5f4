"""What trains a model: a method is one file. How to add one: :class:`poetx.methods.base.Method`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from poetx.lazy import lazy_names

if TYPE_CHECKING:
    from poetx.methods.base import Method, convert_model, merge_handle, method_of, release_handle

__all__ = ["Method", "convert_model", "merge_handle", "method_of", "release_handle"]

__getattr__ = lazy_names(
    __name__,
    {"poetx.methods.base": ("Method", "convert_model", "merge_handle", "method_of", "release_handle")},
)
