"""The table of all operators that the torch executor knows."""

from onnx_utilrank.torch_graph.attention import ATTENTION
from onnx_utilrank.torch_graph.contrib import CONTRIB, SIMPLIFIED
from onnx_utilrank.torch_graph.contrib_attention import CONTRIB_ATTENTION
from onnx_utilrank.torch_graph.control import CONTROL
from onnx_utilrank.torch_graph.convolution import CONVOLUTION
from onnx_utilrank.torch_graph.creation import CREATION
from onnx_utilrank.torch_graph.elementwise import ELEMENTWISE
from onnx_utilrank.torch_graph.fourier import FOURIER
from onnx_utilrank.torch_graph.indexing import INDEXING
from onnx_utilrank.torch_graph.linear import LINEAR
from onnx_utilrank.torch_graph.normalization import NORMALIZATION
from onnx_utilrank.torch_graph.operator import Operator
from onnx_utilrank.torch_graph.pooling import POOLING
from onnx_utilrank.torch_graph.quantization import DYNAMIC, QUANTIZATION
from onnx_utilrank.torch_graph.recurrent import RECURRENT
from onnx_utilrank.torch_graph.reductions import REDUCTIONS
from onnx_utilrank.torch_graph.resize import RESIZE
from onnx_utilrank.torch_graph.shapes import SHAPES

__all__ = ["OPERATORS"]

_STANDARD = (
    ATTENTION,
    CONTROL,
    CONVOLUTION,
    CREATION,
    DYNAMIC,
    ELEMENTWISE,
    FOURIER,
    INDEXING,
    LINEAR,
    NORMALIZATION,
    POOLING,
    QUANTIZATION,
    RECURRENT,
    REDUCTIONS,
    RESIZE,
    SHAPES,
    SIMPLIFIED,
)
_MICROSOFT = (CONTRIB, CONTRIB_ATTENTION, QUANTIZATION, SIMPLIFIED)

# By domain ("" is ONNX's own) and operator.
OPERATORS: dict[tuple[str, str], Operator] = {
    (domain, name): operator
    for domain, tables in (("", _STANDARD), ("com.microsoft", _MICROSOFT))
    for table in tables
    for name, operator in table.items()
}
