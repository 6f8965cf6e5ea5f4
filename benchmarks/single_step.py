"""Single-step POET-X beside AdamW, Muon and the paper's form: validation loss at equal tokens, speed and state.

    python -m benchmarks.single_step sweep [--scale small|wide|5m|60m] [--steps 400]
    python -m benchmarks.single_step ablate
    python -m benchmarks.single_step final          # seeds 1 and 2 of each method's best row
    python -m benchmarks.single_step run method=muon matrix_lr=3e-3 seed=1

An experiment is a list of runs; one run is one row, named by all its settings, and a run whose row is in ``--out`` is
not repeated, so a sweep that was stopped goes on where it was. Every run of a scale sees the same windows in an order
that depends on its seed, and is judged on the same held-out windows.

Weights and optimizer states are float32; ``precision=bf16`` puts the matrix products in bfloat16 by autocast,
attention apart; ``compile=true`` trains through torch.compile (1.7 times faster on one core). ``clip`` is on the
global norm of the gradients of the parameters that are not rotated: the layer form has no gradient of the others.
AdamW and Muon, which have, clip all of them.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import math
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.record import LATER, append, provenance
from benchmarks.weights import weight_statistics
from poetx import POETX, PoetConfig, convert_, merge_every, param_groups
from poetx.layers.base import fresh_weight


@dataclass(frozen=True)
class Scale:
    """A model and a budget: steps of ``batch`` windows of ``seq_len`` tokens."""

    hidden: int
    mlp: int
    layers: int
    heads: int
    vocab: int
    seq_len: int
    batch: int
    steps: int
    micro_batch: int | None = None


SCALES = {
    "small": Scale(192, 512, 4, 6, 2048, 128, 16, 1000),
    "wide": Scale(384, 1024, 4, 12, 2048, 128, 16, 1000),
    "5m": Scale(256, 704, 6, 8, 2048, 256, 16, 1250),  # 4.8M parameters outside embedding and head, 5.1M tokens
    "60m": Scale(512, 1280, 8, 8, 32000, 256, 128, 6104, 64),  # 200M tokens: give --text, and a GPU
}
VALIDATION_TOKENS = 64 * 16 * 128
#: Where methods that keep the norm of a weight do best: rows of norm 0.5, a quarter of it onto the residual stream.
START: dict[str, Any] = {"init": "normalized", "init_scale": 0.5, "out_scale": 0.25}


@dataclass(frozen=True)
class Run:
    """Every setting of one run. ``lr`` is AdamW's, of whatever the method does not treat otherwise.

    ``matrix_lr``: of Muon (update RMS matched to AdamW's), of Adam on packed rotations, or the angle of single-step.
    ``init``: of the linear layers inside the blocks; ``"default"`` is the model's own N(0, 0.02), times ``init_scale``.
    ``out_scale``: a further factor on the layers that write to the residual stream (o_proj, down_proj).
    ``matrix_decay``: d divides ``matrix_lr`` by √(1 + d · share of the steps done), besides the schedule of all: what a
    growing weight does to the relative size of a step. ``norm_growth``: g lets the norm that single-step holds grow by
    √(1 + g) over the run, linearly in its square.
    ``embed_std``: of the embedding at the start. ``options``: further arguments of :class:`poetx.POETX`, or of
    :class:`poetx.PoetConfig` for the paper's form.
    """

    method: str = "single-step"  # or adamw, adamw-split (``matrix_lr`` for the matrices), muon, poet-x
    scale: str = "small"
    seed: int = 0
    steps: int | None = None
    lr: float = 3e-3
    matrix_lr: float = 0.012
    weight_decay: float = 0.0
    beta2: float = 0.95
    clip: float = 1.0
    init: str = "default"
    init_scale: float = 1.0
    out_scale: float = 1.0
    embed_std: float = 0.02
    block_size: int = 64
    merge_every: int | None = None
    matrix_decay: float = 0.0
    norm_growth: float = 0.0
    precision: str = "bf16"
    compile: bool = True
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def key(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True)


def single(angle: float = 0.012, **settings: Any) -> Run:
    """A single-step run: rows of norm 1, unless said otherwise; unknown names go to the optimizer."""
    known = {field.name for field in dataclasses.fields(Run)}
    options = {name: value for name, value in settings.items() if name not in known}
    fields: dict[str, Any] = {"init": "normalized"} | {n: value for n, value in settings.items() if n in known}
    return Run(matrix_lr=angle, options=options, **fields)


def _current(options: dict[str, Any]) -> dict[str, Any]:
    """The optimizer's arguments: rows that are there name one partition, which is all there is, and a ``spectrum``."""
    given = {name: value for name, value in options.items() if name not in ("partitions", "spectrum")}
    if options.get("partitions", 1) != 1:
        raise ValueError(
            f"partitions={options['partitions']}: this run cannot be made again; there is one partition now"
        )
    spectrum = options.get("spectrum", "fixed")
    return {"update": "rotation" if spectrum == "fixed" else spectrum} | given


def recommended(angle: float = 0.012, **changes: Any) -> Run:
    """The recommended short run, with ``changes``: any map of one contiguous partition, from small residual layers."""
    return single(angle, **({"lr": 0.012, "partitions": 1, "spectrum": "free"} | START | changes))


def sweep() -> Iterator[Run]:
    """At least four rates of every method, and three of what it leaves to AdamW, one seed."""
    for lr in (7.5e-4, 1.5e-3, 3e-3, 6e-3):
        yield Run("adamw", lr=lr)
    for matrix_lr in (3.75e-4, 7.5e-4, 1.5e-3, 3e-3):
        yield Run("adamw-split", lr=0.012, matrix_lr=matrix_lr)
        yield Run("adamw-split", lr=0.012, matrix_lr=2 * matrix_lr, out_scale=0.25)
    for matrix_lr in (1.5e-3, 3e-3, 6e-3, 1e-2):
        yield Run("muon", lr=0.012, matrix_lr=matrix_lr)
    for angle in (0.006, 0.008, 0.012, 0.018, 0.024):
        yield recommended(angle)
        yield recommended(angle, spectrum="fixed")
    for lr in (0.006, 0.024, 0.048):  # 0.012: above, and among the ablations
        yield Run("adamw-split", lr=lr, matrix_lr=1.5e-3, out_scale=0.25)
        yield Run("muon", lr=lr, matrix_lr=3e-3, out_scale=0.25)
        yield recommended(lr=lr)
    yield Run("adamw-split", lr=0.012, matrix_lr=1.5e-3, weight_decay=0.1)
    yield Run("muon", lr=0.012, matrix_lr=3e-3, weight_decay=0.1)
    for merge in (200, 400):
        for matrix_lr in (5e-4, 1e-3, 2e-3, 4e-3):
            yield Run("poet-x", lr=0.012, matrix_lr=matrix_lr, merge_every=merge, **START)


def ablate() -> Iterator[Run]:
    """One change at a time from the recommended single-step form, and the controls on others that explain them."""
    yield recommended()
    yield recommended(nesterov=False)
    for block_size in (32, 96, 128, 192):
        yield recommended(block_size=block_size)
    for momentum in (0.9, 0.98):
        yield recommended(momentum=momentum)
    for init_scale in (0.25, 1.0):
        yield recommended(init_scale=init_scale)
    yield recommended(init="default", init_scale=1.0)
    yield recommended(init="uniform")
    for out_scale in (0.1, 1.0):
        yield recommended(out_scale=out_scale)
    yield recommended(norm_growth=2.0)
    yield recommended(embed_std=0.5)
    yield recommended(beta2=0.999)
    yield Run("muon", lr=0.012, matrix_lr=3e-3, out_scale=0.25)
    yield Run("muon", lr=0.012, matrix_lr=3e-3, **START)
    yield Run("adamw-split", lr=0.012, matrix_lr=1.5e-3, **START)


def final(rows: list[dict[str, Any]]) -> Iterator[Run]:
    """Seeds 1 and 2 of every method's best setting among ``rows`` of seed 0."""
    for method in dict.fromkeys(row["method"] for row in rows):
        finite = [r for r in rows if r["method"] == method and r["seed"] == 0 and r["loss"] is not None]
        if finite:
            best = Run(**json.loads(min(finite, key=lambda row: row["loss"])["key"]))
            yield from (dataclasses.replace(best, seed=seed) for seed in (1, 2))


EXPERIMENTS: dict[str, Callable[[], Iterator[Run]]] = {"sweep": sweep, "ablate": ablate}


def build(run: Run, scale: Scale) -> Any:
    """A Llama of ``transformers`` with fresh weights, attention in float32 even under autocast."""
    from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(query.device.type, enabled=False):  # 10 times slower backward in bfloat16 on a CPU
            out, weights = sdpa_attention_forward(module, query.float(), key.float(), value.float(), *args, **kwargs)
        return out, weights

    AttentionInterface.register("sdpa_float32", attention)
    torch.manual_seed(run.seed)
    config = LlamaConfig(
        vocab_size=scale.vocab,
        hidden_size=scale.hidden,
        intermediate_size=scale.mlp,
        num_hidden_layers=scale.layers,
        num_attention_heads=scale.heads,
        num_key_value_heads=scale.heads,
        max_position_embeddings=scale.seq_len,
        tie_word_embeddings=False,
        pad_token_id=None,
        use_cache=False,
        attn_implementation="sdpa_float32" if not torch.cuda.is_available() else "sdpa",
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(run.embed_std / 0.02)
        for name, module in model.named_modules():
            if not isinstance(module, nn.Linear) or name == "lm_head":
                continue
            if run.init != "default":
                init = PoetConfig(init=run.init, seed=run.seed)  # type: ignore[arg-type]
                module.weight.copy_(fresh_weight(init, *module.weight.shape, name))
            module.weight.mul_(run.init_scale)
            if name.endswith(("o_proj", "down_proj")):
                module.weight.mul_(run.out_scale)
    return model


class Both:
    """Muon for the matrices and AdamW for the rest, stepped together."""

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self.optimizers = optimizers
        self.param_groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        self.state = {p: state for optimizer in optimizers for p, state in optimizer.state.items()}

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()
        self.state = {p: state for optimizer in self.optimizers for p, state in optimizer.state.items()}


def optimizer_for(model: Any, run: Run) -> tuple[Any, list[Tensor], list[nn.Parameter]]:
    """The optimizer, what the method treats as matrices (weights or packed rotations), and what is clipped."""
    betas = (0.9, run.beta2)
    if run.method == "poet-x":
        init: Any = "keep"  # the model was drawn as the run says
        convert_(
            model, PoetConfig(block_size=run.block_size, init=init, seed=run.seed, **{"neumann_order": 7} | run.options)
        )
        groups = param_groups(
            model, lr=run.lr, poet_lr=run.matrix_lr, weight_decay=run.weight_decay, betas=(0.9, 0.999), eps=1e-6
        )
        optimizer = torch.optim.AdamW(groups, betas=betas)
        merge_every(optimizer, model, steps=run.merge_every or 200)
        matrices = list(groups[0]["params"])
        return optimizer, matrices, [p for group in groups for p in group["params"]]
    linears = [m for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"]
    matrices = [m.weight for m in linears]
    ids = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in ids]
    if run.method == "single-step":
        optimizer = POETX(
            model,
            run.lr,
            angle=run.matrix_lr,
            block_size=run.block_size,
            norm_growth=run.norm_growth / (run.steps or SCALES[run.scale].steps),
            dense_optimizer=functools.partial(torch.optim.AdamW, betas=betas, weight_decay=0.0),
            weight_decay=run.weight_decay,
            seed=run.seed,
            **_current(run.options),
        )
        return optimizer, matrices, rest
    decay = [p for p in rest if p.ndim >= 2]
    groups = [
        {"params": decay, "weight_decay": run.weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    if run.method in ("adamw", "adamw-split"):
        lr = run.lr if run.method == "adamw" else run.matrix_lr
        groups.append({"params": matrices, "weight_decay": run.weight_decay, "lr": lr})
        return torch.optim.AdamW(groups, lr=run.lr, betas=betas), matrices, list(model.parameters())
    muon = torch.optim.Muon(
        matrices, lr=run.matrix_lr, weight_decay=run.weight_decay, adjust_lr_fn="match_rms_adamw", **run.options
    )
    return Both(muon, torch.optim.AdamW(groups, lr=run.lr, betas=betas)), matrices, list(model.parameters())


def factor(step: int, steps: int) -> float:
    """Linear warm-up over a tenth of the steps (100 of 1000), then a cosine to 10 %."""
    warmup = max(1, steps // 10)
    if step < warmup:
        return (step + 1) / warmup
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def data_for(scale: Scale, text: str, cache: Path) -> Any:
    from poetx.data.prepare import prepare_data
    from poetx.recipe import load_recipe

    overrides = [
        f"data.train={text}",
        f"data.vocab_size={scale.vocab}",
        f"data.seq_len={scale.seq_len}",
        "data.validation_fraction=0.05",
        f"data.cache_dir={cache}",
    ]
    return prepare_data(load_recipe("demo", overrides))


def train(run: Run, *, text: str, cache: Path) -> dict[str, Any]:
    """Train once. The row: settings, losses, weights, speed, bytes of state (all, for the matrices), peak memory.

    A run that diverges stops; its ``loss`` and last weights are null.
    """
    from poetx.data.sampler import batch_windows, evenly_spread

    scale = SCALES[run.scale]
    steps = run.steps or scale.steps
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = data_for(scale, text, cache)
    model = build(run, scale).to(device)
    optimizer, matrices, clipped = optimizer_for(model, run)
    peak_lrs = [group["lr"] for group in optimizer.param_groups]
    start_weights = weight_statistics(model)

    def forward(inputs: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=run.precision == "bf16"):
            logits = model(inputs).logits
        return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())

    compiled = torch.compile(forward) if run.compile else forward

    def loss_of(windows: list[int], split: Any) -> Tensor:
        call = compiled if torch.is_grad_enabled() else forward
        return call(*split.batch(windows).to(device)[:2])

    state_bytes: dict[Any, int] = {}
    curve, seconds, chunk, recent = [], [], scale.micro_batch or scale.batch, 0.0
    for step in range(steps):
        start = time.perf_counter()
        for group, peak in zip(optimizer.param_groups, peak_lrs, strict=True):
            group["lr"] = peak * factor(step, steps)
            if any(p is matrices[0] for p in group["params"]):
                group["lr"] /= math.sqrt(1 + run.matrix_decay * step / steps)
        windows = batch_windows(step, batch_size=scale.batch, windows=len(data.train), seed=run.seed)
        total = torch.zeros((), device=device)
        for first in range(0, len(windows), chunk):
            loss = loss_of(windows[first : first + chunk], data.train) * chunk / len(windows)
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(clipped, run.clip)
        optimizer.step()
        # All of it from the first step on, but for the paper's form just after a merge.
        state_bytes = state_bytes or {p: _bytes(state) for p, state in optimizer.state.items()}
        for p in model.parameters():
            p.grad = None
        recent += float(total)
        seconds.append(time.perf_counter() - start)
        every = max(1, steps // 20)
        if (step + 1) % every == 0:
            if not math.isfinite(recent):
                break
            curve.append(round(recent / every, 4))
            recent = 0.0
    ids = {id(p) for p in matrices}
    loss = _validation_loss(model, loss_of, data, evenly_spread, scale)
    return {
        "benchmark": "single_step",
        **dataclasses.asdict(run),
        "steps": steps,
        "tokens": steps * scale.batch * scale.seq_len,
        "loss": loss,
        "train_curve": curve,
        "weights": {"start": start_weights, "end": None if loss is None else weight_statistics(model)},
        "tokens_per_s": round(scale.batch * scale.seq_len / sorted(seconds)[len(seconds) // 2]),
        "state_bytes": sum(state_bytes.values()),
        "matrix_state_bytes": sum(size for p, size in state_bytes.items() if id(p) in ids),
        "peak_bytes": _peak_bytes(device),
        "data": data.meta.fingerprint[:12],
        "key": run.key(),
    }


@torch.no_grad()
def _validation_loss(model: Any, loss_of: Any, data: Any, evenly_spread: Any, scale: Scale) -> float | None:
    """Mean over one fixed set of at least :data:`VALIDATION_TOKENS` tokens (all there are, where fewer)."""
    model.eval()
    windows = evenly_spread(-(-VALIDATION_TOKENS // scale.seq_len), len(data.validation))
    total = 0.0
    for first in range(0, len(windows), 16):
        part = windows[first : first + 16]
        total += float(loss_of(part, data.validation)) * len(part)
    return round(total / len(windows), 5) if math.isfinite(total) else None


def _bytes(state: dict[str, Any]) -> int:
    return sum(v.numel() * v.element_size() for v in state.values() if isinstance(v, Tensor))


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _parse(words: list[str]) -> Run:
    """``name=value`` words as a run; values are JSON or plain text, unknown names options of the optimizer."""
    settings: dict[str, Any] = {}
    for word in words:
        name, _, value = word.partition("=")
        with contextlib.suppress(ValueError):
            value = json.loads(value)
        settings[name] = value
    if settings.get("method", "single-step") == "single-step":
        return single(**({"angle": settings.pop("matrix_lr", 0.012)} | settings))
    return Run(**settings)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("experiment", choices=[*EXPERIMENTS, "final", "run"])
    parser.add_argument("settings", nargs="*", help="name=value, of one run")
    parser.add_argument("--scale", choices=SCALES, help="model and budget of an experiment (small)")
    parser.add_argument("--steps", type=int, help="a shorter budget than the scale's, for an experiment")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/single_step.jsonl"))
    parser.add_argument("--text", default="builtin", help="what to train on; the 60m scale needs 200M tokens")
    parser.add_argument("--cache", type=Path, default=Path(".poetx-cache"))
    args = parser.parse_args()
    scale, steps = args.scale or "small", args.steps
    if args.experiment == "run":
        runs = [_parse(args.settings)]
    elif args.experiment == "final":
        budget = steps or SCALES[scale].steps
        runs = list(final([r for r in _read(args.out) if (r["scale"], r["steps"]) == (scale, budget)]))
    else:
        runs = [dataclasses.replace(run, scale=scale, steps=steps) for run in EXPERIMENTS[args.experiment]()]
    for run in runs:
        if run.key() in {_key(row) for row in _read(args.out)}:
            continue
        row = train(run, text=args.text, cache=args.cache)
        append(args.out, [row | provenance(torch.device("cuda" if torch.cuda.is_available() else "cpu"))])
        print(f"{row['loss']}  {row['tokens_per_s']} tokens/s  {row['key']}", flush=True)


def _key(row: dict[str, Any]) -> str:
    """The key of a row, with the settings that older rows do not name."""
    return json.dumps(LATER | json.loads(row["key"]), sort_keys=True)


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


if __name__ == "__main__":
    main()
