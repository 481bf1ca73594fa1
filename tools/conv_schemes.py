"""Four ways to store a Conv in less, by what each does to the output of the layer.

    A    k x k to r, then 1 x 1 (`low-rank`)
    B    1 x 1 to r, then k x k (`channels`)
    C    k x 1 to r, then 1 x k (`separable`)
    D    1 x 1 to r, k x k from r to r, 1 x 1: Tucker-2

For each Conv of several taps, scheme and share of the layer's parameters, the factors are fitted to
what the layer sees on calibration samples: squared error of its outputs in the second moment of
its patches, by L-BFGS from the truncated decomposition of the weight. The error of the outputs,
relative to their energy, is measured on the patches of other samples, and averaged over layers. At
stride 1 all schemes multiply as often as they have parameters.
"""

import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from command_line import failed, new_parser
from tables import NOTHING, command, markdown
from torch import Tensor
from zoo_commands import SAID, StepError, add_zoo_option, check_zoo, open_zoo

from onnx_utilrank.calibration.data import open_data
from onnx_utilrank.calibration.survey import survey
from onnx_utilrank.errors import ModelError, UtilrankError
from onnx_utilrank.model.graph import GraphIndex
from onnx_utilrank.model.store import ModelStore
from onnx_utilrank.moves.two_convs import CHANNELS
from onnx_utilrank.runtime.providers import CPU
from onnx_utilrank.sensitivity.rows import as_rows
from onnx_utilrank.sites.find import find_sites
from onnx_utilrank.sites.site import Site

__all__ = ["SCHEMES", "fitted_error", "main"]

MODELS = ("resnet20", "dncnn_s25", "imdn_x4")
SHARES = (0.75, 0.5, 0.35, 0.25)
SAMPLES = 64
# Patches of a sample that moments rest on, at most.
ROWS = 1000
STEPS = 150

COLUMNS = ("model", "Convs", "parameters kept", *(f"error of {scheme}" for scheme in "ABCD"))

Factors = list[Tensor]


def _halves(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * v[:rank]


def _low_rank(weight: Tensor, share: float) -> Factors:
    m, width = len(weight), math.prod(weight.shape[1:])
    return list(_halves(weight.reshape(m, width), int(share * m * width / (m + width))))


def _channels(weight: Tensor, share: float) -> Factors:
    m, c, *taps = weight.shape
    rank = int(share * weight.numel() / (c + m * math.prod(taps)))
    return list(_halves(weight.permute(2, 3, 0, 1).reshape(-1, c), rank))


def _separable(weight: Tensor, share: float) -> Factors:
    m, c, high, wide = weight.shape
    rank = int(share * weight.numel() / (m * wide + c * high))
    return list(_halves(weight.permute(0, 3, 1, 2).reshape(m * wide, c * high), rank))


def _tucker(weight: Tensor, share: float) -> Factors:
    m, c, *taps = weight.shape
    area = math.prod(taps)
    room = share * weight.numel()
    rank = int((math.sqrt((m + c) ** 2 + 4 * area * room) - m - c) / (2 * area))
    left = torch.linalg.svd(weight.reshape(m, -1), full_matrices=False)[0][:, :rank]
    right = torch.linalg.svd(weight.transpose(0, 1).reshape(c, -1), full_matrices=False)[0][
        :, :rank
    ]
    core = torch.einsum("mchw,mr,cs->rshw", weight, left, right)
    return [left, core, right.T.contiguous()]


def _product(factors: Factors, shape: Sequence[int]) -> Tensor:
    left, right = factors
    return (left @ right).reshape(tuple(shape))


def _from_taps(factors: Factors, shape: Sequence[int]) -> Tensor:
    m, c, high, wide = shape
    return (factors[0] @ factors[1]).reshape(high, wide, m, c).permute(2, 3, 0, 1)


def _from_space(factors: Factors, shape: Sequence[int]) -> Tensor:
    m, c, high, wide = shape
    return (factors[0] @ factors[1]).reshape(m, wide, c, high).permute(0, 2, 3, 1)


def _from_core(factors: Factors, shape: Sequence[int]) -> Tensor:
    left, core, right = factors
    del shape
    return torch.einsum("mr,rshw,sc->mchw", left, core, right)


Begin = Callable[[Tensor, float], Factors]
Make = Callable[[Factors, Sequence[int]], Tensor]
SCHEMES: dict[str, tuple[Begin, Make]] = {
    "A": (_low_rank, _product),
    "B": (_channels, _from_taps),
    "C": (_separable, _from_space),
    "D": (_tucker, _from_core),
}


def fitted_error(
    scheme: str, weight: Tensor, share: float, moment: Tensor, held: Tensor
) -> float | None:
    """Relative squared error of a layer's outputs on held-back patches.

    Args:
        scheme: Key of `SCHEMES`.
        weight: float64 [m, C, k, k].
        share: Of its parameters, that the factors may have.
        moment: Second moment of the patches that the factors are fitted to, [C k², C k²].
        held: That of others.

    Returns:
        None where no rank is that small.
    """
    begin, make = SCHEMES[scheme]
    factors = begin(weight, share)
    if min(f.numel() for f in factors) == 0:
        return None
    # L-BFGS flattens them.
    factors = [f.clone(memory_format=torch.contiguous_format).requires_grad_() for f in factors]

    def error(of: Tensor) -> Tensor:
        lost = (make(factors, weight.shape) - weight).reshape(len(weight), -1)
        whole = weight.reshape(len(weight), -1)
        return (lost @ of * lost).sum() / (whole @ of * whole).sum()

    optimizer = torch.optim.LBFGS(factors, max_iter=STEPS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = error(moment)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        return float(error(held))


def _moments(store: ModelStore, sites: Sequence[Site], data: Path) -> list[list[Tensor]]:
    """Two second moments of the patches of each site: of every other sample, and of the rest."""
    opened = open_data(data, store.inputs)
    taken = min(len(opened), SAMPLES)
    names = {site.uses[0].inputs.tensor for site in sites}
    found = [[torch.zeros(site.d, site.d, dtype=torch.float64) for _ in range(2)] for site in sites]
    for k, feed in enumerate(opened.feeds(range(taken), batch=1)):
        values = survey(store, names, feed, CPU)
        for site, moments in zip(sites, found, strict=True):
            view = site.uses[0].inputs
            (rows,) = as_rows(torch.from_numpy(values[view.tensor]).double(), view, 1)
            rows = rows[:: max(1, len(rows) // ROWS)]
            moments[k % 2] += rows.T @ rows
    return found


def rows_of(label: str, store: ModelStore, data: Path) -> list[list[str]]:
    """The rows of one model: an error for each scheme, at each share."""
    index = GraphIndex.build(store)
    found, _ = find_sites(index)
    splits = {s.key: CHANNELS.split(s) for s in found}
    sites = [s for s in found if (p := splits[s.key]) and len(p.second.kernel) == 2]
    if not sites:
        raise ModelError(f"{label}: no Conv of several taps")
    moments = _moments(store, sites, data)
    rows = []
    for share in SHARES:
        mean = []
        for scheme in SCHEMES:
            errors = []
            for site, (moment, held) in zip(sites, moments, strict=True):
                weight = index.constant(site.weight)
                assert weight is not None
                values = torch.from_numpy(weight.astype(np.float64))
                errors.append(fitted_error(scheme, values, share, moment, held))
            known = [e for e in errors if e is not None]
            whole = len(known) == len(errors)
            mean.append(f"{sum(known) / len(known):.2g}" if whole else NOTHING)
        rows.append([label, str(len(sites)), f"{100 * share:g} %", *mean])
        print(" | ".join(rows[-1]), file=sys.stderr, flush=True)
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; the exit status."""
    parser = new_parser("conv_schemes.py", __doc__)
    add_zoo_option(parser)
    parser.add_argument("--models", nargs="+", default=list(MODELS), metavar="NAME")
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = parser.parse_args(given)
    where = check_zoo(parser, options.zoo)
    rows = []
    with open_zoo(where, samples=SAMPLES) as zoo:
        try:
            for name in options.models:
                data = zoo.work / zoo.calibrate(name)
                rows += rows_of(name, ModelStore.load(zoo.model(name)), data)
        except (StepError, UtilrankError) as e:
            return failed(parser.prog, e)
    print(f"{command(parser.prog, given, SAID)}\n")
    print(markdown(COLUMNS, rows, COLUMNS[:1]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
