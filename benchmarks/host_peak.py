"""Host memory while a sharded checkpoint is loaded for streaming: the weights, and how much more at the worst moment.

    python -m benchmarks.host_peak --layers 8 [--hidden 2048] [--in-files DIR] --out benchmarks/results/host_peak.jsonl
    python -m benchmarks.host_peak --shape qwen2.5-32b --layers 12 [--weights int4]

A Llama's checkpoint in bfloat16 is made of random numbers, one file a decoder layer, and loaded in a process of its own
as ``poetx train`` loads it with ``model.offload=frozen``, onto the stand-in for a GPU of ``tests/accelerator.py``. Its
"device" is host memory, too: what is there in the end is subtracted, what is there for a moment counts against us.
With ``--in-files`` the weights go to files there; pages of files, which the system takes back, are then left out.
``--shape``: decoder layers of that preset, ``--layers`` of them; the checkpoint takes their bytes in ``--scratch``.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import append, provenance
from poetx.models import model_config
from poetx.recipe import Recipe, load_recipe

VOCABULARY = 512  # embedding and head are on the device
MIB = 1 << 20


def config_of(shape: str | None, *, layers: int, hidden: int) -> Any:
    """The preset's decoder layers, or a square attention's and an MLP of 43 / 16 of the width, as in Llama 7B."""
    inner = -(-hidden * 43 // 16 // 256) * 256
    keys = [f"model.shape={shape}"] if shape else [f"model.hidden_size={hidden}", f"model.intermediate_size={inner}"]
    keys += [] if shape else [f"model.num_heads={hidden // 128}"]
    recipe = load_recipe("demo", [*keys, f"model.num_layers={layers}", "model.tie_embeddings=false"], text=False)
    config = model_config(recipe, vocab_size=VOCABULARY)
    config.dtype = torch.bfloat16
    return config


def write_checkpoint(directory: Path, config: Any) -> int:
    """A random model's files; bytes of one decoder layer."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    config.save_pretrained(directory)
    files: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in model.state_dict().items():
        parts = name.split(".")
        files.setdefault(f"model-{parts[2] if parts[1] == 'layers' else 'ends'}.safetensors", {})[name] = tensor
    generator, size = torch.Generator().manual_seed(0), 0
    for file, tensors in files.items():
        made = {
            name: torch.empty(tensor.shape, dtype=torch.bfloat16).normal_(std=0.02, generator=generator)
            for name, tensor in tensors.items()
        }
        save_file(made, directory / file)
        size = max(size, sum(2 * tensor.numel() for tensor in made.values()))
    places = {name: file for file, tensors in files.items() for name in tensors}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return size


def recipe_of(checkpoint: Path, place: Path | None, weights: str | None) -> Recipe:
    keys = [
        *(f"model.pretrained={checkpoint}", "method=mem", "poet.init=keep", "model.offload=frozen"),
        *(["model.offload_dir=" + str(place)] if place else []),
        *(["poet.weight_format=" + weights] if weights else []),
        *("train.dtype=bfloat16", "poet.weight_extra_bits=false", "data.seq_len=64", "poet.rotation_dtype=bfloat16"),
        "model.gradient_checkpointing=true",
    ]
    sizes = ("hidden_size", "intermediate_size", "num_layers", "num_heads")
    return load_recipe("llama-1b", [*keys, *(f"model.{size}=null" for size in sizes)], text=False)


def memory(*kinds: str) -> int:
    """Bytes of this process in memory: ``VmHWM``, the most so far, ``RssAnon``, no file's, ``VmRSS``, all."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) << 10 for line in lines if line.partition(":")[0] in kinds)


class Watch(threading.Thread):
    """The most of ``RssAnon``, looked at every few milliseconds."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most, self.over = 0, False

    def run(self) -> None:
        while not self.over:
            self.most = max(self.most, memory("RssAnon"))
            time.sleep(0.002)


def load(checkpoint: Path, place: Path | None, weights: str | None, results: Any) -> None:
    """Load it, and say what that took."""
    torch.set_num_threads(1)
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    from accelerator import NAME, accelerator
    from poetx.layers.walk import converted_layers
    from poetx.methods.base import convert_model
    from poetx.models import build_model

    with accelerator() as device:
        recipe = recipe_of(checkpoint, place, weights)
        if results is None:  # once before: imports and the like
            convert_model(build_model(recipe, vocab_size=VOCABULARY, end_of_text_id=0, device=device), recipe, device)
            return
        load(checkpoint.parent / "small", place, weights, None)
        before, anonymous = memory("VmRSS"), memory("RssAnon")
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
        watch, started = Watch(), time.perf_counter()
        watch.start()
        model = build_model(recipe, vocab_size=VOCABULARY, end_of_text_id=0, device=device)
        convert_model(model, recipe, device)
        seconds, watch.over = time.perf_counter() - started, True
        watch.join()
        most = watch.most - anonymous if place else memory("VmHWM") - before
        size = lambda tensors: sum(t.numel() * t.element_size() for t in tensors)  # noqa: E731
        base = size(t for _, layer in converted_layers(model) for t in layer.host_tensors())
        card = size(t for t in (*model.parameters(), *model.buffers()) if t.device.type == NAME)
        results.put({"base": base, "card": card, "peak": most, "seconds": round(seconds, 1)})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--shape", help="decoder layers of this preset, such as qwen2.5-32b, in place of --hidden")
    parser.add_argument("--weights", help="poet.weight_format: int8 or int4")
    parser.add_argument("--scratch", type=Path, help="where the checkpoint is made; a temporary directory unless given")
    parser.add_argument("--in-files", type=Path, help="the weights go to files there")
    parser.add_argument("--out", type=Path, help="append a JSON line here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        checkpoint, small = Path(scratch) / "checkpoint", Path(scratch) / "small"
        write_checkpoint(small, config_of(None, layers=1, hidden=256))
        config = config_of(args.shape, layers=args.layers, hidden=args.hidden)
        layer = write_checkpoint(checkpoint, config)
        os.environ["MALLOC_MMAP_THRESHOLD_"] = "262144"  # what the device frees is gone at once, as on a GPU
        context = multiprocessing.get_context("spawn")
        results = context.Queue()
        child = context.Process(target=load, args=(checkpoint, args.in_files, args.weights, results))
        child.start()
        found = results.get()
        child.join()
    held = found["card"] + (0 if args.in_files else found["base"])
    row = {
        "benchmark": "host_peak",
        "layers": args.layers,
        "shape": args.shape,
        "weights": args.weights,
        "hidden_size": config.hidden_size,
        "in_files": bool(args.in_files),
        **{f"{name}_mib": round(found[name] / MIB, 1) for name in ("base", "card", "peak")},
        "layer_mib": round(layer / MIB, 1),
        "more_than_held_in_layers": round((found["peak"] - held) / layer, 2),
        "seconds": found["seconds"],
    }
    print(row)
    if args.out:
        append(args.out, [row | provenance(torch.device("cpu"))])


if __name__ == "__main__":
    main()
