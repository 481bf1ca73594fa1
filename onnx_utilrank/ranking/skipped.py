"""Nodes that stay, and what to say of them."""

from collections import Counter
from collections.abc import Sequence

from onnx_utilrank.ranking.plan import SkippedNode
from onnx_utilrank.sites.find import SITE_KINDS
from onnx_utilrank.sites.site import Skip

__all__ = ["skipped_nodes", "unfactorable"]

# Reasons that one message gives.
MOST_REASONS = 3


def unfactorable(label: str, skips: Sequence[Skip | SkippedNode]) -> str:
    """What to say of a model without a site: the reasons, the commonest first."""
    known = ", ".join(kind.op_type for kind in SITE_KINDS)
    reasons = Counter(s.reason for s in skips).most_common(MOST_REASONS)
    why = "; ".join(f"{n} x {reason}" for reason, n in reasons)
    return f"{label}: no weight can be factored: {why or f'none of its nodes is of {known}'}"


def skipped_nodes(skips: Sequence[Skip]) -> tuple[SkippedNode, ...]:
    """Nodes that are no sites, as plans and reports list them."""
    return tuple(SkippedNode(node=s.node, op_type=s.op_type, reason=s.reason) for s in skips)
