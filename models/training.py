"""What the recipes of the demo models share: training, export to ONNX, and the report."""

import argparse
import ast
import hashlib
import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
import torch
from torch import Tensor, nn
from torch.nn import functional

from digits import INPUT_NAME, OUTPUT_NAME, SIDE, accuracy, load_digits_split

OPSET = 18
SEED = 0
BATCH_SIZE = 64
LABEL_SMOOTHING = 0.1
SHIFT = 8  # images are moved by up to the side over this
LAYER_OPS = {"Conv", "Gemm", "MatMul"}
# Where the exporter notes the modules a node comes from, outermost first, itself last.
SCOPES_KEY = "pkg.torch.onnx.name_scopes"


@dataclass(frozen=True)
class Recipe:
    """How one demo model is made.

    Attributes:
        name: The file's stem, `<name>.onnx`.
        build: Makes the untrained network, float32 [N, 1, 8, 8] to float32 [N, 10].
        epochs: Passes over the train part.
        learning_rate: The highest rate of the one-cycle schedule.
        weight_decay: AdamW's decoupled weight decay.
    """

    name: str
    build: Callable[[], nn.Module]
    epochs: int
    learning_rate: float
    weight_decay: float


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Move each image by up to an eighth of its side each way; zeros come in at the border.

    Args:
        images: float32 [N, channels, side, side].
        generator: Draws the shifts.

    Returns:
        float32 [N, channels, side, side].
    """
    count, _, side, _ = images.shape
    most = side // SHIFT
    padded = functional.pad(images, [most] * 4)
    starts = torch.randint(0, 2 * most + 1, (2, count, 1), generator=generator)
    rows, columns = starts + torch.arange(side)
    samples = torch.arange(count)[:, None, None]
    return padded[samples, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def train(recipe: Recipe, epochs: int) -> nn.Module:
    """Train a recipe's network on the train part of the digits.

    Args:
        recipe: The network and its training settings.
        epochs: Passes over the train part; the schedule is stretched to fit.

    Returns:
        The trained network in eval mode.
    """
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    split = load_digits_split()
    images, labels = torch.from_numpy(split.train_images), torch.from_numpy(split.train_labels)
    network = recipe.build()
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay
    )
    # A last batch of few images would make noisy batch statistics, so the remainder is left out.
    steps = len(images) // BATCH_SIZE
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.learning_rate, total_steps=epochs * steps
    )
    network.train()
    for _ in range(epochs):
        order = torch.randperm(len(images), generator=generator)[: steps * BATCH_SIZE]
        for batch in order.reshape(steps, BATCH_SIZE):
            loss = functional.cross_entropy(
                network(shifted(images[batch], generator)),
                labels[batch],
                label_smoothing=LABEL_SMOOTHING,
            )
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
    return network.eval()


def name_layers(graph: onnx.GraphProto) -> None:
    """Name each node that has weights after its torch module, such as `blocks.0.mlp.0/MatMul`.

    The exporter numbers the nodes. The module is told by the weight's name; where the exporter has
    transposed the weight and lost the name, by metadata, so this runs before `strip_metadata`.
    """
    weights = {tensor.name for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type in LAYER_OPS and node.input[1] in weights:
            module, _, parameter = node.input[1].rpartition(".")
            if parameter != "weight":
                scopes = next(p.value for p in node.metadata_props if p.key == SCOPES_KEY)
                module = ast.literal_eval(scopes)[-2]
            node.name = f"{module}/{node.op_type}"


def strip_metadata(model: onnx.ModelProto) -> None:
    """Remove what the exporter says of its own run: stack traces with paths, doc strings."""
    graph = model.graph
    tensors = (*graph.input, *graph.output, *graph.value_info, *graph.initializer)
    for part in (model, graph, *graph.node, *tensors):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")


def export(network: nn.Module, path: Path, shape: Sequence[int] = (1, SIDE, SIDE)) -> None:
    """Write a network as one ONNX file with a dynamic batch.

    Args:
        network: In eval mode, float32 [N, channels, height, width] to float32 [N, classes].
        path: The file to write.
        shape: Channels, height and width.
    """
    # It would tell on every run that torchvision's operators are not there to be exported.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        # torch 2.13's exporter uses a function that torch 2.13 deprecates.
        warnings.simplefilter("ignore", FutureWarning)
        program = torch.onnx.export(
            network,
            # With a batch of one the exporter would take the batch for a constant.
            (torch.zeros(2, *shape),),
            input_names=[INPUT_NAME],
            output_names=[OUTPUT_NAME],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    assert program is not None, "the exporter returns a program when it is given no file"
    model = program.model_proto
    name_layers(model.graph)
    strip_metadata(model)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)


def main(recipe: Recipe, arguments: Sequence[str] | None = None) -> None:
    """Make a demo model and print its accuracy on the test part and its checksum.

    Args:
        recipe: What to make.
        arguments: The command line without the program's name; that of the process by default.
    """
    parser = argparse.ArgumentParser(description=f"Train and export {recipe.name}.onnx.")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path(__file__).with_name(f"{recipe.name}.onnx"),
        metavar="FILE",
        help="the model to write (default: beside the recipe)",
    )
    parser.add_argument("--epochs", type=int, default=recipe.epochs)
    options = parser.parse_args(arguments)
    export(train(recipe, options.epochs), options.output)
    split = load_digits_split()
    share = accuracy(options.output, split.test_images, split.test_labels)
    checksum = hashlib.sha256(options.output.read_bytes()).hexdigest()
    print(f"accuracy {share:.2%} on {len(split.test_labels)} held-out digits")
    print(f"{checksum}  {options.output.name}")
