"""Build a text encoder of a standard shape with random weights: for timing, not for answers.

The graph is what an exporter makes of a BERT: tables that are looked up (Gather), separate query,
key and value layers (MatMul, then Add), a mask that is added to the scores, LayerNormalization
behind each residual branch, and any number of sentences and tokens.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from synthetic_vit import IR_VERSION, OPSET, Graph, attention

__all__ = ["SHAPES", "BertShape", "build"]

IDS_NAME, MASK_NAME, OUTPUT_NAME = "input_ids", "attention_mask", "last_hidden_state"
# What is added to the scores of a token that is masked.
MASKED = -1e4


@dataclass(frozen=True, slots=True, kw_only=True)
class BertShape:
    """Everything that decides the graph.

    Attributes:
        width: Features of a token.
        layers: Transformer blocks.
        heads: Attention heads; they share the width evenly.
        vocabulary: Rows of the table of words.
        positions: Rows of the table of positions: tokens of a sentence, at most.
        mlp_ratio: Hidden units of the MLP for each feature of a token.
    """

    width: int
    layers: int
    heads: int
    vocabulary: int = 30522
    positions: int = 512
    mlp_ratio: int = 4


SHAPES = {"bert-base": BertShape(width=768, layers=12, heads=12)}


def build(shape: BertShape, seed: int = 0) -> onnx.ModelProto:
    """Make the model, int64 ids and mask [N, T] to float32 [N, T, width], for any N and T.

    Args:
        shape: The network.
        seed: Of the weights. Layers keep the variance of their inputs.

    Raises:
        ValueError: The heads do not divide the width.
    """
    if shape.width % shape.heads:
        raise ValueError(f"{shape}: heads have to divide the width")
    graph = Graph(seed)
    width = shape.width
    words = graph.random("words", (shape.vocabulary, width), 1.0)
    places = graph.random("positions", (shape.positions, width), 1.0)
    length = graph.node("Shape", IDS_NAME, start=1, end=2)
    first = graph.node(
        "Slice", places, graph.integers("zero", (0,)), length, graph.integers("axis", (0,))
    )
    tokens = graph.node("Add", graph.node("Gather", words, IDS_NAME, axis=0), first)
    tokens = graph.norm("embeddings.norm", tokens, width)
    mask = _mask(graph)
    for layer in range(shape.layers):
        tokens = _block(graph, shape, tokens, mask, f"layer.{layer}")
    graph.node("Identity", tokens, output=OUTPUT_NAME)
    size: list[str | int | None] = ["N", "T"]
    return helper.make_model(
        helper.make_graph(
            graph.nodes,
            "synthetic_bert",
            [
                helper.make_tensor_value_info(name, TensorProto.INT64, size)
                for name in (IDS_NAME, MASK_NAME)
            ],
            [helper.make_tensor_value_info(OUTPUT_NAME, TensorProto.FLOAT, [*size, width])],
            graph.initializers,
        ),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
    )


def _mask(graph: Graph) -> str:
    """What is added to scores, [N, 1, 1, T]: nothing where a token counts."""
    counted = graph.node("Cast", MASK_NAME, to=TensorProto.FLOAT)
    out = graph.node("Sub", graph.constant("mask.one", np.array(1, np.float32)), counted)
    low = graph.node("Mul", out, graph.constant("mask.low", np.array(MASKED, np.float32)))
    return graph.node("Unsqueeze", low, graph.integers("mask.axes", (1, 2)))


def _block(graph: Graph, shape: BertShape, tokens: str, mask: str, name: str) -> str:
    """A post-LayerNorm transformer block."""
    width, hidden = shape.width, shape.width * shape.mlp_ratio
    attended = attention(graph, width, shape.heads, tokens, name, 1.0, mask)
    tokens = graph.norm(f"{name}.norm1", graph.node("Add", tokens, attended), width)
    inner = graph.gelu(f"{name}.gelu", graph.linear(f"{name}.mlp.0", tokens, width, hidden))
    made = graph.linear(f"{name}.mlp.1", inner, hidden, width)
    return graph.norm(f"{name}.norm2", graph.node("Add", tokens, made), width)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the model that the command line names."""
    parser = argparse.ArgumentParser(
        description="Write a text encoder with seeded random weights, for benchmarks of time."
    )
    parser.add_argument("shape", choices=SHAPES, help="which one")
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
