"""Which Einsum is a product with one constant matrix."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["MatrixProduct", "matrix_product"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MatrixProduct:
    """An Einsum as: order and join the axes of x, MatMul, take them apart and order them.

    Attributes:
        weight_order: Axes of the constant, those that are summed first.
        weight_shape: [d, m]; None where it is that already.
        input_order: Axes of x, those that are summed last.
        input_shape: Target of a Reshape that joins those; None where there is but one.
        output_shape: Target of a Reshape that takes the features apart; None where not needed.
        output_order: Axes of the product in the order of the output.
    """

    weight_order: tuple[int, ...]
    weight_shape: tuple[int, ...] | None
    input_order: tuple[int, ...]
    input_shape: tuple[int, ...] | None
    output_shape: tuple[int, ...] | None
    output_order: tuple[int, ...]


def matrix_product(equation: str, slot: int, shape: Sequence[int]) -> MatrixProduct | None:
    """See an Einsum of two operands as a product with the constant one.

    Every index of the constant has to be either in the other operand or in the output, and no
    index may come twice in one term, nor one that is summed have a single value in the constant.

    Args:
        equation: Its equation (ONNX operators, Einsum).
        slot: Which operand is constant, 0 or 1.
        shape: The shape of that.

    Returns:
        The product; None where it is something else.
    """
    given, arrow, out = equation.replace(" ", "").partition("->")
    terms = given.split(",")
    if len(terms) != 2 or "." in equation:
        return None
    if not arrow:  # indices that come once, in alphabetical order
        out = "".join(sorted(i for i, n in Counter("".join(terms)).items() if n == 1))
    w, x = terms[slot], terms[1 - slot]
    if len(w) != len(shape) or any(len(set(term)) < len(term) for term in (w, x, out)):
        return None
    rows = [i for i in x if i not in w]
    summed = [i for i in x if i in w]
    made = [i for i in out if i in w]
    if not summed or not made or not set(summed).isdisjoint(made):
        return None
    if set(w) != {*summed, *made} or set(out) != {*rows, *made}:
        return None
    extent = dict(zip(w, shape, strict=True))
    if any(extent[i] == 1 for i in summed):
        return None  # x may have more there, all of which meet the one value
    d, m = (math.prod(extent[i] for i in part) for part in (summed, made))
    # A zero keeps an extent as it is (ONNX operators, Reshape).
    kept = (0,) * len(rows)
    apart = [*rows, *made]
    return MatrixProduct(
        weight_order=tuple(w.index(i) for i in (*summed, *made)),
        weight_shape=None if len(w) == 2 else (d, m),
        input_order=tuple(x.index(i) for i in (*rows, *summed)),
        input_shape=None if len(summed) == 1 else (*kept, d),
        output_shape=None if len(made) == 1 else (*kept, *(extent[i] for i in made)),
        output_order=tuple(apart.index(i) for i in out),
    )
