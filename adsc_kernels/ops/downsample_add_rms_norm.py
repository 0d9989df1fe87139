"""The step at a boundary of a pre-norm decoder: `downsample_add_rms_norm`."""

from typing import Any

import torch
from torch import Tensor

from adsc_kernels import checks, fakes
from adsc_kernels.ops import _composed
from adsc_kernels.ops._dispatch import call, choose, explain, native, register
from adsc_kernels.ops.downsample import upsample_grad
from adsc_kernels.rows import Stage, check_plain, check_rows, movement, row_source

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_LIMITS = {dtype: torch.finfo(dtype) for dtype in (torch.float32, torch.float64)}
_LEAST, _MOST = _LIMITS[torch.float32].tiny, _LIMITS[torch.float32].max


def downsample_add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    stage: Stage | None = None,
    eps: float = 1e-6,
    *,
    keep_indices: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Residual add and RMSNorm of the rows that survive into a stage; no other row is read.

    x, residual: [T_in, hidden], float32, float64, bfloat16 or float16, any distance between rows.
    weight: contiguous [hidden]. All of one dtype, on one device.
    stage or keep_indices: as for `downsample`. eps: 0, or a normal number of float32 (float64).
    Returns (normed, residual_out), both contiguous [T_out, hidden]:
      residual_out = x + residual, rounded to the dtype;
      normed = residual_out / sqrt(mean(residual_out ** 2) + eps) * weight, computed in float32
      (float64 for float64) and rounded once.
    Differentiable in x, residual and weight; dropped rows have gradient 0.

    Raises TypeError for another dtype, else as `downsample`.
    """
    op = native("downsample_add_rms_norm", x) if is_usual_eps(eps) else None
    if op is None:
        arguments = _check(x, residual, weight, stage, eps, keep_indices)
        grad = x.requires_grad or residual.requires_grad or weight.requires_grad
        return call(choose("downsample_add_rms_norm", x.device), *arguments, grad=grad)
    try:
        moved = movement(stage, keep_indices, x.shape[0])
        grad = x.requires_grad or residual.requires_grad or weight.requires_grad
        return op[grad and torch.is_grad_enabled()](x, residual, weight, *moved, eps)
    except Exception as error:
        explain(error, _check, x, residual, weight, stage, eps, keep_indices)


def _check(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    stage: Stage | None,
    eps: float,
    keep_indices: Tensor | None,
) -> tuple[Any, ...]:
    """The arguments of the op."""
    check_norm(x, "x", residual, weight, eps)
    segments, num_tokens = row_source(stage, keep_indices, x, "x")
    return x, residual, weight, segments, keep_indices, num_tokens, float(eps)


def check_norm(x: Tensor, name: str, residual: Tensor, weight: Tensor, eps: float) -> None:
    """The arguments of the residual add and norm; name: what the caller calls x."""
    check_rows(x, name)
    if x.dtype not in _DTYPES:
        expected = ", ".join(str(dtype) for dtype in _DTYPES)
        raise TypeError(f"{name}: expected one of {expected}, got {x.dtype}")
    if x.dim() != 2:
        raise ValueError(f"{name}: expected shape [rows, hidden], got {tuple(x.shape)}")
    check_rows(residual, "residual")
    _check_like(residual, "residual", x, name, x.shape)
    check_plain(weight, "weight")
    _check_like(weight, "weight", x, name, x.shape[1:])
    if not weight.is_contiguous():
        raise ValueError(f"weight: expected a contiguous tensor, got strides {weight.stride()}")
    check_eps(eps, torch.float64 if x.dtype == torch.float64 else torch.float32)


def is_usual_eps(eps: object) -> bool:
    """Whether `check_eps` has nothing to say of it, whatever the dtype."""
    return type(eps) is float and _LEAST <= eps <= _MOST


def check_eps(eps: float, compute: torch.dtype) -> None:
    """0, or a normal number of the dtype that norms are computed in: else backends would differ."""
    if type(eps) is not float and not torch.compiler.is_compiling():  # a graph's are symbols
        checks.number("eps", eps, 0)
    limits = _LIMITS[compute]
    if eps != 0 and not limits.tiny <= eps <= limits.max:
        raise ValueError(
            f"eps: expected 0, or {limits.tiny:.3g} to {limits.max:.3g}, the normal numbers of "
            f"{compute}, got {eps}"
        )


def _check_like(tensor: Tensor, name: str, x: Tensor, x_name: str, shape: torch.Size) -> None:
    if tensor.dtype != x.dtype:
        raise TypeError(f"{name}: expected the dtype of {x_name}, {x.dtype}, got {tensor.dtype}")
    if tensor.device != x.device:
        raise ValueError(
            f"{name}: expected the device of {x_name}, {x.device}, got {tensor.device}"
        )
    if tensor.shape != shape:
        raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(tensor.shape)}")


# ---- Gradients ----


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, _, weight, segments, keep_indices, _, ctx.eps = inputs
    ctx.save_for_backward(output[1], weight, segments, keep_indices)
    ctx.num_rows = x.shape[0]


def norm_gradients(
    h: Tensor,
    weight: Tensor,
    eps: float,
    grad_normed: Tensor,
    grad_residual: Tensor,
    num_rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The gradients of the sum and of the weight. Rounding to the dtype counts as the identity.

    With h the sum, s = 1 / sqrt(mean(h^2) + eps), n = h * s and g = grad_normed * weight:
    dh = s * (g - n * mean(g * n)) + grad_residual. num_rows: those in use;
    None: all."""
    compute = torch.float64 if h.dtype == torch.float64 else torch.float32
    wide = h.to(compute)
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    grad = grad_normed.to(compute)
    if num_rows is not None:  # the others are zeros whatever comes in, also with eps = 0
        spare = (torch.arange(h.shape[0], device=h.device) >= num_rows).unsqueeze(-1)
        scale, grad = scale.masked_fill(spare, 0), grad.masked_fill(spare, 0)
    normed = wide * scale
    weighted = grad * weight.to(compute)
    grad_h = scale * (weighted - normed * (weighted * normed).mean(-1, keepdim=True))
    grad_h = (grad_h + grad_residual.to(compute)).to(h.dtype)
    return grad_h, (grad * normed).sum(0).to(weight.dtype)


def _backward(ctx: Any, grad_normed: Tensor, grad_residual: Tensor) -> tuple[Tensor | None, ...]:
    h, weight, segments, keep_indices = ctx.saved_tensors
    grad_h, grad_weight = norm_gradients(h, weight, ctx.eps, grad_normed, grad_residual)
    grad_x = upsample_grad(ctx, grad_h, segments, keep_indices)
    return grad_x, grad_x, grad_weight, None, None, None, None


register(
    "downsample_add_rms_norm",
    "(Tensor x, Tensor residual, Tensor weight, Tensor? segments, Tensor? keep_indices, "
    "SymInt num_tokens, float eps) -> (Tensor, Tensor)",
    fake=fakes.downsample_add_rms_norm,
    composed=_composed.downsample_add_rms_norm,
    backward=_backward,
    setup=_setup,
    triton="downsample_add_rms_norm",
)
