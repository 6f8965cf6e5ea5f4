"""``poetx env``: what there is to train on."""

from __future__ import annotations

from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command(epilog="Examples: poetx env | poetx env --measure")(env)


def env(
    measure: Annotated[
        bool,
        typer.Option(
            help="Measure, in seconds, how fast weights come from host memory and products run: poetx memory --link."
        ),
    ] = False,
) -> None:
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
    if measure:
        from poetx.planner.link import measure_link

        link = measure_link(device)
        what = "float32" if device.type == "cpu" else "bfloat16"
        rows += [
            ("from host memory", f"{link.bandwidth / 1e9:.1f} GB/s"),
            ("products", f"{link.flops / 1e12:.3g} TFLOP/s in {what}"),
            ("for plans", f"poetx memory RECIPE --gpu GB --host GB --link {link}"),
        ]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")
