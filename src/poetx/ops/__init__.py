"""The mathematics: a plain-torch reference, and the operators that training uses."""


def kernel_report() -> list[tuple[str, str]]:
    """(operator, which implementation runs and why), for ``poetx env``."""
    reason = "PyTorch (its own batched products and gathers; there is no Triton kernel for this operator yet)"
    return [(name, reason) for name in ("cayley", "linear_fast", "linear_mem", "fold")]
