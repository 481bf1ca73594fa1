"""Recurrent layers, one time step after the other."""

from collections.abc import Callable

import torch

from onnx_utilrank.torch_graph.elementwise import activation
from onnx_utilrank.torch_graph.operator import Context, Operator, Result, Table

__all__ = ["RECURRENT"]

Tensor = torch.Tensor
Function = Callable[[Tensor], Tensor]

# One time step: the input's share of the gates [batch, gates x hidden] and the states before
# [batch, hidden] give the states after, the layer's output first.
Cell = Callable[[Tensor, list[Tensor]], list[Tensor]]

_WITH_ALPHA = {
    "affine", "elu", "hardsigmoid", "leakyrelu", "scaledtanh", "thresholdedrelu",
}  # fmt: skip
_WITH_BETA = {"affine", "hardsigmoid", "scaledtanh"}


def _functions(context: Context, default: list[str], directions: int) -> list[Function]:
    """The activation functions of all directions; each takes the scales it has from the lists."""
    names = context.texts("activations") or default * directions
    alphas = iter(context.numbers("activation_alpha") or [])
    betas = iter(context.numbers("activation_beta") or [])
    return [
        activation(
            name,
            next(alphas, None) if name.lower() in _WITH_ALPHA else None,
            next(betas, None) if name.lower() in _WITH_BETA else None,
        )
        for name in names
    ]


def _limiter(context: Context) -> Function:
    if not context.has("clip"):
        return lambda x: x
    limit = context.number("clip", 0.0)
    return lambda x: x.clamp(-limit, limit)


def _layer(
    context: Context,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lengths: Tensor | None,
    initial: list[Tensor | None],
    cell_of: Callable[[int, Tensor], Cell],
    folded: int,
) -> list[Tensor]:
    """All directions of a layer.

    Args:
        context: The node's context.
        x: Input [time, batch, features], or batch first where the layout says so.
        weight: Of the input [directions, gates x hidden, features].
        bias: Both biases [directions, 2 x gates x hidden].
        lengths: Steps of each sample [batch].
        initial: For each state its values before the first step.
        cell_of: Makes the time step of a direction, given that direction's recurrent bias.
        folded: How many columns of the recurrent bias may be added to the input's right away.

    Returns:
        The outputs of all steps, then the last value of each state.
    """
    batch_first = context.flag("layout")
    x = x.transpose(0, 1) if batch_first else x
    directions, width = weight.shape[:2]
    hidden = context.integer("hidden_size")
    ends: list[list[Tensor]] = [[] for _ in initial]
    outputs = []
    for d in range(directions):
        backward = d == 1 or context.text("direction", "forward") == "reverse"
        given = _reversed(x, lengths) if backward else x
        both = x.new_zeros(2, width) if bias is None else bias[d].reshape(2, width)
        shares = _product(given, weight[d], d * width) + both[0]
        shares = torch.cat([shares[..., :folded] + both[1, :folded], shares[..., folded:]], -1)
        step = cell_of(d, both[1])
        states = [
            x.new_zeros(x.shape[1], hidden) if s is None else (s[:, d] if batch_first else s[d])
            for s in initial
        ]
        made = []
        for t in range(x.shape[0]):
            after = step(shares[t], states)
            out = after[0]
            if lengths is not None:
                alive = (t < lengths).reshape(-1, 1)
                after = [
                    torch.where(alive, new, old) for new, old in zip(after, states, strict=True)
                ]
                out = torch.where(alive, out, torch.zeros_like(out))
            states = after
            made.append(out)
        y = torch.stack(made)
        outputs.append(_reversed(y, lengths) if backward else y)
        for end, state in zip(ends, states, strict=True):
            end.append(state)
    y = torch.stack(outputs, 1)  # [time, directions, batch, hidden]
    y = y.permute(2, 0, 1, 3) if batch_first else y
    return [y, *(torch.stack(end, 1 if batch_first else 0) for end in ends)]


def _product(x: Tensor, weight: Tensor, start: int) -> Tensor:
    """x Wᵀ. In plain form W is large and chooses columns of x, from `start` on: those are taken."""
    width = len(weight)
    own = weight[:, start : start + width].diagonal()
    chooses = len(own) == width and bool((own == 1).all()) and weight.count_nonzero() == width
    if chooses and not weight.requires_grad:
        return x[..., start : start + width]
    return x @ weight.mT


def _reversed(x: Tensor, lengths: Tensor | None) -> Tensor:
    """Turn time around, for each sample within its own length."""
    if lengths is None:
        return x.flip(0)
    steps = torch.arange(x.shape[0], device=x.device).reshape(-1, 1)
    at = torch.where(steps < lengths, lengths - 1 - steps, steps)
    return x[at, torch.arange(x.shape[1], device=x.device)]


def _rnn(
    context: Context,
    x: Tensor,
    weight: Tensor,
    recurrence: Tensor,
    bias: Tensor | None = None,
    lengths: Tensor | None = None,
    initial: Tensor | None = None,
) -> Result:
    functions, clip = _functions(context, ["Tanh"], len(weight)), _limiter(context)

    def cell_of(d: int, _: Tensor) -> Cell:
        def step(share: Tensor, states: list[Tensor]) -> list[Tensor]:
            return [functions[d](clip(share + states[0] @ recurrence[d].mT))]

        return step

    return _layer(context, x, weight, bias, lengths, [initial], cell_of, weight.shape[1])


def _gru(
    context: Context,
    x: Tensor,
    weight: Tensor,
    recurrence: Tensor,
    bias: Tensor | None = None,
    lengths: Tensor | None = None,
    initial: Tensor | None = None,
) -> Result:
    functions = _functions(context, ["Sigmoid", "Tanh"], len(weight))
    hidden, clip = recurrence.shape[-1], _limiter(context)
    linear_first = context.flag("linear_before_reset")

    def cell_of(d: int, bias_of_direction: Tensor) -> Cell:
        gate, candidate = functions[2 * d : 2 * d + 2]
        gates, inner = torch.split_with_sizes(recurrence[d].mT, [2 * hidden, hidden], 1)
        inner_bias = bias_of_direction[2 * hidden :]

        def step(share: Tensor, states: list[Tensor]) -> list[Tensor]:
            (h,) = states
            both = gate(clip(share[:, : 2 * hidden] + h @ gates))
            update, reset = both.chunk(2, 1)
            if linear_first:
                past = reset * (h @ inner + inner_bias)
            else:
                past = (reset * h) @ inner + inner_bias
            new = candidate(clip(share[:, 2 * hidden :] + past))
            return [(1 - update) * new + update * h]

        return step

    return _layer(context, x, weight, bias, lengths, [initial], cell_of, 2 * hidden)


def _lstm(
    context: Context,
    x: Tensor,
    weight: Tensor,
    recurrence: Tensor,
    bias: Tensor | None = None,
    lengths: Tensor | None = None,
    initial: Tensor | None = None,
    initial_cell: Tensor | None = None,
    peepholes: Tensor | None = None,
) -> Result:
    functions = _functions(context, ["Sigmoid", "Tanh", "Tanh"], len(weight))
    hidden, clip = recurrence.shape[-1], _limiter(context)
    coupled = context.flag("input_forget")

    def cell_of(d: int, _: Tensor) -> Cell:
        gate, candidate, output = functions[3 * d : 3 * d + 3]
        turned = recurrence[d].mT
        peeks = x.new_zeros(3 * hidden) if peepholes is None else peepholes[d]
        peek_in, peek_out, peek_forget = peeks.chunk(3)

        def step(share: Tensor, states: list[Tensor]) -> list[Tensor]:
            h, c = states
            enter, leave, forget, new = (share + h @ turned).chunk(4, 1)
            i = gate(clip(enter + peek_in * c))
            f = 1 - i if coupled else gate(clip(forget + peek_forget * c))
            c = f * c + i * candidate(clip(new))
            return [gate(clip(leave + peek_out * c)) * output(c), c]

        return step

    states = [initial, initial_cell]
    return _layer(context, x, weight, bias, lengths, states, cell_of, 4 * hidden)


RECURRENT: Table = {
    "GRU": Operator(_gru),
    "LSTM": Operator(_lstm),
    "RNN": Operator(_rnn),
}
