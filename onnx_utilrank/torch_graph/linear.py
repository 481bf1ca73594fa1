"""Matrix products."""

import torch

from onnx_utilrank.torch_graph.operator import Context, Operator, Result, Table, plain

__all__ = ["LINEAR", "gemm"]

Tensor = torch.Tensor


def gemm(context: Context, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    """alpha A B + beta C, either turned on demand."""
    a = a.mT if context.flag("transA") else a
    b = b.mT if context.flag("transB") else b
    alpha, beta = context.number("alpha", 1.0), context.number("beta", 1.0)
    y = a @ b
    y = y if alpha == 1.0 else (y * alpha).to(y.dtype)
    if c is None or beta == 0.0:
        return y
    return y + (c if beta == 1.0 else (c * beta).to(c.dtype))


def _einsum(context: Context, *tensors: Tensor) -> Result:
    # ONNX allows blanks and subscripts with no output; torch takes both but the blanks.
    return torch.einsum(context.text("equation", "").replace(" ", ""), *tensors)


LINEAR: Table = {
    "Det": plain(torch.linalg.det),
    "Einsum": Operator(_einsum),
    "Gemm": Operator(gemm),
    "MatMul": plain(torch.matmul),
}
