"""Matrix products by the quickest way that is as exact as the plain one.

On a processor by the quicker of the two libraries that PyTorch carries: it gives products of float32 to MKL, which
takes AVX-512 on Intel's processors alone. oneDNN takes it on AMD's too, where it needs half the time
(``benchmarks/products.py``). On NVIDIA's GPUs half-precision numbers are multiplied as they are and summed in float32:
their products are exact in it, and the units for matrices need a tenth of the time that float32 takes elsewhere.
Autocast and torch.compile choose for themselves.
"""

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

LEAST = 2**21  # multiplications; where there are fewer, oneDNN's longer way to a product costs more than it saves
WORTH_MOVING = 128  # how often an operand has to be used for it to pay that it is laid out anew, which MKL need not do


def linear(x: Tensor, weight_kI: Tensor, bias_k: Tensor | None = None) -> Tensor:
    """``F.linear`` of (..., I), without gradients: (..., k)."""
    onednn = _onednn() if _is_ours(x, weight_kI) else None
    if onednn is None:
        return F.linear(x, weight_kI, bias_k)
    # It has no quick kernel for a weight that is dense neither as rows nor as columns; a bias it reads as if it were.
    weight_kI = weight_kI if _is_dense(weight_kI) else weight_kI.contiguous()
    return onednn(x, weight_kI, None if bias_k is None else bias_k.contiguous(), "none", [], "")


def inner(few_QI: Tensor, rows_nI: Tensor) -> Tensor:
    """``few rows^T`` of few vectors and many rows: (Q, n).

    Without AVX-512 it is quicker with the few as the weight (``benchmarks/score.py --queries 4``).
    """
    return F.linear(rows_nI, few_QI).T if _onednn() is None else linear(few_QI, rows_nI)


def gram(x_Nk: Tensor, y_Nm: Tensor) -> Tensor:
    """``x^T y``: (k, m)."""
    return linear(x_Nk.T, y_Nm.T)


class MatrixUnits:
    """Of which half-precision dtypes GPUs multiply matrices with sums in float32; known before a block is compiled."""

    def __init__(self) -> None:
        self.bfloat16 = self.float16 = False

    def ask(self) -> None:
        """To be asked where there is one. What they can does not change, but torch may be told to sum float16 in it."""
        nvidia = torch.version.hip is None
        self.bfloat16 = nvidia and _least_capability() >= (8, 0)
        self.float16 = nvidia and not getattr(torch.backends.cuda.matmul, "allow_fp16_accumulation", False)

    def take(self, *tensors: Tensor) -> bool:
        dtype = tensors[0].dtype
        alike = all(t.device.type == "cuda" and t.dtype == dtype for t in tensors)
        return alike and ((self.bfloat16 and dtype == torch.bfloat16) or (self.float16 and dtype == torch.float16))


UNITS = MatrixUnits()


@cache
def _least_capability() -> tuple[int, int]:
    return min(torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count()))


def cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """``t.to(dtype)``, which takes ten times as long as to see that there is nothing to do."""
    return t if t.dtype == dtype else t.to(dtype)


def widened(wide: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors in ``wide``, or as they are where ``products`` sums in it all the same."""
    return tensors if wide == torch.float32 and UNITS.take(*tensors) else tuple(cast(t, wide) for t in tensors)


def products(x: Tensor, y: Tensor) -> Tensor:
    """``x @ y`` of matrices (..., k, N) and (..., N, m), those in half precision summed in float32."""
    if x.dtype not in (torch.bfloat16, torch.float16):
        return x @ y
    if x.dim() == 2:
        return products(x[None], y[None])[0]
    flat = torch.bmm(x.flatten(0, -3), y.flatten(0, -3), out_dtype=torch.float32)
    return flat.unflatten(0, x.shape[:-2])


def _is_ours(x: Tensor, weight: Tensor) -> bool:
    columns = weight.shape[0]
    if not x.is_cpu or torch.compiler.is_compiling() or x.numel() * columns < LEAST:
        return False
    rows = x.numel() // x.shape[-1]
    return (
        min(rows, columns) > 1  # a product with a vector is as quick as the memory
        and (x.stride(-1) == 1 or columns >= WORTH_MOVING)
        and (_is_dense(weight) or rows >= WORTH_MOVING)
        and type(x) is type(weight) is Tensor
        and x.dtype is weight.dtype is torch.float32
        and not torch.is_autocast_enabled("cpu")
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
        and bool(torch.backends.mkldnn.enabled)
    )


def _is_dense(matrix: Tensor) -> bool:
    return matrix.is_contiguous() or matrix.T.is_contiguous()


@cache
def _onednn() -> Callable[..., Tensor] | None:
    """Its product, which PyTorch has for its own compiler; None where it is not there, or not what it was."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return None
    numbers = torch.arange(12, device="cpu", dtype=torch.float32)  # whatever the user's defaults are
    x, weight, bias = numbers.view(3, 4), numbers[:8].view(2, 4), numbers[:2]
    try:
        product = torch.ops.mkldnn._linear_pointwise.default
        return product if torch.equal(product(x, weight, bias, "none", [], ""), F.linear(x, weight, bias)) else None
    except (AttributeError, RuntimeError, TypeError, NotImplementedError):
        return None
