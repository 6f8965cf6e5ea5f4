"""The mathematics: a plain-torch reference, and the operators that training uses.

Words: q, ``packed``, ``skew_in`` and ``skew_out`` are upper triangles of skew blocks, the parameters of a rotation; G
is the orthogonal block made of one. W' is the frozen weight as it is stored, rows and columns permuted
(``base_weight``, or codes in ``packed_weight``). Shapes are in names: ``x_NF`` is [N, F].
"""


def kernel_report() -> list[tuple[str, str]]:
    """(operator, which implementation runs on this machine and why), for ``poetx env``."""
    import torch

    from poetx.ops.dispatch import SMALLEST_BLOCK, machine_obstacle

    reason = machine_obstacle(torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu"))
    if reason is not None:
        return [(name, f"PyTorch ({reason})") for name in ("cayley", "rotate", "outer", "dequantize", "fold")]
    import triton

    fits = f"Triton {triton.__version__}; PyTorch for float64 and for blocks below {SMALLEST_BLOCK}"
    return [
        ("cayley", f"{fits}, for the exact transform"),
        ("rotate", fits),
        ("outer", fits),
        ("dequantize", f"Triton {triton.__version__}; PyTorch for float64 and for codes of 3, 5, 6 and 7 bits"),
        ("fold", "PyTorch (float32 products whatever the settings; once per merge)"),
    ]
