"""What a compiled program's text says: collectives, buffers, arguments."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_ITEM = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
_ITEM |= {"s64": 8, "u64": 8, "f64": 8}
_SHAPE = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\](\{[^}]*\})?")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-<>]+) .*\{$")
_LINE = re.compile(r"^\s+(?:ROOT )?%?([\w.\-<>]+) = (.*)$")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition)=%?([\w.\-<>]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CHAIN = re.compile(r'chain_id="(\d+)"')
_NAMES = re.compile(r"%?([\w.\-<>]+)\s*$")
_NO_BUFFERS = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while")


class Instruction(NamedTuple):
    """One line of a program."""

    name: str
    computation: str
    entry: bool  # whether the computation is the program's entry
    result: str  # type
    kind: str  # opcode
    operands: tuple[str, ...]  # names
    operand_types: str  # as far as the line states them
    attributes: str


class Traffic(NamedTuple):
    """Of one kind of collective in a program."""

    number: int
    bytes: int  # of the larger end, summed over its uses
    asynchronous: int = 0  # of these bytes: started and ended by two instructions


class Buffer(NamedTuple):
    """Results of one shape and origin that lie in a device's main memory."""

    bytes: int  # of one
    number: int
    shape: str
    kind: str  # opcode
    origin: str  # the operation that it was compiled from


class Memory(NamedTuple):
    """Bytes of a program on one device, as its compiler states them."""

    arguments: int
    outputs: int
    aliased: int  # outputs in the place of arguments
    work: int
    code: int

    @property
    def total(self) -> int:
        """All at once."""
        return self.arguments + self.outputs - self.aliased + self.work + self.code


def read_memory(program: Any) -> Memory:
    """The memory of a compiled program."""
    found = program.memory_analysis()
    return Memory(
        found.argument_size_in_bytes,
        found.output_size_in_bytes,
        found.alias_size_in_bytes,
        found.temp_size_in_bytes,
        found.generated_code_size_in_bytes,
    )


def instructions(program: str) -> Iterator[Instruction]:
    """The lines of a program's text, in order."""
    computation, entry = "", False
    for line in program.split("\n"):
        if head := _HEAD.match(line):
            entry, computation = head[1] is not None, head[2]
        elif found := _LINE.match(line):
            result, rest = _split_type(found[2])
            kind, _, rest = rest.partition("(")
            operands, attributes = _split_operands(rest)
            parts = re.split(r",(?![^\[{]*[\]}])", operands)
            names = tuple(name[1] for part in parts if (name := _NAMES.search(part)))
            yield Instruction(
                found[1], computation, entry, result, kind.strip(), names, operands, attributes
            )


def _split_type(text: str) -> tuple[str, str]:
    """A type, which may be a tuple, and what follows it."""
    if not text.startswith("("):
        result, _, rest = text.partition(" ")
        return result, rest
    end = _closing(text, 0)
    return text[:end], text[end:]


def _split_operands(text: str) -> tuple[str, str]:
    end = _closing(text, 1)
    return text[: end - 1], text[end:]


def _closing(text: str, depth: int) -> int:
    """The place after the parenthesis that closes the first, or the ``depth`` that are open."""
    for place in re.finditer(r"[()]", text):
        depth += 1 if place[0] == "(" else -1
        if not depth:
            return place.end()
    return len(text)


def collectives(program: str) -> dict[str, Traffic]:
    """What a compiled program exchanges, by kind of collective.

    A collective in a loop counts as often as the loop runs, where the program states that. One
    that the compiler starts, spreads over other work and ends ("async collective fusion" of TPUs,
    or a pair of start and done) counts once, and as asynchronous.
    """
    lines = list(instructions(program))
    types = {(line.computation, line.name): line.result for line in lines}
    times = _times(lines)
    wrapped = {
        called
        for line in lines
        if line.kind == "async-start"
        for called in _CALLED.findall(line.attributes)
    }
    found: dict[str, Traffic] = {}
    chains: set[tuple[str, str]] = set()
    for line in lines:
        kind = line.kind.removesuffix("-start")
        if kind not in KINDS:
            continue
        chain = _CHAIN.search(line.attributes)
        if chain and (kind, chain[1]) in chains:
            continue
        if chain:
            chains.add((kind, chain[1]))
        size = _exchanged(line, types) * times.get(line.computation, 1)
        split = chain or kind != line.kind or line.computation in wrapped
        before = found.get(kind, Traffic(0, 0))
        found[kind] = Traffic(
            before.number + times.get(line.computation, 1),
            before.bytes + size,
            before.asynchronous + (size if split else 0),
        )
    return found


def _exchanged(line: Instruction, types: Mapping[tuple[str, str], str]) -> int:
    """Bytes of the larger end of a collective."""
    given = type_bytes(line.operand_types) or sum(
        type_bytes(types.get((line.computation, name), "")) for name in line.operands
    )
    made = type_bytes(line.result)
    if line.kind == "collective-permute-start":  # the result has both ends, of one size, and more
        return given
    return max(given, made - given if line.kind == "all-gather-start" else made)


def _times(lines: list[Instruction]) -> dict[str, int]:
    """How often each computation runs, where loops state their length."""
    calls: dict[str, list[tuple[str, int]]] = {}
    for line in lines:
        trips = _TRIPS.search(line.attributes)
        for called in _CALLED.findall(line.attributes):
            calls.setdefault(called, []).append(
                (line.computation, int(trips[1]) if trips and line.kind == "while" else 1)
            )
    times = {line.computation: 1 for line in lines if line.entry}

    def count(name: str) -> int:
        if name not in times:
            callers = calls.get(name, [])
            times[name] = sum(count(caller) * trips for caller, trips in callers) or 1
        return times[name]

    for line in lines:
        count(line.computation)
    return times


def type_bytes(text: str) -> int:
    """Bytes of all arrays of a type, without the padding of tiles."""
    return sum(
        _ITEM[kind] * math.prod(int(n) for n in dims.split(",") if n)
        for kind, dims, _ in _SHAPE.findall(text)
        if kind in _ITEM
    )


def argument_bytes(program: str) -> int:
    """Bytes of a program's arguments on one device, without the padding of tiles."""
    return sum(
        type_bytes(line.result)
        for line in instructions(program)
        if line.entry and line.kind == "parameter"
    )


def largest_buffers(program: str, *, count: int) -> list[Buffer]:
    """The largest results of the entry computation in main memory, largest first.

    Copies between main and fast memory ("copy-start", "slice-start" of TPUs) are left out, and so
    is what the fusions of an asynchronous collective hand on. Not all are alive at once.
    """
    found: Counter[tuple[int, str, str, str]] = Counter()
    types: dict[str, str] = {}
    lines = list(instructions(program))
    chains = [line for line in lines if _CHAIN.search(line.attributes)]
    handed_on = {shape[:2] for line in chains for shape in _SHAPE.findall(line.result)}
    spread = {line.computation for line in chains}
    for line in lines:
        if not line.entry:
            continue
        types[line.name] = line.result
        if line.kind in _NO_BUFFERS or line.kind.endswith(("-start", "-done")):
            continue
        made = Counter(_SHAPE.findall(line.result))
        if spread.intersection(_CALLED.findall(line.attributes)):
            given = {shape for x in line.operands for shape in _SHAPE.findall(types.get(x, ""))}
            made = Counter(
                {x: n for x, n in made.items() if x[:2] not in handed_on or x not in given}
            )
        origin = re.search(r'op_name="([^"]*)"', line.attributes)
        for (kind, dims, layout), number in made.items():
            size = type_bytes(f"{kind}[{dims}]")
            if size and "S(" not in layout:
                key = (size, f"{kind}[{dims}]", line.kind, origin[1] if origin else "")
                found[key] += number
    largest = sorted(found.items(), key=lambda item: (-item[0][0], item[0][1:]))[:count]
    return [Buffer(key[0], number, *key[1:]) for key, number in largest]


def sent_bytes(kind: str, size: int, *, devices: int) -> float:
    """Bytes that a device must at least send for a collective whose larger end has ``size``.

    A gather or a scatter moves all but a device's own part; an all-reduce is a scatter and a
    gather (Patarasuk and Yuan 2009, Journal of Parallel and Distributed Computing 69, 117-124).
    """
    if kind == "collective-permute":
        return size
    return (2 if kind == "all-reduce" else 1) * size * (devices - 1) / devices
