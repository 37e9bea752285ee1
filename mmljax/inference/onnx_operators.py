"""The ONNX form of each of JAX's primitives that the networks use in evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from jax.export import is_symbolic_dim

from mmljax.inference.onnx_graph import Convert, Graph, Value

_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def _elementwise(operator: str) -> Convert:
    def convert(graph: Graph, inputs: Sequence[Value], equation: Any) -> list[Value]:
        del equation
        return [graph.elementwise(operator, *inputs)]

    return convert


def _identity(graph: Graph, inputs: Sequence[Value], equation: Any) -> list[Value]:
    del graph, equation
    return list(inputs)


def _whole(graph: Graph, inputs: Sequence[Value], equation: Any) -> list[Value]:
    return [
        graph.whole(x, atom.aval.shape) for x, atom in zip(inputs, equation.invars, strict=True)
    ]


def _rsqrt(graph: Graph, inputs: Sequence[Value], equation: Any) -> list[Value]:
    del equation
    return [graph.elementwise("Reciprocal", graph.elementwise("Sqrt", inputs[0]))]


def _erfc(graph: Graph, inputs: Sequence[Value], equation: Any) -> list[Value]:
    del equation
    erf = graph.elementwise("Erf", inputs[0])
    return [graph.elementwise("Sub", graph.constant(np.float32(1)), erf)]


def _square(graph: Graph, inputs: Sequence[Value], equation: Any) -> list[Value]:
    del equation
    return [graph.elementwise("Mul", inputs[0], inputs[0])]


def _integer_pow(graph: Graph, inputs: Sequence[Value], equation: Any) -> list[Value]:
    exponent = equation.params["y"]
    if exponent not in (2, 3):
        return [graph.elementwise("Pow", inputs[0], graph.constant(np.float32(exponent)))]
    power = inputs[0]
    for _ in range(exponent - 1):
        power = graph.elementwise("Mul", power, inputs[0])
    return [power]


def _clamp(graph: Graph, inputs: Sequence[Value], equation: Any) -> list[Value]:
    del equation
    low, x, high = inputs
    return [graph.elementwise("Min", graph.elementwise("Max", x, low), high)]


def _select(graph: Graph, inputs: Sequence[Value], equation: Any) -> list[Value]:
    if len(inputs) != 3 or equation.invars[0].aval.dtype != bool:
        raise NotImplementedError("of more than two cases")
    condition, otherwise, then = inputs
    return [graph.elementwise("Where", condition, then, otherwise)]


def _cast(graph: Graph, inputs: Sequence[Value], equation: Any) -> list[Value]:
    new = np.dtype(equation.params["new_dtype"])
    if new == equation.invars[0].aval.dtype:
        return list(inputs)
    to = onnx.helper.np_dtype_to_tensor_dtype(new)
    return [graph.add("Cast", inputs[0], shape=inputs[0].shape, to=to)]


def _reshape(graph: Graph, inputs: Sequence[Value], equation: Any) -> list[Value]:
    (x,) = _whole(graph, inputs[:1], equation)
    return [graph.reshape(x, equation.outvars[0].aval.shape)]


def _broadcast_in_dim(graph: Graph, inputs: Sequence[Value], equation: Any) -> list[Value]:
    shape = [1] * len(equation.params["shape"])
    x = inputs[0]
    for axis, size in zip(equation.params["broadcast_dimensions"], x.shape, strict=True):
        shape[axis] = size
    return [graph.reshape(x, shape)]  # the other sizes: where an operator needs them


def _transpose(graph: Graph, inputs: Sequence[Value], equation: Any) -> list[Value]:
    (x,) = _whole(graph, inputs, equation)
    return [graph.transpose(x, equation.params["permutation"])]


def _concatenate(graph: Graph, inputs: Sequence[Value], equation: Any) -> list[Value]:
    parts = _whole(graph, inputs, equation)
    shape, axis = equation.outvars[0].aval.shape, equation.params["dimension"]
    return [graph.add("Concat", *parts, shape=shape, axis=axis)]


def _stack(graph: Graph, inputs: Sequence[Value], equation: Any) -> list[Value]:
    axis, shape = equation.params["axis"], equation.outvars[0].aval.shape
    one = [1 if i == axis else n for i, n in enumerate(shape)]
    parts = [graph.reshape(x, one) for x in _whole(graph, inputs, equation)]
    return [graph.add("Concat", *parts, shape=shape, axis=axis)]


def _cut(
    graph: Graph, x: Value, bounds: Sequence[tuple[int, Any, Any, int]], shape: Sequence[Any]
) -> Value:
    """Slice by ``(axis, start, stop, stride)``."""
    if not bounds:
        return x
    axes, starts, stops, strides = (np.array(part, np.int64) for part in zip(*bounds, strict=True))
    return graph.add("Slice", x, *map(graph.constant, (starts, stops, axes, strides)), shape=shape)


def _slice(graph: Graph, inputs: Sequence[Value], equation: Any) -> list[Value]:
    (x,) = _whole(graph, inputs, equation)
    start, stop = equation.params["start_indices"], equation.params["limit_indices"]
    strides = equation.params["strides"] or (1,) * len(start)
    parts = zip(range(len(start)), start, stop, strides, x.shape, strict=True)
    bounds = [(i, a, b, s) for i, a, b, s, size in parts if (a, b, s) != (0, size, 1)]
    if any(is_symbolic_dim(n) for bound in bounds for n in bound):
        raise NotImplementedError("of the batch")
    return [_cut(graph, x, bounds, equation.outvars[0].aval.shape)]


def _split(graph: Graph, inputs: Sequence[Value], equation: Any) -> list[Value]:
    (x,) = _whole(graph, inputs, equation)
    axis, stops = equation.params["axis"], np.cumsum(equation.params["sizes"])
    return [
        _cut(graph, x, [(axis, int(stop) - out.aval.shape[axis], int(stop), 1)], out.aval.shape)
        for stop, out in zip(stops, equation.outvars, strict=True)
    ]


def _gather(graph: Graph, inputs: Sequence[Value], equation: Any) -> list[Value]:
    """Constant places: one slice, as in ``x[:, 1:]``, or places of one axis, as ``x[..., ::2]``."""
    x = graph.whole(inputs[0], equation.invars[0].aval.shape)
    places, output = inputs[1].constant, equation.outvars[0].aval.shape
    numbers, sizes = (equation.params[name] for name in ("dimension_numbers", "slice_sizes"))
    axes = numbers.start_index_map
    if places is None or numbers.operand_batching_dims:
        raise NotImplementedError("but for constant places")
    ends = np.array([x.shape[axis] - sizes[axis] for axis in axes])
    if not ((places >= 0) & (places <= ends)).all():
        raise NotImplementedError("with places beyond the end")
    rest = tuple(1 if i in axes else n for i, n in enumerate(x.shape))
    if places.ndim == 1:
        if any(sizes[i] != n for i, n in enumerate(x.shape) if i not in axes):
            raise NotImplementedError("of a part of an axis without a place")
        found = zip(axes, map(int, places), strict=True)
        bounds = [(i, first, first + sizes[i], 1) for i, first in found]
        return [graph.reshape(_cut(graph, x, bounds, sizes), output)]
    axis = axes[0]
    if len(axes) > 1 or numbers.collapsed_slice_dims != axes or tuple(sizes) != rest:
        raise NotImplementedError("but for places along one axis")
    places = places[..., 0].astype(np.int64)
    shape = (*x.shape[:axis], *places.shape, *x.shape[axis + 1 :])
    y = graph.add("Gather", x, graph.constant(places), shape=shape, axis=axis)
    of_places = list(range(axis, axis + places.ndim))
    others = [i for i in range(len(shape)) if i not in of_places]
    order = [(others if i in numbers.offset_dims else of_places).pop(0) for i in range(len(output))]
    return [graph.transpose(y, order)]


def _pad(graph: Graph, inputs: Sequence[Value], equation: Any) -> list[Value]:
    x, fill = _whole(graph, inputs, equation)
    config = equation.params["padding_config"]
    if any(low < 0 or high < 0 or interior for low, high, interior in config):
        raise NotImplementedError("with negative or interior padding")
    pads = np.array([[low, high] for low, high, _ in config], np.int64).T.reshape(-1)
    shape = equation.outvars[0].aval.shape
    return [graph.add("Pad", x, graph.constant(pads), fill, shape=shape)]


def _reduce(operator: str) -> Convert:
    def convert(graph: Graph, inputs: Sequence[Value], equation: Any) -> list[Value]:
        (x,) = _whole(graph, inputs, equation)
        axes = graph.constant(np.array(equation.params["axes"], np.int64))
        return [graph.add(operator, x, axes, shape=equation.outvars[0].aval.shape, keepdims=0)]

    return convert


def _dot_general(graph: Graph, inputs: Sequence[Value], equation: Any) -> list[Value]:
    """``MatMul`` of any array with a matrix, ``Einsum`` otherwise."""
    left, right = _whole(graph, inputs, equation)
    (of_left, of_right), (batch_left, batch_right) = equation.params["dimension_numbers"]
    shape = equation.outvars[0].aval.shape
    rank = len(left.shape)
    if not batch_left and of_left == (rank - 1,) and len(right.shape) == 2 and len(of_right) == 1:
        matrix = right if of_right == (0,) else graph.transpose(right, (1, 0))
        return [graph.add("MatMul", left, matrix, shape=shape)]
    first, free = _LETTERS[:rank], iter(_LETTERS[rank:])
    shared = dict(zip((*of_right, *batch_right), (*of_left, *batch_left), strict=True))
    second = "".join(
        first[shared[i]] if i in shared else next(free) for i in range(len(right.shape))
    )
    batch = [first[i] for i in batch_left]
    kept = [first[i] for i in range(rank) if i not in (*of_left, *batch_left)]
    kept += [second[i] for i in range(len(second)) if i not in shared]
    rule = f"{first},{second}->{''.join(batch + kept)}"
    return [graph.add("Einsum", left, right, shape=shape, equation=rule)]


def _images_first(order: Sequence[int]) -> list[int]:
    """The inverse of a permutation."""
    return [int(i) for i in np.argsort(order)]


def _conv(graph: Graph, inputs: Sequence[Value], equation: Any) -> list[Value]:
    x, kernel = _whole(graph, inputs, equation)
    parameters = equation.params
    if any(n != 1 for n in parameters["lhs_dilation"]) or parameters["batch_group_count"] != 1:
        raise NotImplementedError("of dilated images or groups of the batch")
    specs = parameters["dimension_numbers"]
    output = equation.outvars[0].aval.shape
    y = graph.add(
        "Conv",
        graph.transpose(x, specs.lhs_spec),
        graph.transpose(kernel, specs.rhs_spec),
        shape=[output[axis] for axis in specs.out_spec],
        strides=list(parameters["window_strides"]),
        dilations=list(parameters["rhs_dilation"]),
        group=parameters["feature_group_count"],
        pads=[int(n) for n in np.array(parameters["padding"]).T.reshape(-1)],
    )
    return [graph.transpose(y, _images_first(specs.out_spec))]


def _max_pool(graph: Graph, inputs: Sequence[Value], equation: Any) -> list[Value]:
    """Windows over the second and third of four axes; padding never wins, as in JAX."""
    (x,) = _whole(graph, inputs, equation)
    parameters = equation.params
    names = ("window_dimensions", "window_strides", "base_dilation", "window_dilation")
    sizes, strides, *dilations = (parameters[name] for name in names)
    padding = parameters["padding"]
    outer = [(sizes[i], strides[i], *padding[i]) for i in (0, -1)]
    if len(sizes) != 4 or outer != [(1, 1, 0, 0)] * 2 or any(n != 1 for d in dilations for n in d):
        raise NotImplementedError("but for plain windows over height and width")
    to_channels_first = (0, 3, 1, 2)
    output = equation.outvars[0].aval.shape
    y = graph.add(
        "MaxPool",
        graph.transpose(x, to_channels_first),
        shape=[output[axis] for axis in to_channels_first],
        kernel_shape=list(sizes[1:3]),
        strides=list(strides[1:3]),
        pads=[int(n) for n in np.array(padding[1:3]).T.reshape(-1)],
    )
    return [graph.transpose(y, _images_first(to_channels_first))]


_ELEMENTWISE = {
    **{"add": "Add", "add_any": "Add", "sub": "Sub", "mul": "Mul", "div": "Div", "pow": "Pow"},
    **{"max": "Max", "min": "Min", "neg": "Neg", "abs": "Abs", "sqrt": "Sqrt", "exp": "Exp"},
    **{"log": "Log", "tanh": "Tanh", "erf": "Erf", "logistic": "Sigmoid", "and": "And"},
    **{"eq": "Equal", "lt": "Less", "le": "LessOrEqual", "gt": "Greater", "ge": "GreaterOrEqual"},
}

OPERATORS: Mapping[str, Convert] = {
    **{name: _elementwise(operator) for name, operator in _ELEMENTWISE.items()},
    **dict.fromkeys(("copy", "stop_gradient", "optimization_barrier"), _identity),
    **dict.fromkeys(("reshape", "squeeze", "expand_dims"), _reshape),
    "rsqrt": _rsqrt,
    "erfc": _erfc,
    "square": _square,
    "integer_pow": _integer_pow,
    "clamp": _clamp,
    "select_n": _select,
    "convert_element_type": _cast,
    "broadcast_in_dim": _broadcast_in_dim,
    "transpose": _transpose,
    "concatenate": _concatenate,
    "stack": _stack,
    "slice": _slice,
    "split": _split,
    "gather": _gather,
    "pad": _pad,
    "reduce_sum": _reduce("ReduceSum"),
    "reduce_max": _reduce("ReduceMax"),
    "reduce_min": _reduce("ReduceMin"),
    "dot_general": _dot_general,
    "conv_general_dilated": _conv,
    "reduce_window_max": _max_pool,
}
"""By the primitive's name."""
