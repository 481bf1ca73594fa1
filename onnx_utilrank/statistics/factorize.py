"""Factor a weight so that its outputs on the calibration rows change least.

Throughout, a node computes y = W x + b with W [m, d], and Ŵ is what replaces W. Everything is
float64. Eigenvalues and singular values are in descending order.
"""

from dataclasses import dataclass

import numpy as np

from onnx_utilrank.statistics.moments import SecondMoment, shrinkage

__all__ = [
    "Decomposition",
    "Factors",
    "Utilization",
    "balanced",
    "eigenbasis",
    "energy_rank",
    "one_sided",
    "plain_svd",
    "utilized",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Factors:
    """A weight of rank r as a product.

    Attributes:
        left: float64 [m, r].
        right: float64 [r, d]; Ŵ = left @ right.
    """

    left: np.ndarray
    right: np.ndarray

    @property
    def rank(self) -> int:
        """The common dimension r."""
        return len(self.right)

    @property
    def product(self) -> np.ndarray:
        """Ŵ [m, d]."""
        return np.asarray(self.left @ self.right)


@dataclass(frozen=True, slots=True, kw_only=True)
class Decomposition:
    """The best Ŵ of every rank at once: Ŵ_r = U_r U_r^T W.

    Attributes:
        basis: U, orthonormal columns [m, k].
        errors: Expected squared output error E‖(W − Ŵ_r) x‖² for r = 0 … k, float64 [k + 1],
            non-increasing.
        energy: Expected squared output E‖W x‖² that relative errors refer to.
    """

    basis: np.ndarray
    errors: np.ndarray
    energy: float

    def factors(self, weight: np.ndarray, rank: int) -> Factors:
        """Ŵ of one rank as balanced factors."""
        u = self.basis[:, :rank]
        return balanced(u, u.T @ weight)


def eigenbasis(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues and eigenvectors of a symmetric positive semi-definite matrix.

    Returns:
        Values [n], descending, with what rounding made negative set to 0; vectors as columns
        [n, n].
    """
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    return np.maximum(values[::-1], 0.0), vectors[:, ::-1]


def balanced(left: np.ndarray, right: np.ndarray) -> Factors:
    """The same product with the singular values shared evenly between both factors.

    The left factor has to have orthonormal columns. Even factors survive half precision and
    quantization better than ones that differ in scale by the spectrum of W.
    """
    u, s, vt = np.linalg.svd(right, full_matrices=False)
    root = np.sqrt(s)
    return Factors(left=(left @ u) * root, right=root[:, None] * vt)


def one_sided(
    weight: np.ndarray,
    *,
    inputs: SecondMoment | None = None,
    outputs: SecondMoment | None = None,
    centred: bool,
) -> Decomposition:
    """The optimum over all rank-r Ŵ of E‖(W − Ŵ)(x − μ)‖², for every r at once.

    U are the eigenvectors of S = W C W^T, and the error is the sum of the eigenvalues cut off
    (reduced-rank regression; Eckart-Young applied to W C^{1/2}). S needs no inverse and no
    Cholesky factor of C, so a singular C is fine. It is had from the smaller side: from the
    moments of the outputs directly, or from C through the SVD of W C^{1/2}.

    With fewer than four rows a feature, C is mixed with an isotropic one of the same energy
    (`shrinkage`), as directions that were not seen are not unused.

    Args:
        weight: W [m, d].
        inputs: Moment of x, width d. Either this or `outputs` is needed.
        outputs: Moment of W x (bias taken out), width m.
        centred: True where the lost mean goes into the bias; False where there is no bias to put
            it in, so that E‖(W − Ŵ) x‖² counts.

    Returns:
        The decomposition; `errors` hold for the shrunk C where it was shrunk.
    """
    moment = inputs if inputs is not None else outputs
    assert moment is not None
    second = moment.covariance if centred else moment.uncentred
    mixed = 0.0 if moment.enough_rows else shrinkage(second, moment.rows)
    trace = float(np.trace(second))
    if inputs is not None:
        second = (1 - mixed) * second
        second[np.diag_indices_from(second)] += mixed * trace / inputs.width
        values, vectors = eigenbasis(second)
        u, s, _ = np.linalg.svd((weight @ vectors) * np.sqrt(values), full_matrices=False)
        spectrum = s * s
    else:
        gram = weight @ weight.T
        scale = trace / max(float(np.trace(gram)), np.finfo(np.float64).tiny)
        spectrum, u = eigenbasis((1 - mixed) * second + (mixed * scale) * gram)
    rank = min(weight.shape)
    u, spectrum = u[:, :rank], spectrum[:rank]
    return Decomposition(basis=u, errors=_tails(spectrum), energy=float(spectrum.sum()))


def plain_svd(weight: np.ndarray) -> Decomposition:
    """The singular value decomposition of W alone, blind to data: one_sided with C = I."""
    u, s, _ = np.linalg.svd(weight, full_matrices=False)
    return Decomposition(basis=u, errors=_tails(s * s), energy=float(np.sum(s * s)))


def _tails(spectrum: np.ndarray) -> np.ndarray:
    """Sums over what lies beyond each rank r = 0 … n, [n + 1]."""
    return np.append(np.cumsum(spectrum[::-1])[::-1], 0.0)


def energy_rank(values: np.ndarray, energy: float) -> int:
    """The least k such that the k largest of the descending `values` hold `energy` of their sum.

    At `energy` 1 all count, also those that are zero: rounding must not decide what full is.
    """
    if energy >= 1 or not values.sum() > 0:
        return len(values)
    share = np.cumsum(values) / values.sum()
    return min(int(np.searchsorted(share, energy)) + 1, len(values))


@dataclass(frozen=True, slots=True, kw_only=True)
class Utilization:
    """The subspaces that a layer uses, after Garg et al., arXiv 2407.04797, section 3.

    Attributes:
        input_values: Eigenvalues of M = E[x x^T], uncentred, [d].
        input_basis: Its eigenvectors as columns [d, d].
        output_values: Eigenvalues of W M W^T, [m].
        output_basis: Its eigenvectors as columns [m, m].
    """

    input_values: np.ndarray
    input_basis: np.ndarray
    output_values: np.ndarray
    output_basis: np.ndarray

    def ranks(self, energy: float) -> tuple[int, int]:
        """k_S and k_T: how many directions hold `energy` of the inputs' and outputs' energy."""
        return energy_rank(self.input_values, energy), energy_rank(self.output_values, energy)

    def factors(self, weight: np.ndarray, k_s: int, k_t: int) -> Factors:
        """W' = P_T W P_S factored at its rank r = min(k_S, k_T).

        The paper writes rows, hence P_S W P_T. The product is exact: W' has no larger rank.
        """
        t, s = self.output_basis[:, :k_t], self.input_basis[:, :k_s]
        u, values, vt = np.linalg.svd(t.T @ weight @ s, full_matrices=False)
        root = np.sqrt(values)
        return Factors(left=(t @ u) * root, right=root[:, None] * (vt @ s.T))


def utilized(weight: np.ndarray, inputs: SecondMoment) -> Utilization:
    """Measure the input and output subspaces of a layer.

    Args:
        weight: W [m, d].
        inputs: Moment of x, width d.
    """
    second = inputs.uncentred
    input_values, input_basis = eigenbasis(second)
    output_values, output_basis = eigenbasis(weight @ second @ weight.T)
    return Utilization(
        input_values=input_values,
        input_basis=input_basis,
        output_values=output_values,
        output_basis=output_basis,
    )


def output_error(weight: np.ndarray, other: np.ndarray, moment: np.ndarray) -> float:
    """E‖(W − Ŵ) x‖² for inputs of the given second moment [d, d]."""
    lost = weight - other
    return float(np.einsum("ij,jk,ik->", lost, moment, lost, optimize=True))
