"""Convert a network in evaluation mode to an ONNX graph.

The network is traced by JAX with a symbolic batch size. What depends on weights alone is computed
here and becomes a constant. Every other primitive becomes one or a few ONNX operators
(``onnx_operators``), where JAX's calls are inlined and a choice by platform takes its default form:
``lax.conv_general_dilated`` and ``lax.reduce_window``, which are ONNX's ``Conv`` and ``MaxPool``.

jax2onnx 0.17 is not used: it refuses choices by platform, writes a max pooling that onnxruntime
1.32 refuses, and needs an environment of its own, as it pins an older orbax.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import onnx
from jax import export
from jax.export import is_symbolic_dim
from jax.extend.core import ClosedJaxpr, Literal
from jaxtyping import Array, Float, UInt8

from mmljax.errors import UserError

OPSET, IR_VERSION = 18, 8  # of ONNX 1.13, which onnxruntime reads since 1.14
LARGEST = 2**31 - 1  # bytes of a file, by protobuf

_INLINED = {"jit": "jaxpr", "custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr"}


class Value(NamedTuple):
    """A result in the graph.

    Its shape can have 1 where JAX's has more: broadcasting is left to the operators that do it
    themselves.
    """

    name: str
    shape: tuple[Any, ...]
    constant: np.ndarray | None = None


class Unsupported(NamedTuple):
    """A result that the graph cannot have; an error only if the embeddings depend on it."""

    reason: str


class Graph:
    """Nodes and constants of an ONNX graph whose first input has the batch size."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, np.ndarray] = {}
        self._transposed: dict[str, tuple[Value, tuple[int, ...]]] = {}  # by the result's name
        self._names = 0
        self._batch: Value | None = None

    def constant(self, values: Any) -> Value:
        """Return an array as a value; it becomes part of the file if a node reads it."""
        array = np.asarray(values)
        name = self._name("c")
        self.constants[name] = array
        return Value(name, array.shape, array)

    def add(self, operator: str, *inputs: Value, shape: Sequence[Any], **attributes: Any) -> Value:
        """Add a node with one output."""
        name = self._name("v")
        names = [value.name for value in inputs]
        self.nodes.append(onnx.helper.make_node(operator, names, [name], **attributes))
        return Value(name, tuple(shape))

    def elementwise(self, operator: str, *inputs: Value) -> Value:
        """Add an operator that broadcasts its inputs."""
        return self.add(operator, *inputs, shape=_broadcast([value.shape for value in inputs]))

    def reshape(self, value: Value, shape: Sequence[Any]) -> Value:
        """Reshape; the batch size, or a multiple of it, can be in one dimension of the result."""
        if value.constant is not None:
            return self.constant(value.constant.reshape(shape))
        if value.shape == tuple(shape):
            return value
        target = np.array([-1 if is_symbolic_dim(n) else n for n in shape], np.int64)
        return self.add("Reshape", value, self.constant(target), shape=shape)

    def transpose(self, value: Value, order: Sequence[int]) -> Value:
        """Permute the axes; a permutation of a permutation becomes one."""
        if value.constant is not None:
            return self.constant(value.constant.transpose(order))
        if value.name in self._transposed:
            value, before = self._transposed[value.name]
            order = [before[axis] for axis in order]
        if list(order) == sorted(order):
            return value
        shape = [value.shape[axis] for axis in order]
        result = self.add("Transpose", value, shape=shape, perm=list(order))
        self._transposed[result.name] = value, tuple(order)
        return result

    def whole(self, value: Value, shape: Sequence[Any]) -> Value:
        """Return the value in JAX's shape, for operators that do not broadcast."""
        shape = tuple(shape)
        if value.shape == shape:
            return value
        if value.constant is not None and not any(map(is_symbolic_dim, shape)):
            return self.constant(np.broadcast_to(value.constant, shape))
        given = (1,) * (len(shape) - len(value.shape)) + value.shape
        parts = [
            self._batch_size() if is_symbolic_dim(new) and old == 1 else self.constant([_one(new)])
            for old, new in zip(given, shape, strict=True)
        ]
        target = self.add("Concat", *map(self._as_int64, parts), shape=(len(parts),), axis=0)
        return self.add("Expand", value, target, shape=shape)

    def used(self, output: str) -> tuple[list[onnx.NodeProto], dict[str, np.ndarray]]:
        """Return the nodes and constants on which an output depends."""
        needed, nodes = {output}, []
        for node in reversed(self.nodes):
            if needed.intersection(node.output):
                needed.update(node.input)
                nodes.append(node)
        constants = {name: x for name, x in self.constants.items() if name in needed}
        return nodes[::-1], constants

    def _as_int64(self, value: Value) -> Value:
        return (
            self.constant(value.constant.astype(np.int64)) if value.constant is not None else value
        )

    def _batch_size(self) -> Value:
        if self._batch is None:
            shape = self.add("Shape", Value("images", ()), shape=(4,), start=0, end=1)
            self._batch = shape._replace(shape=(1,))
        return self._batch

    def _name(self, prefix: str) -> str:
        self._names += 1
        return f"{prefix}{self._names}"


def _one(size: Any) -> int:
    return 1 if is_symbolic_dim(size) else size  # Expand keeps a dimension where it is told 1


def _broadcast(shapes: Sequence[tuple[Any, ...]]) -> tuple[Any, ...]:
    rank = max(map(len, shapes))
    padded = [(1,) * (rank - len(shape)) + shape for shape in shapes]
    sizes = zip(*padded, strict=True)
    return tuple(next((n for n in column if is_symbolic_dim(n) or n != 1), 1) for column in sizes)


Convert = Callable[[Graph, Sequence[Value], Any], Sequence[Value]]
"""From a graph, inputs and JAX's equation to the outputs."""


def to_onnx(
    embed: Callable[[UInt8[Array, "b s s ch"]], Float[Array, "b d"]],
    *,
    size: int,
    channels: int,
    operators: Mapping[str, Convert],
    metadata: Mapping[str, str],
) -> bytes:
    """Return an ONNX file: input ``images``, uint8 ``[b s s ch]``, output ``embeddings``.

    Args:
      embed: the network with its weights, in float32.
      size: height and width of the images.
      channels: of the images.
      operators: a conversion for each primitive.
      metadata: written into the file.

    Raises:
      UserError: if a primitive has no conversion, or the file would be larger than 2 GiB.
    """
    (batch,) = export.symbolic_shape("b")
    shape = (batch, size, size, channels)
    traced = jax.make_jaxpr(embed)(jax.ShapeDtypeStruct(shape, np.uint8))
    graph = Graph()
    (output,) = _convert(graph, traced, [Value("images", shape)], operators)
    if isinstance(output, Unsupported):
        raise UserError(f"--format=onnx cannot write this network: {output.reason}")
    embeddings = graph.whole(output, traced.out_avals[0].shape)
    model = _model(graph, embeddings, size=size, channels=channels)
    onnx.helper.set_model_props(model, dict(metadata))
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString(deterministic=True)


def _model(graph: Graph, embeddings: Value, *, size: int, channels: int) -> onnx.ModelProto:
    nodes, constants = graph.used(embeddings.name)
    nodes.append(onnx.helper.make_node("Identity", [embeddings.name], ["embeddings"]))
    if sum(x.nbytes for x in constants.values()) > LARGEST - 2**24:
        raise UserError(
            "--format=onnx: the weights are over 2 GiB, the most that one file can hold"
        )
    info = onnx.helper.make_tensor_value_info
    float32, uint8 = onnx.TensorProto.FLOAT, onnx.TensorProto.UINT8
    return onnx.helper.make_model(
        onnx.helper.make_graph(
            nodes,
            "embedder",
            [info("images", uint8, ["batch", size, size, channels])],
            [info("embeddings", float32, ["batch", embeddings.shape[1]])],
            [onnx.numpy_helper.from_array(x, name) for name, x in constants.items()],
        ),
        opset_imports=[onnx.helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="mmljax",
    )


def _convert(
    graph: Graph, closed: ClosedJaxpr, inputs: Sequence[Any], operators: Mapping[str, Convert]
) -> list[Any]:
    jaxpr = closed.jaxpr
    values: dict[Any, Any] = dict(zip(jaxpr.invars, inputs, strict=True))
    values.update(zip(jaxpr.constvars, map(graph.constant, closed.consts), strict=True))

    def read(atom: Any) -> Any:
        return graph.constant(atom.val) if isinstance(atom, Literal) else values[atom]

    for equation in jaxpr.eqns:
        outputs = _apply(graph, equation, [read(x) for x in equation.invars], operators)
        values.update(zip(equation.outvars, outputs, strict=True))
    return [read(x) for x in jaxpr.outvars]


def _apply(
    graph: Graph, equation: Any, inputs: list[Any], operators: Mapping[str, Convert]
) -> Sequence[Any]:
    name, parameters = equation.primitive.name, equation.params
    if name in _INLINED:
        return _convert(graph, parameters[_INLINED[name]], inputs, operators)
    if name == "platform_index":
        return [graph.constant(np.int32(parameters["platforms"].index(None)))]
    first = inputs[0] if inputs else None
    chosen = first.constant if isinstance(first, Value) else None
    if name == "cond" and chosen is not None:
        return _convert(graph, parameters["branches"][int(chosen)], inputs[1:], operators)
    if name == "select_n" and chosen is not None and chosen.ndim == 0:
        return [inputs[1 + int(chosen)]]
    failed = [x for x in inputs if isinstance(x, Unsupported)]
    if failed:
        return failed[:1] * len(equation.outvars)
    shapes = [x.aval.shape for x in equation.outvars]
    static = not any(is_symbolic_dim(n) for shape in shapes for n in shape)
    computed = inputs or name == "iota"
    if computed and static and all(x.constant is not None for x in inputs):
        arrays = [
            np.broadcast_to(x.constant, atom.aval.shape)
            for x, atom in zip(inputs, equation.invars, strict=True)
        ]
        found = equation.primitive.bind(*arrays, **parameters)
        found = found if equation.primitive.multiple_results else [found]
        return [graph.constant(x) for x in found]
    try:
        return operators[name](graph, inputs, equation)
    except (KeyError, NotImplementedError) as error:
        why = f" ({error})" if isinstance(error, NotImplementedError) else ""
        reason = f"its operation {name} has no ONNX form here{why}; use --format=jax"
        return [Unsupported(reason)] * len(equation.outvars)
