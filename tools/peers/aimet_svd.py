"""AIMET: weight SVD or spatial SVD of a torch twin, with its own greedy search for the ranks.

    python aimet_svd.py MODEL.onnx SAMPLES.npz OUT.onnx {weight-svd,spatial-svd} KEEP

The twin is made by onnx2torch. Products with a constant become `torch.nn.Linear`, which AIMET
looks for. The layers that it splits are put into the ONNX file: an export of the twin would keep
the shapes of the sample that it is traced with. Its user has to give it a score; here that is how
little the outputs of the twin change, minus the squared error relative to the outputs themselves,
so that no labels are needed. KEEP is the share of all parameters of the file; what other nodes hold
counts as kept.
"""

import argparse
import copy
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import onnx
import torch

try:
    import torchvision  # noqa: F401
except RuntimeError:
    # A wheel of torchvision for CUDA beside a torch without it has no operators of its own, and
    # cannot be imported unless they are declared. Nothing here calls them.
    for name in ("nms", "qnms"):
        schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        torch.library.define(f"torchvision::{name}", schema)

from aimet_torch.common.defs import (
    CompressionScheme,
    CostMetric,
    GreedySelectionParameters,
    RankSelectScheme,
)
from aimet_torch.compress import ModelCompressor
from aimet_torch.defs import SpatialSvdParameters, WeightSvdParameters
from onnx2torch import convert
from onnx2torch.node_converters.matmul import OnnxMatMul

# Samples that each candidate of its search is scored on.
SCORED = 8
# Ratios that the search tries at each layer; AIMET tries 10 by itself.
CANDIDATES = 5


class Twin(torch.nn.Module):
    """The model in torch, which casts what it gets: AIMET looks at layers with random floats."""

    def __init__(self, model: onnx.ModelProto, types: list[torch.dtype]) -> None:
        super().__init__()
        self.graph = with_linear_layers(convert(model, attach_onnx_mapping=True).eval())
        self.types = types

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        """The first output."""
        made = self.graph(*(x.to(kind) for x, kind in zip(inputs, self.types, strict=True)))
        return made if torch.is_tensor(made) else made[0]


def with_linear_layers(graph: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """Products x W with a constant matrix W [d, m] become layers."""
    modules = dict(graph.named_modules())
    for node in graph.graph.nodes:
        if node.op != "call_module" or not isinstance(modules[node.target], OnnxMatMul):
            continue
        x, w = node.args
        if w.op != "get_attr":
            continue
        owner, _, leaf = w.target.rpartition(".")
        weight = getattr(graph.get_submodule(owner), leaf)
        if weight.ndim != 2:
            continue
        d, m = weight.shape
        layer: Any = torch.nn.Linear(d, m, bias=False)
        layer.weight.data = weight.detach().T.contiguous()
        layer.onnx_mapping = modules[node.target].onnx_mapping
        graph.set_submodule(node.target, layer)
        node.args = (x,)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    # AIMET tells layers of its copies by the order of modules, which the first copy settles.
    return copy.deepcopy(graph)


def pairs(twin: Twin, made: Twin) -> dict[str, tuple[Any, Any]]:
    """The two layers that AIMET put in the place of one, by the output of its node."""
    found: dict[str, tuple[Any, Any]] = {}
    for node in twin.graph.graph.nodes:
        if node.op == "call_module":
            layer: Any = twin.graph.get_submodule(node.target)
            for module in made.graph.get_submodule(node.target).modules():
                if isinstance(module, torch.nn.Sequential) and len(module) == 2:
                    first, second = module
                    if isinstance(second, torch.nn.Linear | torch.nn.Conv2d) and isinstance(
                        first, type(second)
                    ):
                        found[layer.onnx_mapping.outputs[0]] = (first, second)
    return found


def with_pairs(
    model: onnx.ModelProto,
    found: Mapping[str, tuple[Any, Any]],
    spatial: bool,
) -> onnx.ModelProto:
    """The model with two nodes in the place of each that was split."""
    nodes: list[onnx.NodeProto] = []
    held = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.output[0] not in found:
            nodes.append(node)
            continue
        out = node.output[0]
        first, second = found[out]
        inner: list[dict[str, Any]]
        tensors = {f"{out}/first": first.weight, f"{out}/second": second.weight}
        if isinstance(second, torch.nn.Linear):
            tensors = {name: weight.T for name, weight in tensors.items()}
            kind, inner = "MatMul", [{}, {}]
        else:
            kind, inner = "Conv", list(convolutions_of(node, spatial))
        last = [f"{out}/second"]
        if second.bias is not None:
            tensors[f"{out}/bias"] = second.bias
            if isinstance(second, torch.nn.Conv2d):
                last.append(f"{out}/bias")
        sums = len(last) == 1 and second.bias is not None
        for name, tensor in tensors.items():
            values = np.ascontiguousarray(tensor.detach().numpy())
            held[name] = onnx.numpy_helper.from_array(values, name)
        product = f"{out}/product" if sums else out
        make = onnx.helper.make_node
        nodes.append(make(kind, [node.input[0], f"{out}/first"], [f"{out}/hidden"], **inner[0]))
        nodes.append(make(kind, [f"{out}/hidden", *last], [product], **inner[1]))
        if sums:
            nodes.append(make("Add", [product, f"{out}/bias"], [out]))
    read = {name for node in nodes for name in node.input}
    read |= {value.name for value in model.graph.output}
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    del model.graph.initializer[:]
    model.graph.initializer.extend(tensor for name, tensor in held.items() if name in read)
    return model


def convolutions_of(node: onnx.NodeProto, spatial: bool) -> Iterator[dict[str, Any]]:
    """Attributes of the two Convs: a column and a row, or a pointwise one and the node's own."""
    own = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    if not spatial:
        yield {"kernel_shape": [1, 1]}
        yield own
        return
    same = {"auto_pad": own["auto_pad"]} if own.get("auto_pad", b"NOTSET") != b"NOTSET" else {}
    top, left, bottom, right = own.get("pads", [0, 0, 0, 0])
    down, across = own.get("strides", [1, 1])
    height, width = own["kernel_shape"]
    for kernel, strides, pads in (
        ([height, 1], [down, 1], [top, 0, bottom, 0]),
        ([1, width], [1, across], [0, left, 0, right]),
    ):
        yield {"kernel_shape": kernel, "strides": strides, **(same or {"pads": pads})}


def main() -> None:
    """Compress as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("samples")
    parser.add_argument("out")
    parser.add_argument("scheme", choices=["weight-svd", "spatial-svd"])
    parser.add_argument("keep", type=float)
    options = parser.parse_args()

    model = onnx.load(options.model)
    held = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in held]
    with np.load(options.samples) as arrays:
        samples = [torch.from_numpy(arrays[value.name]) for value in inputs]
    batches = [[x[k : k + 1] for x in samples] for k in range(min(SCORED, len(samples[0])))]
    twin = Twin(model, [x.dtype for x in samples]).eval()

    layers = [m for m in twin.modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)]
    convolutions = [m for m in layers if isinstance(m, torch.nn.Conv2d) and m.groups == 1]
    total = sum(int(np.prod(tensor.dims)) for tensor in model.graph.initializer)
    all_layers = sum(m.weight.numel() for m in layers)
    cut = layers if options.scheme == "weight-svd" else convolutions
    can = sum(m.weight.numel() for m in cut)
    ratio = (options.keep * total - (total - all_layers)) / all_layers
    if not cut or options.keep * total <= total - can:
        sys.exit(
            f"{can / total:.1%} of the parameters are in layers that {options.scheme} takes: "
            f"{options.keep:.0%} of all cannot be reached"
        )

    with torch.no_grad():
        wanted = [twin(*batch) for batch in batches]

    def score(candidate: torch.nn.Module, iterations: object, use_cuda: bool) -> float:
        del iterations, use_cuda
        with torch.no_grad():
            pairs = [(candidate(*batch), y) for batch, y in zip(batches, wanted, strict=True)]
        return -float(np.mean([((z - y).square().sum() / y.square().sum()) for z, y in pairs]))

    greedy = GreedySelectionParameters(
        target_comp_ratio=ratio, num_comp_ratio_candidates=CANDIDATES
    )
    if options.scheme == "weight-svd":
        kind = CompressionScheme.weight_svd
        parameters: Any = WeightSvdParameters(
            WeightSvdParameters.Mode.auto,
            WeightSvdParameters.AutoModeParams(RankSelectScheme.greedy, greedy),
        )
    else:
        kind = CompressionScheme.spatial_svd
        parameters = SpatialSvdParameters(
            SpatialSvdParameters.Mode.auto, SpatialSvdParameters.AutoModeParams(greedy)
        )
    made, _ = ModelCompressor.compress_model(
        twin,
        eval_callback=score,
        eval_iterations=None,
        input_shape=[tuple(x.shape) for x in batches[0]],
        compress_scheme=kind,
        cost_metric=CostMetric.memory,
        parameters=parameters,
    )
    onnx.save(with_pairs(model, pairs(twin, made), options.scheme == "spatial-svd"), options.out)


if __name__ == "__main__":
    main()
