"""Which Einsum is a product of matrices."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["BatchProduct", "MatrixProduct", "batch_product", "matrix_product"]


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


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchProduct:
    """An Einsum as: order the axes of both operands, MatMul, order those of the product.

    Attributes:
        left_order: Axes of the first, those that both have first and the one that is summed last.
        right_order: Axes of the second, that one before its own.
        output_order: Axes of the product in the order of the output.
    """

    left_order: tuple[int, ...]
    right_order: tuple[int, ...]
    output_order: tuple[int, ...]


def batch_product(equation: str) -> BatchProduct | None:
    """See an Einsum of two operands as a product of a stack of matrices with another one.

    One index is summed, each operand has one that is in the output and not in the other, and all
    others are in both and in the output, as in the products of attention.

    Args:
        equation: Its equation (ONNX operators, Einsum).

    Returns:
        The product; None where it is something else.
    """
    read = _read(equation)
    if read is None:
        return None
    left, right, out = read
    both = [i for i in left if i in right]
    stacked, summed = ([i for i in both if (i in out) is kept] for kept in (True, False))
    rows, columns = ([i for i in term if i not in both] for term in (left, right))
    made = [*stacked, *rows, *columns]
    if {len(summed), len(rows), len(columns)} != {1} or sorted(out) != sorted(made):
        return None
    return BatchProduct(
        left_order=tuple(left.index(i) for i in (*stacked, *rows, *summed)),
        right_order=tuple(right.index(i) for i in (*stacked, *summed, *columns)),
        output_order=tuple(made.index(i) for i in out),
    )


def _read(equation: str) -> tuple[str, str, str] | None:
    """The indices of two operands and of the output; None where one comes twice in a term."""
    given, arrow, out = equation.replace(" ", "").partition("->")
    terms = given.split(",")
    if len(terms) != 2 or "." in equation:
        return None
    if not arrow:  # indices that come once, in alphabetical order
        out = "".join(sorted(i for i, n in Counter("".join(terms)).items() if n == 1))
    left, right = terms
    twice = any(len(set(term)) < len(term) for term in (left, right, out))
    return None if twice else (left, right, out)


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
    read = _read(equation)
    if read is None:
        return None
    w, x, out = read[slot], read[1 - slot], read[2]
    if len(w) != len(shape):
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
