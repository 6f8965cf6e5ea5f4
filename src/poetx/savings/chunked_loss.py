"""Cross entropy of a linear head without the logits: chunks of the vocabulary, forward and backward.

For hidden states x [N, h] and a head W [V, h], plain code holds N × V logits in the model's dtype, once more in
float32, their log-softmax and its gradient: 12 bytes each, 3 GiB for 2048 tokens and 128 256 words. Here

    forward    lse_n = log Σ_v exp(x_n · W_v)  from one chunk of v after the other;  loss_n = lse_n − x_n · W_label
    backward   p = exp(x · W_cᵀ − lse) − onehot,  dx += p · W_c,  dW_c = pᵀ · x       chunk by chunk again

with chunks of v, not of n, so that each row of dW is one product with all tokens, rounded once, as in the plain
loss. The price is the logits' product done twice: 8Nhv operations instead of 6Nhv.

``torch.nn.functional.linear_cross_entropy`` (torch 2.13) cuts the tokens instead and adds the chunks' losses in the
inputs' dtype. On bfloat16 inputs (512 tokens, 8192 words, summed) its loss is off by 1.8e-2 and dW by 3.5e-3, relative;
the plain loss and this one by 1.2e-5 and 8e-4.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import TorchDispatchMode

from poetx.errors import UserError

#: Bytes of one chunk of float32 logits.
_CHUNK_BYTES = 128 << 20


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Saves x [N, h], the head's weight and bias, the labels [N] and lse [N] in float32."""

    @staticmethod
    def forward(ctx, x, weight, bias, labels, ignore_index, rows):
        _check_labels(labels, weight.shape[0], ignore_index)
        dtype = torch.float32 if x.dtype != torch.float64 else torch.float64
        lse = x.new_full((x.shape[0],), -float("inf"), dtype=dtype)
        picked = torch.zeros_like(lse)
        for start in range(0, weight.shape[0], rows):
            logits = _logits(x, weight, bias, start, rows, dtype)
            inside = (labels >= start) & (labels < start + logits.shape[1])
            at = (labels - start).clamp(0, logits.shape[1] - 1)
            picked += torch.where(inside, logits.gather(1, at[:, None]).squeeze(1), 0)
            lse = torch.logaddexp(lse, logits.logsumexp(1))
            del logits
        ctx.save_for_backward(x, weight, bias, labels, lse)
        ctx.ignore_index, ctx.rows = ignore_index, rows
        return torch.where(labels == ignore_index, 0, lse - picked)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, bias, labels, lse = ctx.saved_tensors
        needs_dx, needs_dW, needs_db = ctx.needs_input_grad[:3]
        scale = torch.where(labels == ctx.ignore_index, 0, grad.to(lse.dtype))[:, None]
        dx = torch.zeros_like(x, dtype=lse.dtype) if needs_dx else None
        dW = torch.empty_like(weight) if needs_dW else None
        db = torch.empty_like(bias) if needs_db else None
        for start in range(0, weight.shape[0], ctx.rows):
            p = _logits(x, weight, bias, start, ctx.rows, lse.dtype)
            columns = p.shape[1]
            p.sub_(lse[:, None]).exp_()
            inside = (labels >= start) & (labels < start + columns)
            at = (labels - start).clamp(0, columns - 1)
            p.scatter_add_(1, at[:, None], -inside[:, None].to(p.dtype))
            p.mul_(scale)
            if db is not None:
                db[start : start + columns] = p.sum(0)
            p = p.to(x.dtype)
            W = weight[start : start + columns]
            if dx is not None:
                dx += p @ W.to(x.dtype)
            if dW is not None:
                dW[start : start + columns] = p.T @ x
            del p
        return None if dx is None else dx.to(x.dtype), dW, db, None, None, None


def _logits(x: Tensor, weight: Tensor, bias: Tensor | None, start: int, rows: int, dtype: torch.dtype) -> Tensor:
    """Rounded to x's dtype first, as the head itself would give them; a fresh tensor."""
    W = weight[start : start + rows].to(x.dtype)
    logits = x @ W.T if bias is None else torch.addmm(bias[start : start + rows].to(x.dtype), x, W.T)
    return logits.to(dtype)


def chunked_cross_entropy(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    chunk_bytes: int = _CHUNK_BYTES,
) -> Tensor:
    """``F.cross_entropy(F.linear(x, weight, bias).float(), labels)``, its value and gradients, without the logits.

    Args:
        x: [..., h], the last hidden state. Under autocast it and the weight take part in autocast's dtype.
        weight: [V, h]; bias [V] or None.
        labels: [...], int64; positions with ``ignore_index`` count for nothing.
        reduction: ``"mean"`` over the positions that count, ``"sum"``, or ``"none"`` (shape of ``labels``).
        chunk_bytes: bound on one chunk of float32 logits.

    Raises:
        UserError: a reduction that does not exist, shapes that do not fit, labels that are no integers or (on a CPU;
            elsewhere the device's own assertion) are no words.
    """
    if reduction not in ("mean", "sum", "none"):
        raise UserError(f"reduction={reduction!r}: must be mean, sum or none")
    if labels.shape != x.shape[:-1]:
        raise UserError(
            f"labels: shape {tuple(labels.shape)}, but x has {tuple(x.shape[:-1])} positions; shift both alike"
        )
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    x_NF, flat = x.reshape(-1, x.shape[-1]), labels.reshape(-1)
    rows = max(1, min(weight.shape[0], chunk_bytes // (4 * max(1, x_NF.shape[0]))))
    with torch.autocast(device, enabled=False):
        loss = _ChunkedCrossEntropy.apply(x_NF, weight, bias, flat, ignore_index, rows)
    if reduction == "none":
        return loss.view(labels.shape)
    total = loss.sum()
    return total / (flat != ignore_index).sum() if reduction == "mean" else total


def _check_labels(labels: Tensor, words: int, ignore_index: int) -> None:
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise UserError(f"labels: {labels.dtype}, must be whole numbers (int64), not shares of classes")
    if labels.is_meta or type(labels) is not Tensor or torch.compiler.is_compiling():
        return
    fit = (((labels >= 0) & (labels < words)) | (labels == ignore_index)).all()
    if labels.device.type != "cpu":
        said = f"chunked loss: a label is not below {words}, the rows of weight"
        torch._assert_async(fit, said)  # pyright: ignore[reportPrivateImportUsage]
    elif not fit:
        raise UserError(
            f"labels: {int(labels.min())} to {int(labels.max())}, must be 0 to {words - 1} or "
            f"{ignore_index}, which is ignored"
        )


def chunk_loss_(model: nn.Module, *, chunk_bytes: int = _CHUNK_BYTES) -> nn.Module:
    """Let a ``transformers`` causal language model compute its loss through :func:`chunked_cross_entropy`, in place.

    In ``train()`` mode ``model(input_ids, labels=…)`` then returns the same ``loss`` with ``logits=None``; calls
    without labels are as before. ``num_items_in_batch`` is understood as ``transformers`` does. Returns ``model``.

    In ``eval()`` mode the model is as before, so that ``Trainer.evaluate`` has its logits.

    Raises:
        UserError: as :func:`check_head`, or its config adds the loss of routers, which this would leave out.
    """
    plain = model.forward
    if isinstance(plain, functools.partial) and plain.func is _forward:
        return model
    check_head(model)
    # The class's own forward, so that a copy of the model calls the copy's.
    forward: Any = functools.partial(_forward, model, chunk_bytes)
    forward.__signature__ = inspect.signature(plain)  # by which the Trainer tells the columns that the model takes
    model.forward = forward  # type: ignore[method-assign]
    return model


def check_head(model: nn.Module) -> None:
    """Whether this model's logits are its head times its last hidden state and nothing else, seen in a forward pass of
    three tokens in ``eval()`` mode. On the meta device, where most models cannot run, the parts alone are looked at.

    Raises:
        UserError: no base model or head; a head that is no plain ``nn.Linear``; something between the last hidden state
            and the head (BERT's transform) or between the head and the logits (soft capping, scaling).
    """
    head, base = _parts(model)
    if getattr(getattr(model, "config", None), "output_router_logits", False):
        raise UserError(
            "chunked loss: output_router_logits=True of this model's config adds the routers' loss, which would be "
            "left out; set it to False, or train with the plain loss"
        )
    if head.weight.is_meta:
        return
    follower = _Follower()
    facts: dict[str, Any] = {}
    # OPT's model for language modelling calls the decoder inside its base model, not that itself.
    hooks = [
        *(part.register_forward_hook(follower.start_output) for part in (base, *base.children())),
        head.register_forward_pre_hook(lambda module, inputs: facts.update(before=follower.holds(inputs[0]))),
        head.register_forward_hook(lambda module, inputs, out: follower.start(out)),  # pyright: ignore
    ]
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        ids = torch.arange(3, device=head.weight.device)[None] % head.weight.shape[0]
        with torch.no_grad(), follower:
            facts["after"] = follower.holds(type(model).forward(model, input_ids=ids, use_cache=False).logits)
    except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError) as error:
        first = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise UserError(
            f"chunked loss: {type(model).__name__} cannot be tried on three tokens ({first[0][:120]}); train it with "
            "the plain loss"
        ) from None
    finally:
        for hook in hooks:
            hook.remove()
        for module in training:
            module.training = True
    if not facts.get("before"):
        raise UserError(
            f"chunked loss: {type(model).__name__} changes the last hidden state before its head; train it with the "
            "plain loss"
        )
    if not facts["after"]:
        raise UserError(
            f"chunked loss: {type(model).__name__} changes the logits after its head (soft capping or scaling); train "
            "it with the plain loss"
        )


class _Follower(TorchDispatchMode):
    """Follows a tensor through casts and views, and loses it in any other operation.

    Values would not do: on a fresh model, soft capping changes small logits by less than rounding does.
    """

    _KEEP = ("_to_copy", "slice", "select", "view", "_unsafe_view", "alias", "detach", "clone")

    def start(self, tensor: Tensor) -> None:
        self.followed = [tensor]

    def start_output(self, module: nn.Module, inputs: Any, out: Any) -> None:
        hidden = getattr(out, "last_hidden_state", None)
        if hidden is not None:
            self.start(hidden)

    def holds(self, tensor: Tensor) -> bool:
        return any(tensor is one for one in getattr(self, "followed", []))

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if args and isinstance(args[0], Tensor) and self.holds(args[0]):
            name = function.overloadpacket.__name__
            if name in self._KEEP:
                self.followed.append(out)
            elif name.endswith("_"):
                self.followed = []  # changed in place
        return out


def _parts(model: nn.Module) -> tuple[Any, Any]:
    getter: Any = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    base = getattr(model, getattr(model, "base_model_prefix", "") or "-", None)
    if head is None or base is None or base is model:
        raise UserError(
            f"chunked loss: {type(model).__name__} is not a transformers causal language model with a base model and "
            "a head; call poetx.savings.chunked_cross_entropy on its last hidden state instead"
        )
    if type(head) is not nn.Linear:
        raise UserError(f"chunked loss: the head is a {type(head).__name__}, not a plain nn.Linear; exclude it")
    if head._forward_hooks or head._forward_pre_hooks:
        raise UserError("chunked loss: the head has hooks, which would not be called; use the plain loss")
    loss = getattr(model, "_loss_function", None)
    if loss is not None and getattr(loss, "__name__", "") != "ForCausalLMLoss":
        raise UserError(
            "chunked loss: model.loss_function was replaced, and would be left out; train with the plain loss"
        )
    return head, base


def _forward(model: nn.Module, chunk_bytes: int, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
    if labels is None or not model.training:
        return type(model).forward(model, *args, **kwargs | ({} if labels is None else {"labels": labels}))
    from transformers.modeling_outputs import CausalLMOutputWithPast

    head, base = _parts(model)
    items = kwargs.pop("num_items_in_batch", None)
    shifted = kwargs.pop("shift_labels", None)
    kwargs.pop("logits_to_keep", None)
    ignore_index = kwargs.pop("ignore_index", -100)
    return_dict = kwargs.pop("return_dict", None)
    out = base(*args, **kwargs)
    if shifted is None:
        # The last position predicts nothing: one ignored label instead of a copy of the hidden states without it.
        shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=ignore_index)
    loss = chunked_cross_entropy(
        out[0],
        head.weight,
        shifted.to(out[0].device),
        bias=head.bias,
        reduction="mean" if items is None else "sum",
        ignore_index=ignore_index,
        chunk_bytes=chunk_bytes,
    )
    if items is not None:
        loss = loss / items
    kept: Any = {name: getattr(out, name, None) for name in ("past_key_values", "hidden_states", "attentions")}
    output = CausalLMOutputWithPast(loss=loss, **kept)
    return output.to_tuple() if return_dict is False else output
