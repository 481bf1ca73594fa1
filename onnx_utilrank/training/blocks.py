"""Find the values between the blocks of a model, through which everything flows."""

from collections import Counter
from collections.abc import Collection

from onnx_utilrank.model.graph import captured_names
from onnx_utilrank.torch_graph.graph import TorchGraph

__all__ = ["between_blocks"]

# More of them say little more.
MOST_BLOCKS = 16


def between_blocks(graph: TorchGraph, trained: Collection[str]) -> list[str]:
    """Values that everything trained before them reaches the outputs through, in order.

    Such a value is alone at some point of the graph: of all that depends on what is trained, no
    later node reads anything made before it but itself. Of a chain of them the one at which the
    graph branches again is taken, as a residual stream does between its blocks, and the last. A
    mask that every block reads does not depend on weights.

    Args:
        graph: The model.
        trained: Initializers that are trained.
    """
    outputs = {o.name for o in graph.store.proto.graph.output}
    reads = [{*node.input, *captured_names(node)} - {""} for node in graph.nodes]
    readers = Counter(name for names in reads for name in names)
    last = {name: k for k, names in enumerate(reads) for name in names}
    last |= dict.fromkeys(outputs, len(reads))
    depends, live = set(trained), set[str]()
    alone: list[str] = []
    for k, node in enumerate(graph.nodes):
        if not depends.isdisjoint(reads[k]):
            depends |= set(node.output)
            live |= set(node.output)
        live = {name for name in live if last.get(name, -1) > k}
        if len(live) == 1 and not live <= outputs and alone[-1:] != [*live]:
            alone += live
    found = [name for name in alone if readers[name] > 1 or name == alone[-1]]
    if len(found) <= MOST_BLOCKS:
        return found
    step = len(found) / MOST_BLOCKS
    return [found[int((k + 1) * step) - 1] for k in range(MOST_BLOCKS)]
