"""Find tables that a linear layer reads too, as language models tie their ends."""

from collections.abc import Sequence

import numpy as np

from onnx_utilrank.model.graph import GraphIndex
from onnx_utilrank.sites.find import site_kind
from onnx_utilrank.sites.site import Site

__all__ = ["find_tied"]


def find_tied(index: GraphIndex, sites: Sequence[Site]) -> list[tuple[Site, Site]]:
    """Pairs of a table and a layer (its head) that multiplies with it, y = W^T x for the table's W.

    Nothing else reads the data of either, so that those go once both are rewritten.

    Args:
        index: The model.
        sites: Sites, both of a pair among them.
    """
    found = []
    for table in sites:
        if not table.one_hot:
            continue
        family = index.family(table.weight)
        readers = {use.node for use in table.uses}
        others = set(index.readers_of(family)) - readers
        for head in sites:
            tied = others == {use.node for use in head.uses} and index.pinned.isdisjoint(family)
            if tied and _turned(index, table, head):
                found.append((table, head))
    return found


def _turned(index: GraphIndex, table: Site, head: Site) -> bool:
    """Whether the weight of the one is that of the other, transposed."""
    kind = index.constant_type(head.weight)
    if kind != ((table.d, table.m), table.dtype) and kind != ((table.m, table.d), table.dtype):
        return False
    matrices = []
    for site in (table, head):
        weight = index.constant(site.weight)
        assert weight is not None
        matrices.append(site_kind(site.op_type).matrix(site.uses[0], weight))
    return np.array_equal(matrices[0].T, matrices[1])
