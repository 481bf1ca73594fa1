"""On which execution provider each node of a session runs, as ONNX Runtime tells it."""

from collections import Counter
from dataclasses import dataclass

import onnxruntime as ort

__all__ = ["PlacedNode", "Placement", "read_placement"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedNode:
    """A node, and where it runs.

    Attributes:
        name: Its name; empty where it has none.
        op_type: Its operator.
        domain: The operator's domain; empty for ONNX's own.
        provider: ONNX Runtime's name of the provider.
    """

    name: str
    op_type: str
    domain: str
    provider: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where the nodes of a session run.

    Nodes are those of the graph after ONNX Runtime's basic optimizations (constants are folded) and
    before providers fuse what they took; nodes of subgraphs count where they are placed one by one.

    Attributes:
        counts: Number of nodes by provider, most first.
        fallen: Nodes that another provider runs than the one that was asked for.
    """

    counts: tuple[tuple[str, int], ...] = ()
    fallen: tuple[PlacedNode, ...] = ()

    @property
    def nodes(self) -> int:
        """Number of all nodes."""
        return sum(count for _, count in self.counts)


def read_placement(session: ort.InferenceSession, provider: str) -> Placement:
    """Read back where nodes run.

    Args:
        session: One that was opened with `session.record_ep_graph_assignment_info`.
        provider: ONNX Runtime's name of the provider that was asked for.
    """
    counts: Counter[str] = Counter()
    fallen = []
    for part in session.get_provider_graph_assignment_info():
        nodes = part.get_nodes()
        counts[part.ep_name] += len(nodes)
        if part.ep_name != provider:
            fallen += [
                PlacedNode(name=n.name, op_type=n.op_type, domain=n.domain, provider=part.ep_name)
                for n in nodes
            ]
    return Placement(counts=tuple(counts.most_common()), fallen=tuple(fallen))
