"""Build a vision transformer of a standard shape with random weights: for timing, not for answers.

No network is trained and no torch is needed. The graph is what an exporter makes of a plain ViT:
one node an operator, separate query, key and value layers (MatMul, then Add), GELU spelled out with
Erf, and a batch of any size.
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

__all__ = ["OPSET", "SHAPES", "Graph", "VitShape", "attention", "build"]

# The first opset with LayerNormalization.
OPSET = 17
IR_VERSION = 10
INPUT_NAME = "image"
OUTPUT_NAME = "logits"
CHANNELS = 3
# Usual for the class token and the position embedding.
EMBEDDING_SCALE = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class VitShape:
    """Everything that decides the graph.

    Attributes:
        width: Features of a token.
        layers: Transformer blocks.
        heads: Attention heads; they share the width evenly.
        patch: Side of a patch, in pixels.
        image: Side of the square image, in pixels; a multiple of `patch`.
        mlp_ratio: Hidden units of the MLP for each feature of a token.
        classes: Logits.
    """

    width: int
    layers: int
    heads: int
    patch: int = 16
    image: int = 224
    mlp_ratio: int = 4
    classes: int = 1000

    @property
    def tokens(self) -> int:
        """Tokens of an image: its patches and the class token."""
        return (self.image // self.patch) ** 2 + 1


SHAPES = {
    "vit-s": VitShape(width=384, layers=12, heads=6),
    "vit-b": VitShape(width=768, layers=12, heads=12),
    "vit-l": VitShape(width=1024, layers=24, heads=16),
}


def build(shape: VitShape, seed: int = 0) -> onnx.ModelProto:
    """Make the model, float32 [N, 3, image, image] to float32 [N, classes], for any N.

    Args:
        shape: The network.
        seed: Of the weights. Layers keep the variance of their inputs, and the layers that end a
            residual branch are scaled down by the root of the number of branches, so that values
            stay near 1 at any depth.

    Raises:
        ValueError: The heads do not divide the width, or the patches the image.
    """
    if shape.width % shape.heads or shape.image % shape.patch:
        raise ValueError(f"{shape}: heads have to divide the width, and patches the image")
    graph = Graph(seed)
    tokens = _embed(graph, shape)
    for layer in range(shape.layers):
        tokens = _block(graph, shape, tokens, f"blocks.{layer}")
    tokens = graph.norm("norm", tokens, shape.width)
    first = graph.node("Gather", tokens, graph.integers("first", 0), axis=1)
    weight = graph.random("head.weight", (shape.classes, shape.width), shape.width**-0.5)
    bias = graph.constant("head.bias", np.zeros(shape.classes, np.float32))
    graph.node("Gemm", first, weight, bias, name="head/Gemm", output=OUTPUT_NAME, transB=1)
    pixels: list[str | int | None] = ["N", CHANNELS, shape.image, shape.image]
    return helper.make_model(
        helper.make_graph(
            graph.nodes,
            "synthetic_vit",
            [helper.make_tensor_value_info(INPUT_NAME, TensorProto.FLOAT, pixels)],
            [helper.make_tensor_value_info(OUTPUT_NAME, TensorProto.FLOAT, ["N", shape.classes])],
            graph.initializers,
        ),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
    )


class Graph:
    """Nodes and initializers in the making; each method returns the name of a value.

    Args:
        seed: Of random weights.
    """

    def __init__(self, seed: int) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self._random = np.random.default_rng(seed)

    def node(self, op: str, *inputs: str, name: str = "", output: str = "", **attrs: Any) -> str:
        """A node of one output."""
        name = name or f"{op}_{len(self.nodes)}"
        output = output or f"{name}_output"
        self.nodes.append(helper.make_node(op, list(inputs), [output], name=name, **attrs))
        return output

    def constant(self, name: str, values: np.ndarray) -> str:
        """An initializer."""
        self.initializers.append(numpy_helper.from_array(values, name))
        return name

    def integers(self, name: str, values: int | Sequence[int]) -> str:
        """An int64 initializer."""
        return self.constant(name, np.array(values, np.int64))

    def random(self, name: str, shape: tuple[int, ...], scale: float) -> str:
        """A float32 initializer of normal values."""
        values = self._random.standard_normal(shape, dtype=np.float32)
        return self.constant(name, values * np.float32(scale))

    def linear(self, name: str, x: str, fan_in: int, fan_out: int, gain: float = 1.0) -> str:
        """A layer with a bias: MatMul, then Add."""
        weight = self.random(f"{name}.weight", (fan_in, fan_out), gain * fan_in**-0.5)
        bias = self.random(f"{name}.bias", (fan_out,), EMBEDDING_SCALE)
        product = self.node("MatMul", x, weight, name=f"{name}/MatMul")
        return self.node("Add", product, bias, name=f"{name}/Add")

    def norm(self, name: str, x: str, width: int) -> str:
        """A LayerNormalization over the last axis."""
        scale = self.constant(f"{name}.weight", np.ones(width, np.float32))
        bias = self.constant(f"{name}.bias", np.zeros(width, np.float32))
        op = "LayerNormalization"
        return self.node(op, x, scale, bias, name=f"{name}/{op}", axis=-1, epsilon=1e-6)

    def gelu(self, name: str, x: str) -> str:
        """GELU spelled out with Erf."""
        root, one, half = (
            self.constant(f"{name}.{key}", np.array(value, np.float32))
            for key, value in (("root", math.sqrt(2)), ("one", 1.0), ("half", 0.5))
        )
        error = self.node("Erf", self.node("Div", x, root))
        return self.node("Mul", self.node("Mul", x, self.node("Add", error, one)), half)


def _embed(graph: Graph, shape: VitShape) -> str:
    """Patches, the class token before them, and positions: [N, tokens, width]."""
    kernel = (shape.width, CHANNELS, shape.patch, shape.patch)
    weight = graph.random("patches.weight", kernel, (CHANNELS * shape.patch**2) ** -0.5)
    bias = graph.random("patches.bias", (shape.width,), EMBEDDING_SCALE)
    side = [shape.patch, shape.patch]
    maps = graph.node(
        "Conv", INPUT_NAME, weight, bias, name="patches/Conv", kernel_shape=side, strides=side
    )
    flat = graph.node("Reshape", maps, graph.integers("patches.shape", (0, shape.width, -1)))
    patches = graph.node("Transpose", flat, perm=[0, 2, 1])
    images = graph.node("Shape", INPUT_NAME, start=0, end=1)
    ends = graph.integers("class_token.shape", (1, shape.width))
    token = graph.random("class_token", (1, 1, shape.width), EMBEDDING_SCALE)
    tokens = graph.node("Expand", token, graph.node("Concat", images, ends, axis=0))
    joined = graph.node("Concat", tokens, patches, axis=1)
    places = graph.random("positions", (1, shape.tokens, shape.width), EMBEDDING_SCALE)
    return graph.node("Add", joined, places)


def _block(graph: Graph, shape: VitShape, tokens: str, name: str) -> str:
    """A pre-LayerNorm transformer block."""
    width, hidden = shape.width, shape.width * shape.mlp_ratio
    gain = (2 * shape.layers) ** -0.5
    normed = graph.norm(f"{name}.norm1", tokens, width)
    attended = attention(graph, width, shape.heads, normed, name, gain)
    tokens = graph.node("Add", tokens, attended)
    inner = graph.norm(f"{name}.norm2", tokens, width)
    inner = graph.gelu(f"{name}.gelu", graph.linear(f"{name}.mlp.0", inner, width, hidden))
    return graph.node("Add", tokens, graph.linear(f"{name}.mlp.1", inner, hidden, width, gain))


def attention(
    graph: Graph, width: int, heads: int, x: str, name: str, gain: float, mask: str = ""
) -> str:
    """Multi-head self-attention with separate query, key and value layers.

    Args:
        graph: What the nodes are added to.
        width: Features of a token.
        heads: Heads; they share the width evenly.
        x: The tokens, [N, tokens, width].
        name: Prefix of names.
        gain: Scale of the last layer's weights.
        mask: What is added to the scores, [N, 1, 1, tokens]; empty for nothing.
    """
    size = width // heads
    split = graph.integers(f"{name}.heads", (0, 0, heads, size))
    query, key, value = (
        graph.node(
            "Transpose",
            graph.node("Reshape", graph.linear(f"{name}.{part}", x, width, width), split),
            perm=[0, 2, 3, 1] if part == "key" else [0, 2, 1, 3],
        )
        for part in ("query", "key", "value")
    )
    scale = graph.constant(f"{name}.scale", np.array(size**-0.5, np.float32))
    scores = graph.node("Mul", graph.node("MatMul", query, key), scale)
    if mask:
        scores = graph.node("Add", scores, mask)
    mixed = graph.node("MatMul", graph.node("Softmax", scores, axis=-1), value)
    mixed = graph.node("Transpose", mixed, perm=[0, 2, 1, 3])
    merged = graph.node("Reshape", mixed, graph.integers(f"{name}.merged", (0, 0, width)))
    return graph.linear(f"{name}.projection", merged, width, width, gain)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the model that the command line names."""
    parser = argparse.ArgumentParser(
        description="Write a vision transformer with seeded random weights, for benchmarks of time."
    )
    parser.add_argument("shape", choices=SHAPES, help="which one; all take 224x224 images")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="FILE", help="the .onnx file to write"
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="S", help="seed of the weights (default: 0)"
    )
    options = parser.parse_args(arguments)
    onnx.save(build(SHAPES[options.shape], options.seed), options.output)


if __name__ == "__main__":
    main()
