"""Factor a weight so that its outputs on the calibration rows change least.

Throughout, a node computes y = W x + b with W [m, d], and Ŵ is what replaces W. Everything is
float64. Eigenvalues and singular values are in descending order.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from onnx_utilrank.statistics.moments import SecondMoment, shrinkage

__all__ = [
    "Decomposition",
    "Factors",
    "Metric",
    "Utilization",
    "balanced",
    "eigenbasis",
    "energy_rank",
    "factored",
    "feature_scale",
    "grouped",
    "optimal",
    "plain_svd",
    "utilized",
    "utilized_outputs",
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
    """The best Ŵ of every rank at once: Ŵ_r = L_r K_r W, with L K the identity on the outputs.

    L = R^{-T} U and K = U^T R^T for a metric ‖R^T (y − ŷ)‖² of the outputs and the orthonormal
    directions U; a rank r takes the first r columns of L and rows of K.

    Attributes:
        expand: L, [m, k].
        reduce: K, [k, m].
        errors: Expected squared output error E‖R^T (W − Ŵ_r) x‖² for r = 0 … k, float64
            [k + 1], non-increasing.
        energy: Expected squared output E‖R^T W x‖² that relative errors refer to.
    """

    expand: np.ndarray
    reduce: np.ndarray
    errors: np.ndarray
    energy: float

    def factors(self, weight: np.ndarray, rank: int) -> Factors:
        """Ŵ of one rank as balanced factors."""
        return factored(self.expand[:, :rank], self.reduce[:rank] @ weight)

    def input_factors(self, weight: np.ndarray, rank: int) -> Factors:
        """The same of inputs x that become L_r K_r x: W L_r and K_r."""
        return factored(weight @ self.expand[:, :rank], self.reduce[:rank])

    def kept(self, rank: int) -> np.ndarray:
        """L_r K_r [m, m]: Ŵ_r = L_r K_r W."""
        return np.asarray(self.expand[:, :rank] @ self.reduce[:rank])

    def errors_under(self, gamma: np.ndarray, second: np.ndarray) -> np.ndarray:
        """tr Γ Q_r C Q_r^T with Q_r = I − L_r K_r for every rank r, of another Γ and C.

        Args:
            gamma: Γ [m, m].
            second: C [m, m].

        Returns:
            float64 [k + 1], non-increasing.
        """
        both = (self.expand.T @ gamma @ self.expand) * (self.reduce @ second @ self.reduce.T)
        tails = both[::-1, ::-1].cumsum(0).cumsum(1).diagonal()[::-1]
        rising = np.maximum.accumulate(np.append(np.maximum(tails, 0.0), 0.0)[::-1])
        return np.asarray(rising[::-1])

    def lost(self, output: np.ndarray, rank: int) -> np.ndarray:
        """What rank r loses of an output W x [m]: (W − Ŵ_r) x."""
        return np.asarray(output - self.expand[:, :rank] @ (self.reduce[:rank] @ output))


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
    # A decomposition of `right` itself is slow where it is long: that of a table is as long as the
    # vocabulary. Singular values are taken from the rows, so that small ones are true too.
    _, u = eigenbasis(right @ right.T)
    rows = u.T @ right
    root = np.sqrt(np.linalg.norm(rows, axis=1))
    scale = np.where(root > 0, root, 1.0)
    return Factors(left=(left @ u) * root, right=rows / scale[:, None])


def factored(left: np.ndarray, right: np.ndarray) -> Factors:
    """The product of two factors, balanced; the left one's columns may be any."""
    basis, core = np.linalg.qr(left)
    return balanced(basis, core @ right)


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """What a change δ of the outputs counts: ‖R^T δ‖² = δ^T Γ δ, Γ = R R^T [m, m].

    Attributes:
        root_t: R^T, upper triangular [m, m].
    """

    root_t: np.ndarray

    @classmethod
    def diagonal(cls, scale: np.ndarray) -> "Metric":
        """R^{-1} = D for positive entries of `scale` [m]: outputs count divided by it."""
        return cls(root_t=np.diag(1 / scale))

    @classmethod
    def of(cls, gamma: np.ndarray) -> "Metric":
        """The metric of a positive definite Γ: R is its Cholesky factor.

        Sums of products in single precision may be indefinite by what rounding added: eigenvalues
        that it cannot tell from 0 are then taken to be as large as it.
        """
        with contextlib.suppress(np.linalg.LinAlgError):
            return cls(root_t=np.linalg.cholesky((gamma + gamma.T) / 2).T)
        values, vectors = eigenbasis(gamma)
        values = np.maximum(values, np.finfo(np.float32).eps * values[0])
        _, root_t = np.linalg.qr(np.sqrt(values)[:, None] * vectors.T)
        return cls(root_t=root_t)

    def undone(self, directions: np.ndarray) -> np.ndarray:
        """R^{-T} U for directions U [m, k], without the inverse."""
        return np.asarray(np.linalg.solve(self.root_t, directions))


def optimal(
    weight: np.ndarray,
    metric: Metric,
    *,
    inputs: SecondMoment | None = None,
    outputs: SecondMoment | None = None,
    centred: bool,
) -> Decomposition:
    """The optimum over all rank-r Ŵ of E‖R^T (W − Ŵ)(x − μ)‖², for every r at once.

    U are the eigenvectors of S = R^T W C W^T R, and the error is the sum of the eigenvalues cut
    off (reduced-rank regression; Eckart-Young on R^T W C^{1/2}). S needs no inverse and no
    Cholesky factor of C, so a singular C is fine. It is had from the smaller side: from the
    moments of the outputs directly, or from C through the SVD of R^T W C^{1/2}.

    With fewer than four rows a feature, C is mixed with an isotropic one of the same energy
    (`shrinkage`), as directions that were not seen are not unused.

    Args:
        weight: W [m, d].
        metric: R, what a change of the outputs counts.
        inputs: Moment of x, width d. Either this or `outputs` is needed.
        outputs: Moment of W x (bias taken out), width m.
        centred: True where the lost mean goes into the bias; False where there is no bias to put
            it in, so that E‖R^T (W − Ŵ) x‖² counts.

    Returns:
        The decomposition; `errors` hold for the shrunk C where it was shrunk.
    """
    moment = inputs if inputs is not None else outputs
    assert moment is not None
    second = moment.second(centred=centred)
    if outputs is not None:
        second = metric.root_t @ second @ metric.root_t.T
    mixed = 0.0 if moment.enough_rows else shrinkage(second, moment.rows)
    trace = float(np.trace(second))
    if inputs is not None:
        second = (1 - mixed) * second
        second[np.diag_indices_from(second)] += mixed * trace / inputs.width
        values, vectors = eigenbasis(second)
        mapped = metric.root_t @ weight
        u, s, _ = np.linalg.svd((mapped @ vectors) * np.sqrt(values), full_matrices=False)
        spectrum = s * s
    else:
        if mixed:
            gram = metric.root_t @ (weight @ weight.T) @ metric.root_t.T
            level = trace / max(float(np.trace(gram)), np.finfo(np.float64).tiny)
            second = (1 - mixed) * second + (mixed * level) * gram
        spectrum, u = eigenbasis(second)
    rank = min(weight.shape)
    u, spectrum = u[:, :rank], spectrum[:rank]
    return Decomposition(
        expand=metric.undone(u),
        reduce=u.T @ metric.root_t,
        errors=_tails(spectrum),
        energy=float(spectrum.sum()),
    )


def grouped(
    gammas: Sequence[np.ndarray], second: np.ndarray, groups: Sequence[slice]
) -> Decomposition:
    """The optimum where features may be mixed within groups only: L and K have their blocks.

    Each group is cut by itself, by the eigenvectors of R^T C R of its own Γ = R R^T and its block
    of C. The columns of L hold the first direction of every group, then the second of each: with
    G groups, rank k G keeps k directions a group.

    Args:
        gammas: Γ [n, n] of every group, positive definite.
        second: C [m, m], the second moment of the features.
        groups: Rows of each group, equally many.
    """
    m, n, count = len(second), groups[0].stop - groups[0].start, len(groups)
    expand, reduce = np.zeros((m, n, count)), np.zeros((n, count, m))
    spectrum = np.zeros((n, count))
    for k, (gamma, rows) in enumerate(zip(gammas, groups, strict=True)):
        metric = Metric.of(gamma)
        values, u = eigenbasis(metric.root_t @ second[rows, rows] @ metric.root_t.T)
        spectrum[:, k] = values
        expand[rows, :, k] = metric.undone(u)
        reduce[:, k, rows] = u.T @ metric.root_t
    return Decomposition(
        expand=expand.reshape(m, -1),
        reduce=reduce.reshape(-1, m),
        errors=_tails(spectrum.ravel()),
        energy=float(spectrum.sum()),
    )


def feature_scale(variances: np.ndarray) -> np.ndarray:
    """The diagonal of D for outputs of the given variances σ²: σ^(1/4).

    With D = I a few features of huge variance rule: the outlier channels of a residual stream,
    which the next normalization scales down again. With D = σ the least feature counts as much as
    the largest, which is as wrong where none follows. Of the powers 0, 1/4, 1/2 and 1 this one
    alone kept the output error on held-back samples below that of the paper's rule on each of the
    models that `tools/zoo_table.py` runs by default.

    Args:
        variances: Of each output feature, [m].
    """
    floor = 1e-6 * float(variances.mean())
    if floor <= 0:
        return np.ones(len(variances))
    return np.asarray(np.maximum(variances, floor) ** 0.125)


def plain_svd(weight: np.ndarray) -> Decomposition:
    """The singular value decomposition of W alone, blind to data: one_sided with C = I."""
    u, s, _ = np.linalg.svd(weight, full_matrices=False)
    return Decomposition(expand=u, reduce=u.T, errors=_tails(s * s), energy=float(np.sum(s * s)))


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
        input_basis: Its eigenvectors as columns [d, d]; None where no input is left out.
        output_values: Eigenvalues of W M W^T, [min(m, d)]: it has no more that are not zero.
        output_basis: Their eigenvectors as columns [m, min(m, d)].
    """

    input_values: np.ndarray
    input_basis: np.ndarray | None
    output_values: np.ndarray
    output_basis: np.ndarray

    def ranks(self, energy: float) -> tuple[int, int]:
        """k_S and k_T: how many directions hold `energy` of the inputs' and outputs' energy."""
        k_s, k_t = (energy_rank(v, energy) for v in (self.input_values, self.output_values))
        if self.input_basis is None:
            k_s = len(self.input_values)
        return k_s, len(self.output_basis) if energy >= 1 else k_t

    def factors(self, weight: np.ndarray, k_s: int, k_t: int) -> Factors:
        """W' = P_T W P_S factored at its rank r = min(k_S, k_T).

        The paper writes rows, hence P_S W P_T. The product is exact: W' has no larger rank.
        """
        t = self.output_basis[:, :k_t]
        if k_t >= len(self.output_values):
            t = np.eye(len(weight))  # all directions, also those that the data leave at zero
        core = t.T @ weight
        if self.input_basis is not None:
            core = core @ self.input_basis[:, :k_s]
        u, values, vt = np.linalg.svd(core, full_matrices=False)
        rank = min(k_s, k_t)
        u, root, vt = u[:, :rank], np.sqrt(values[:rank]), vt[:rank]
        if self.input_basis is not None:
            vt = vt @ self.input_basis[:, :k_s].T
        return Factors(left=(t @ u) * root, right=root[:, None] * vt)


def utilized(weight: np.ndarray, inputs: SecondMoment) -> Utilization:
    """Measure the input and output subspaces of a layer.

    Args:
        weight: W [m, d].
        inputs: Moment of x, width d.
    """
    input_values, input_basis = eigenbasis(inputs.uncentred)
    half = (weight @ input_basis) * np.sqrt(input_values)  # W M^{1/2}, up to a rotation
    output_basis, singular, _ = np.linalg.svd(half, full_matrices=False)
    output_values = singular * singular
    return Utilization(
        input_values=input_values,
        input_basis=input_basis,
        output_values=output_values,
        output_basis=output_basis,
    )


def utilized_outputs(weight: np.ndarray, outputs: SecondMoment) -> Utilization:
    """The same of a table of tokens: any may come, and each is a direction of its own.

    Args:
        weight: W [m, d], m at most d.
        outputs: Moment of W x, width m.
    """
    values, basis = eigenbasis(outputs.uncentred)
    return Utilization(
        input_values=np.ones(weight.shape[1]),
        input_basis=None,
        output_values=values,
        output_basis=basis,
    )


def output_error(weight: np.ndarray, other: np.ndarray, moment: np.ndarray) -> float:
    """E‖(W − Ŵ) x‖² for inputs of the given second moment [d, d]."""
    lost = weight - other
    return float(np.einsum("ij,jk,ik->", lost, moment, lost, optimize=True))
