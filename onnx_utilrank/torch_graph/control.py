"""Operators that hold subgraphs."""

import torch

from onnx_utilrank.torch_graph.operator import Context, Operator, Result, Table

__all__ = ["CONTROL"]

Tensor = torch.Tensor

# Every input stays where it is: the nodes of the subgraphs bring together what they need.
_ALL = range(2**31)


def _if(context: Context, condition: Tensor) -> Result:
    return context.bodies["then_branch" if bool(condition) else "else_branch"].run([])


def _loop(
    context: Context, trips: Tensor | None, condition: Tensor | None, *carried: Tensor
) -> Result:
    limit = None if trips is None else int(trips)
    goes_on = condition is None or bool(condition)
    state = list(carried)
    scans: list[list[Tensor]] = [[] for _ in range(len(context.outputs) - len(carried))]
    body, k = context.bodies["body"], 0
    while goes_on and (limit is None or k < limit):
        again, *made = body.run([torch.tensor(k), torch.tensor(goes_on), *state])
        state, rows = made[: len(state)], made[len(state) :]
        for scan, row in zip(scans, rows, strict=True):
            scan.append(row)
        goes_on, k = bool(again), k + 1
    if k == 0:
        return [*state, *(body.empty(1 + n) for n in range(len(state), len(state) + len(scans)))]
    return [*state, *(torch.stack(scan) for scan in scans)]


def _scan(context: Context, *tensors: Tensor) -> Result:
    if context.opset < 9:
        raise ValueError("Scan of opset 8 has another form")
    given = context.integer("num_scan_inputs")
    state, inputs = list(tensors[: len(tensors) - given]), tensors[len(tensors) - given :]
    made = len(context.outputs) - len(state)
    axes_in = context.integers("scan_input_axes") or [0] * given
    back_in = context.integers("scan_input_directions") or [0] * given
    axes_out = context.integers("scan_output_axes") or [0] * made
    back_out = context.integers("scan_output_directions") or [0] * made
    turned = [x.flip(a) if back else x for x, a, back in zip(inputs, axes_in, back_in, strict=True)]
    rows = [x.unbind(a) for x, a in zip(turned, axes_in, strict=True)]
    scans: list[list[Tensor]] = [[] for _ in range(made)]
    for row in zip(*rows, strict=True):
        out = context.bodies["body"].run([*state, *row])
        state = out[: len(state)]
        for scan, value in zip(scans, out[len(state) :], strict=True):
            scan.append(value)
    if any(not scan for scan in scans):
        raise ValueError("a scan of no steps gives no outputs of a known shape")
    stacked = (
        torch.stack(scan[::-1] if back else scan, axis)
        for scan, axis, back in zip(scans, axes_out, back_out, strict=True)
    )
    return [*state, *stacked]


CONTROL: Table = {
    "If": Operator(_if, _ALL),
    "Loop": Operator(_loop, _ALL),
    "Scan": Operator(_scan, _ALL),
}
