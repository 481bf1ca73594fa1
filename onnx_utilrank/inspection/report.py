"""What an inspection found."""

import dataclasses
from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

from onnx_utilrank.model.store import TensorSpec
from onnx_utilrank.ranking.plan import SkippedNode

__all__ = ["InspectedHidden", "InspectedSite", "InspectionReport", "OperatorCount"]

# The operator of the one of two tied weights that both are put down to.
TABLE = "Gather"


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorCount:
    """What a model has of one operator.

    Attributes:
        op_type: The operator, with its domain where that is not ONNX's own; for weights in
            subgraphs and functions, where they lie.
        nodes: Number of nodes, those of subgraphs and functions included.
        parameters: Elements of the initializers and constants that they read. What several
            operators read counts for the first of them in graph order.
        bytes: That those take.
    """

    op_type: str
    nodes: int
    parameters: int
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class InspectedSite:
    """A weight that could be factored.

    Attributes:
        site: What plans and reports call it.
        op_type: Operator of the nodes that apply it.
        nodes: Names of those.
        m: Output features.
        d: Input features.
        dtype: Element type.
        parameters: m d.
        share: Of all parameters of the model.
        break_even_rank: The largest rank r whose two factors are smaller: r (m + d) < m d.
        moves: What could be put in its place, and the largest rank at which that is smaller;
            `shrink`, where it loses rows or columns with its neighbours, has the features of each
            of its groups instead.
        freed: Whether the weight goes from the file once it is factored; False where something
            else reads it too.
        tied: Another site whose weight is this one transposed: both are factored, or neither.
    """

    site: str
    op_type: str
    nodes: tuple[str, ...]
    m: int
    d: int
    dtype: str
    parameters: int
    share: float
    break_even_rank: int
    moves: dict[str, int]
    freed: bool
    tied: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class InspectedHidden:
    """Features between weights that could shrink: dimensions of heads, or hidden units.

    Attributes:
        hidden: What plans and reports call them: the first weight that makes them.
        kind: `units` of an MLP or between Convs, or dimensions of `heads`.
        size: Features in a group.
        groups: Number of groups.
        sites: The weights that shrink with them.
    """

    hidden: str
    kind: str
    size: int
    groups: int
    sites: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class InspectionReport:
    """What a model file holds, and what could be done to it, told without data.

    Attributes:
        model: How messages name the model.
        producer: What wrote it, as it says.
        ir_version: Of the file format.
        opsets: Version of the operator set of each domain; ONNX's own is `ai.onnx`.
        file_bytes: External data included.
        external_bytes: Those that lie outside the file.
        external_files: Names of the files that hold them, in the model's folder.
        parameters: Elements of every initializer and constant, in all graphs.
        nodes: Of the main graph.
        functions: Number of model-local functions.
        inputs: What has to be fed.
        outputs: What comes out.
        batch: Samples of a run, where every input fixes that; None where it is free.
        operators: The operators, those with most parameters first.
        sites: What could be factored, in graph order.
        hidden: Features that could shrink, found on one generated sample; None where that could
            not be run, and a note says why.
        skipped: Nodes that are left alone, each with its reason.
        quantized_nodes: Nodes that quantize, or work with quantized weights.
        gradients: What keeps gradients from being had, each a clause; empty where nothing does.
        load_fault: Why ONNX Runtime does not load the model; None where it does, or where a note
            says that it was not tried.
        notes: Sentences that a user has to know.
    """

    verb: ClassVar[str] = "inspect"

    model: str
    producer: str
    ir_version: int
    opsets: dict[str, int]
    file_bytes: int
    external_bytes: int
    external_files: tuple[str, ...]
    parameters: int
    nodes: int
    functions: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    batch: int | None
    operators: tuple[OperatorCount, ...]
    sites: tuple[InspectedSite, ...]
    hidden: tuple[InspectedHidden, ...] | None
    skipped: tuple[SkippedNode, ...]
    quantized_nodes: int
    gradients: tuple[str, ...]
    load_fault: str | None
    notes: tuple[str, ...]

    @property
    def factorable(self) -> int:
        """Parameters of the weights that would go if they were factored; of tied ones once."""
        return sum(s.parameters for s in self.sites if s.freed or (s.tied and s.op_type == TABLE))

    @property
    def left_alone(self) -> dict[tuple[str, str], int]:
        """Operators and reasons why nodes were left alone, and how many nodes each holds for."""
        return dict(Counter((s.op_type, s.reason) for s in self.skipped).most_common())

    def as_dict(self) -> dict[str, object]:
        """The report as JSON types."""
        values = dataclasses.asdict(self)
        values["inputs"], values["outputs"] = map(_specs, (self.inputs, self.outputs))
        return values | {"factorable": self.factorable}


def _specs(specs: tuple[TensorSpec, ...]) -> list[dict[str, object]]:
    return [
        {
            "name": spec.name,
            "dtype": None if spec.dtype is None else spec.dtype.name,
            "shape": None if spec.shape is None else list(spec.shape),
        }
        for spec in specs
    ]
