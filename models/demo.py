"""The demo, `make demo`: halve a vision transformer, and count what it cost.

Writes the calibration and test digits into `.demo`, runs the command line tool just as a user
would, and compares the model before and after on digits that neither training nor calibration saw.
"""

import math
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
from rich.console import Console
from rich.table import Table

from digits import INPUT_NAME, LABEL_NAME, accuracy, write_npz

ROOT = Path(__file__).resolve().parent.parent
# Relative to ROOT, so that the printed command can be copied into a shell there.
FOLDER = Path(".demo")
BEFORE = Path("models/digits_vit.onnx")
AFTER = FOLDER / "digits_vit_half.onnx"
COMMAND = (
    *("onnx-utilrank", "compress", str(BEFORE), "-o", str(AFTER)),
    *("--data", str(FOLDER / "calibration.npz"), "--param-ratio", "0.5"),
    *("--plan-out", str(FOLDER / "plan.json"), "--report", str(FOLDER / "report.json")),
)
FLOAT_TYPES = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}


def parameter_count(model_path: Path) -> int:
    """Count the numbers in a model's floating-point initializers; shapes and axes are integers."""
    initializers = onnx.load(model_path).graph.initializer
    return sum(math.prod(t.dims) for t in initializers if t.data_type in FLOAT_TYPES)


def comparison(test_path: Path) -> Table:
    """Measure both models.

    Args:
        test_path: The file of test digits that `digits.write_npz` writes.

    Returns:
        A table with a row for each quantity and a column for each model.
    """
    with np.load(test_path) as arrays:
        images, labels = arrays[INPUT_NAME], arrays[LABEL_NAME]
    paths = [ROOT / BEFORE, ROOT / AFTER]
    table = Table("", "before", "after", title=f"{BEFORE} and {AFTER}")
    table.add_row("parameters", *(f"{parameter_count(path):,}" for path in paths))
    table.add_row("file size, bytes", *(f"{path.stat().st_size:,}" for path in paths))
    shares = [accuracy(path, images, labels) for path in paths]
    table.add_row(f"accuracy, {len(labels)} unseen digits", *(f"{share:.2%}" for share in shares))
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def main() -> int:
    """Run the demo; the exit status is that of the command line tool."""
    _, test_path, _ = write_npz(ROOT / FOLDER)
    print("$", shlex.join(COMMAND), flush=True)
    # The environment that runs this need not be activated: its programs lie beside its interpreter.
    program = shutil.which(COMMAND[0], path=Path(sys.executable).parent)
    if program is None:
        print(f"{COMMAND[0]} is not installed beside {sys.executable}: run make demo")
        return 1
    status = subprocess.run([program, *COMMAND[1:]], cwd=ROOT, check=False).returncode
    if status == 0:
        Console().print(comparison(test_path))
    return status


if __name__ == "__main__":
    sys.exit(main())
