"""A table and the layer that multiplies with it, rewritten to read the same two factors."""

import numpy as np
import onnx_graphsurgeon as gs

from onnx_utilrank.model.surgeon import Surgeon
from onnx_utilrank.moves.stored import corrected_bias, store
from onnx_utilrank.sites.find import site_kind
from onnx_utilrank.sites.site import Site
from onnx_utilrank.statistics.factorize import Factors

__all__ = ["replace_tied"]


def replace_tied(
    surgeon: Surgeon,
    table: Site,
    head: Site,
    factors: Factors,
    lost: tuple[np.ndarray | None, np.ndarray | None],
) -> None:
    """Rewrite every use of both: each factor is stored once, and transposed where it is read so.

    Args:
        surgeon: The graph under the knife.
        table: The embedding.
        head: The layer.
        factors: Ŵ of the table, float64; the head has its transpose.
        lost: (W − Ŵ) E[x] of either, float64, to be added to its bias; None leaves the bias.

    Raises:
        ModelError: A factor does not fit the dtype of the weight.
    """
    parts: list[tuple[str, np.ndarray]] = []
    turned = Factors(left=factors.right.T, right=factors.left.T)
    for site, own, mean in ((table, factors, lost[0]), (head, turned, lost[1])):
        kind = site_kind(site.op_type)
        weight = surgeon.index.constant(site.weight)
        assert weight is not None
        tensors = kind.tensors(site.uses[0], weight, own)
        if site is table:
            names = [f"{site.weight}/{part}" for part in ("right", "left")]
            parts = [
                (store(surgeon, site, name, values), values)
                for name, values in zip(names, tensors, strict=True)
            ]
        for use in site.uses:
            turns: list[gs.Node] = []
            read = []
            # What the embedding applies first, the head applies last.
            held = parts if site is table else parts[::-1]
            for (name, stored), values in zip(held, tensors, strict=True):
                read.append(name)
                if not np.array_equal(stored, values):
                    seen = surgeon.value(f"{name}/transposed")
                    read[-1] = seen.name
                    turns.append(
                        gs.Node(
                            op="Transpose",
                            name=surgeon.unique(f"{name}/transpose"),
                            attrs={"perm": [1, 0]},
                            inputs=[surgeon.tensor(name)],
                            outputs=[seen],
                        )
                    )
            bias = None if mean is None else corrected_bias(surgeon, site, use, mean)
            first, second = read
            surgeon.replace(use.node, [*turns, *kind.chain(surgeon, use, first, second, bias)])
