"""Eight bits: static (QDQ, with ranges from calibration) and dynamic (ranges at run time).

Weights are int8, symmetric, with a scale an output channel; activations uint8 with a zero point.
ONNX Runtime's documentation puts int8 activations first, but on x86 its CPU kernels multiply
unsigned by signed: int8 activations ran at 2 to 3 times the time of uint8 ones (ViT, MobileNet).
"""

import heapq
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx

from onnx_utilrank.errors import ModelError
from onnx_utilrank.model.graph import GraphIndex
from onnx_utilrank.model.store import ModelStore
from onnx_utilrank.quantization.between import between
from onnx_utilrank.quantization.nodes import TURNED, Weighted, is_turned, weighted_nodes
from onnx_utilrank.quantization.ort import calling, tools
from onnx_utilrank.quantization.prepare import FLOAT, Prepared, at_opset, prepare, value_types
from onnx_utilrank.quantization.ranges import Range, ranges
from onnx_utilrank.quantization.scheme import Calibration, Quantized, require_known, require_some
from onnx_utilrank.ranking.cost import NODE_BYTES
from onnx_utilrank.runtime.providers import Provider
from onnx_utilrank.sites.site import Skip
from onnx_utilrank.validation.divergence import OutputRecorder, open_judged

__all__ = ["INT8", "INT8_DYNAMIC", "Dynamic", "Static"]

# Since when scales may be of channels; and since when QuantizeLinear exists in its dynamic form.
PER_CHANNEL_OPSET, DYNAMIC_OPSET = 13, 11

# Divergence (nats a decision, or ½ of the relative squared error) up to which nothing is looked
# into: a fifth of what users see in their metric.
TOLERATED = 0.01

# Models that are made to find what does not bear it, at most.
LOOKS = 64

# What a weight brings along in the file: nodes with their names, and initializers.
STATIC_NODES, DYNAMIC_NODES = 3, 5


def _bytes(outputs: int, inputs: int, nodes: int) -> float:
    """int8, with a scale (4 bytes) and a zero point (1) an output."""
    return float(outputs * inputs + 5 * outputs + nodes * NODE_BYTES)


class Static:
    """Int8 with ranges of activations from calibration, as QuantizeLinear and DequantizeLinear.

    Quantized are products with weights, and of what lies between Convs also additions, pooling and
    what moves values. What MatMul and Gemm make stays in float: it feeds residual sums, softmax and
    norms, and they have kernels for that.
    """

    key = "int8"
    op_types = ("MatMul", "Gemm", "Conv", "ConvTranspose", "Gather")

    def check(self, provider: Provider) -> None:
        """See `Scheme.check`."""

    def matrix_bytes(
        self, op_type: str, outputs: int, inputs: int, dtype: np.dtype[np.generic]
    ) -> float:
        """See `Scheme.matrix_bytes`; a table has one scale for all."""
        if op_type not in self.op_types or dtype != np.float32:
            return float(outputs * inputs * dtype.itemsize)
        if op_type == "Gather":
            return float(outputs * inputs + STATIC_NODES * NODE_BYTES)
        return _bytes(outputs, inputs, STATIC_NODES)

    def quantize(
        self, store: ModelStore, calibration: Calibration, in_float: Sequence[str] | None = None
    ) -> Quantized:
        """See `Scheme.quantize`.

        What would move the outputs too far stays in float: see `culprits`.
        """
        source = at_opset(store, PER_CHANNEL_OPSET, calibration)
        index = GraphIndex.build(source)
        weights, left = weighted_nodes(index, self.op_types, "its operator is not quantized")
        require_some(store, self.key, weights, left)
        prepared = prepare(index, weights, calibration.provider)
        model = prepared.inferred(self.key)
        inner = between(index, weights)
        op_types = sorted({w.op_type for w in weights} | {*inner.values()})
        around = {
            name
            for k in (*(w.place for w in weights), *inner)
            for name in (*index.node(k).input, *index.node(k).output)
        }
        kinds = value_types(source, calibration.provider)
        computed = [n for n in sorted(around) if kinds.get(n) == FLOAT and n not in index.constants]
        found = ranges(source, computed, calibration)

        def make(own: Sequence[Weighted]) -> ModelStore:
            places = [*(w.place for w in own), *between(index, own)]
            names = [prepared.names[k] for k in places]
            return prepared.finished(_qdq(prepared, model, found, names, op_types))

        return _quantized(store, prepared, weights, left, calibration, in_float, make, self.key)


class Dynamic:
    """Int8 weights; activations are quantized at run time by the range they then have."""

    key = "int8-dynamic"
    op_types = ("MatMul", "Gemm", "Gather")

    def check(self, provider: Provider) -> None:
        """See `Scheme.check`."""

    def matrix_bytes(
        self, op_type: str, outputs: int, inputs: int, dtype: np.dtype[np.generic]
    ) -> float:
        """See `Scheme.matrix_bytes`."""
        if op_type not in self.op_types or dtype != np.float32:
            return float(outputs * inputs * dtype.itemsize)
        if op_type == "Gather":
            return float(outputs * inputs + NODE_BYTES)
        return _bytes(outputs, inputs, DYNAMIC_NODES)

    def quantize(
        self, store: ModelStore, calibration: Calibration, in_float: Sequence[str] | None = None
    ) -> Quantized:
        """See `Scheme.quantize`."""
        source = at_opset(store, DYNAMIC_OPSET, calibration)
        index = GraphIndex.build(source)
        slow = "its operator has no fast kernel that takes ranges at run time"
        weights, left = weighted_nodes(index, self.op_types, slow)
        turned = [w for w in weights if w.op_type == "Gemm" and is_turned(index.node(w.place))]
        weights = [w for w in weights if w not in turned]
        left += [Skip(node=w.label, op_type=w.op_type, reason=TURNED) for w in turned]
        require_some(store, self.key, weights, left)
        prepared = prepare(index, weights, calibration.provider, gemms=False)

        def make(own: Sequence[Weighted]) -> ModelStore:
            out = prepared.path.with_name("quantized.onnx")
            with calling(store.label, self.key):
                tools().quantize_dynamic(
                    prepared.path,
                    out,
                    op_types_to_quantize=list(self.op_types),
                    nodes_to_quantize=[prepared.names[w.place] for w in own],
                    per_channel=True,
                    weight_type=tools().QuantType.QInt8,
                    use_external_data_format=source.has_external_data,
                )
                made = onnx.load(out)
            return prepared.finished(made)

        return _quantized(store, prepared, weights, left, calibration, in_float, make, self.key)


def _quantized(
    store: ModelStore,
    prepared: Prepared,
    weights: Sequence[Weighted],
    left: Sequence[Skip],
    calibration: Calibration,
    in_float: Sequence[str] | None,
    make: Callable[[Sequence[Weighted]], ModelStore],
    scheme: str,
) -> Quantized:
    """The model with all weights quantized but those that would move the outputs too far."""
    made = prepared.source.proto.graph.node
    nodes = {made[w.place].output[0]: w for w in weights}
    stays = in_float
    if stays is None:
        stays = ()
        if calibration.losses:
            losses, provider = calibration.losses, calibration.provider
            session = open_judged(prepared.source, provider, losses)
            recorder = OutputRecorder(session, losses, calibration.judging())

            def lost(names: Sequence[str]) -> float:
                calibration.progress("quantizing", 0, 0)
                candidate = make([nodes[n] for n in names])
                return recorder.compare(open_judged(candidate, provider, losses)).mean

            stays = culprits(list(nodes), lost)
    require_known(store, nodes, stays)
    names = [name for name in nodes if name not in stays]
    if not names:
        raise ModelError(
            f"{store.label}: {scheme}: each of its weights would move the outputs too far"
        )
    notes: tuple[str, ...] = ()
    if prepared.source is not store:
        notes = (
            f"The model was converted from opset {store.opset} to {prepared.source.opset}, which "
            f"{scheme} needs; its outputs are the same.",
        )
    moved = "quantized it alone would move the outputs too far"
    return Quantized(
        store=make([nodes[name] for name in names]),
        weights=tuple(nodes[name].label for name in names),
        left=(
            *left,
            *(Skip(node=nodes[n].label, op_type=nodes[n].op_type, reason=moved) for n in stays),
        ),
        in_float=tuple(stays),
        notes=notes,
    )


def _qdq(
    prepared: Prepared,
    model: onnx.ModelProto,
    found: Mapping[str, Range],
    names: Sequence[str],
    op_types: Sequence[str],
) -> onnx.ModelProto:
    """A copy of the model with QuantizeLinear and DequantizeLinear around the named nodes."""
    proto = onnx.ModelProto()
    proto.CopyFrom(model)
    with calling(prepared.source.label, INT8.key):
        kit: Any = tools()
        data = {
            name: kit.calibrate.TensorData(lowest=np.float32(low), highest=np.float32(high))
            for name, (low, high) in found.items()
        }
        quantizer = kit.qdq_quantizer.QDQQuantizer(
            proto,
            per_channel=True,
            reduce_range=False,
            weight_qType=kit.QuantType.QInt8,
            activation_qType=kit.QuantType.QUInt8,
            tensors_range=kit.calibrate.TensorsData(kit.CalibrationMethod.MinMax, data),
            nodes_to_quantize=list(names),
            nodes_to_exclude=[],
            op_types_to_quantize=list(op_types),
            extra_options={"OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"]},
        )
        quantizer.quantize_model()
        quantizer.model.topological_sort()
        made: onnx.ModelProto = quantizer.model.model
    return made


def culprits(names: Sequence[str], lost: Callable[[Sequence[str]], float]) -> tuple[str, ...]:
    """Those which alone lose more than half of what is tolerated, if all together lose more.

    Half by half, the worst first, so that a few among many are found in few looks; of a model that
    bears little anywhere, the worst that `LOOKS` tell.

    Args:
        names: What is looked through, in graph order: neighbours are alike.
        lost: What is lost where some are quantized and all others are not.
    """
    everything = lost(names)
    if everything <= TOLERATED:
        return ()
    looks = 1
    parts = [(-everything, 0, names)]
    found: set[str] = set()
    while parts:
        _, _, part = heapq.heappop(parts)
        if len(part) == 1:
            found.update(part)
        elif looks + 2 <= LOOKS:
            middle = len(part) // 2
            for half in (part[:middle], part[middle:]):
                looks += 1
                loss = lost(half)
                if loss > TOLERATED / 2:
                    heapq.heappush(parts, (-loss, looks, half))
    return tuple(name for name in names if name in found)


INT8, INT8_DYNAMIC = Static(), Dynamic()
