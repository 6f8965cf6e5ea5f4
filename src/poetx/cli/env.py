"""``poetx env``: what there is to train on."""

from __future__ import annotations

import typer


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command(epilog="Example: poetx env")(env)


def env() -> None:
    """Show versions, devices, and which kernels are used and why."""
    import torch

    from poetx.models import resolve_device
    from poetx.ops.dispatch import kernel_report
    from poetx.train.environment import device_name, versions

    rows = list(versions().items())
    device = resolve_device("auto")
    rows.append(("device", f"{device} ({device_name(device)})"))
    rows += [
        (f"cuda:{index}", f"{properties.name}, {properties.total_memory / 2**30:.1f} GiB")
        for index in range(torch.cuda.device_count())
        for properties in [torch.cuda.get_device_properties(index)]
    ]
    rows.append(("cpu threads", str(torch.get_num_threads())))
    rows += kernel_report()
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")
