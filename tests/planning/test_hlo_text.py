"""Collectives, buffers and arguments are read from the text of small programs."""

from __future__ import annotations

import pytest

from mmljax.planning.hlo_text import (
    Buffer,
    Traffic,
    argument_bytes,
    collectives,
    instructions,
    largest_buffers,
    sent_bytes,
)

PLAIN = """
ENTRY %main (p: f32[16,512]) -> f32[3] {
  %a = f32[16,512]{1,0} fusion(%p)
  %g.1 = f32[64,512]{1,0} all-gather(%a), channel_id=1, dimensions={0}
  %r = bf16[4]{0} reduce-scatter(%h), channel_id=1
  %h = bf16[16]{0} fusion(%p)
  %s = (f32[2,2]{1,0}, s32[]) all-reduce(%x, %y), channel_id=1
  %t = f32[3]{0} all-reduce-start(f32[3]{0} %z), channel_id=1
  %u = f32[3]{0} all-reduce-done(%t)
}
"""


def test_collectives_of_one_computation() -> None:
    assert collectives(PLAIN) == {
        "all-gather": Traffic(1, 64 * 512 * 4),
        "reduce-scatter": Traffic(1, 16 * 2),
        "all-reduce": Traffic(2, 16 + 4 + 12, asynchronous=12),
    }


PAIRS = """
%wrapped (x: f32[5]) -> f32[40] {
  %x = f32[5]{0:T(128)} parameter(0)
  ROOT %g = f32[40]{0:T(256)} all-gather(%x), channel_id=1, dimensions={0}
}

ENTRY %main (p: f32[7,3]) -> f32[14,3] {
  %p = f32[7,3]{1,0:T(8,128)} parameter(0)
  %s = (f32[7,3]{1,0:T(8,128)}, f32[14,3]{1,0:T(8,128)(2,1)S(1)}) all-gather-start(%p)
  %d = f32[14,3]{1,0} all-gather-done(%s)
  %w = ((f32[5]{0}), f32[40]{0}, u32[]{:S(2)}) async-start(%q), calls=%wrapped
  %c = (f32[6]{0}, f32[6]{0}, u32[], u32[]) collective-permute-start(%y)
  %y = f32[6]{0} fusion(%p)
  %e = f32[6]{0} collective-permute-done(%c)
  ROOT %v = f32[40]{0} async-done(%w)
}
"""


def test_a_pair_of_start_and_done_counts_once() -> None:
    assert collectives(PAIRS) == {
        "all-gather": Traffic(2, 14 * 3 * 4 + 160, asynchronous=14 * 3 * 4 + 160),
        "collective-permute": Traffic(1, 24, asynchronous=24),
    }


def chain_part(name: str, number: int) -> str:
    return f"""
%{name} (x: f32[512,512]) -> (f32[4096,512], f32[8]) {{
  %x = f32[512,512]{{0,1:T(8,128)}} parameter(0)
  %g.{name} = f32[4096,512]{{0,1:T(8,128)}} all-gather(%x), channel_id=1, replica_groups={{{{0,1}}}}, frontend_attributes={{chain_id="{number}"}}
  ROOT %c = (f32[4096,512]{{0,1}}, f32[8]{{0}}) custom-call(%g.{name})
}}
"""  # noqa: E501


def test_a_chain_of_fusions_counts_once_and_as_asynchronous() -> None:
    parts = ("async_collective_fusion.1", "async_collective_fusion.2", "fused_computation.9")
    text = "".join(chain_part(name, 1) for name in parts) + chain_part("other", 2)
    size = 4096 * 512 * 4
    assert collectives(text) == {"all-gather": Traffic(2, 2 * size, asynchronous=2 * size)}


LOOPS = """
%inner (t: (s32[], f32[4])) -> (s32[], f32[4]) {
  %g = f32[4]{0} all-reduce(%x), to_apply=%add
  %x = f32[4]{0} fusion(%t)
}

%outer (t: (s32[], f32[4])) -> (s32[], f32[4]) {
  %w = (s32[], f32[4]{0}) while(%t), condition=%less, body=%inner, backend_config={"known_trip_count":{"n":"5"},"flag":[]}
}

ENTRY %main (p: f32[4]) -> f32[4] {
  %w = (s32[], f32[4]{0}) while(%t), condition=%less, body=%outer, backend_config={"known_trip_count":{"n":"3"}}
  %once = f32[2]{0} all-reduce(f32[2]{0} %q), to_apply=%add
}
"""  # noqa: E501


def test_collectives_of_loops_count_as_often_as_they_run() -> None:
    assert collectives(LOOPS) == {"all-reduce": Traffic(3 * 5 + 1, 15 * 16 + 8)}


ENTRY = """
%async_collective_fusion.3 (t: f32[800]) -> f32[800] {
  %g = f32[800]{0} all-gather(%x), frontend_attributes={chain_id="4"}
}

%body (t: f32[1000]) -> f32[1000] {
  %deep = f32[1000]{0} fusion(%t)
}

ENTRY %main (p: f32[3,5], q: (u8[7], bf16[2])) -> f32[3,5] {
  %p = f32[3,5]{1,0:T(8,128)} parameter(0)
  %q = (u8[7]{0}, bf16[2]{0}) parameter(1)
  %a = bf16[40,2]{1,0:T(8,128)(2,1)} fusion(%p), calls=%f, metadata={op_name="jit(f)/relu" stack_frame_id=3}
  %b = bf16[40,2]{1,0:T(8,128)(2,1)} fusion(%p), calls=%g, metadata={op_name="jit(f)/relu"}
  %fast = f32[900]{0:T(256)S(1)} fusion(%p), calls=%h
  %copy = (f32[900]{0}, f32[900]{0:S(1)}, u32[]{:S(2)}) copy-start(%p)
  %large = f32[800]{0} get-tuple-element(%copy), index=0
  %chain = (f32[800]{0}, f32[35]{0}) fusion(%large, %p), kind=kCustom, calls=%async_collective_fusion.3
  ROOT %t = (f32[3,5]{1,0}, f32[30]{0}) custom-call(%a), custom_call_target="Sort"
}
"""  # noqa: E501


def test_arguments_are_those_of_the_entry() -> None:
    assert argument_bytes(ENTRY) == 3 * 5 * 4 + 7 + 2 * 2


def test_operands_may_begin_with_a_tuple_type() -> None:
    text = "%b (x: s32[]) -> s32[] {\n  %w = s32[] while((s32[], f32[4]{0}) %t), condition=%c\n}"
    (line,) = instructions(text)
    assert (line.kind, line.operands, line.attributes) == ("while", ("t",), ", condition=%c")


def test_largest_buffers_are_those_of_main_memory() -> None:
    assert largest_buffers(ENTRY, count=2) == [
        Buffer(160, 2, "bf16[40,2]", "fusion", "jit(f)/relu"),
        Buffer(140, 1, "f32[35]", "fusion", ""),
    ]


@pytest.mark.parametrize("devices", [2, 3, 8])
def test_a_ring_sends_what_is_stated(devices: int) -> None:
    """Counted on a ring whose devices hand parts of a vector on, one per round."""
    size = 24 * devices
    held = [{device} for device in range(devices)]
    newest, gather = list(range(devices)), 0
    while any(len(parts) < devices for parts in held):
        newest = [newest[device - 1] for device in range(devices)]
        for parts, part in zip(held, newest, strict=True):
            parts.add(part)
        gather += 24  # each device sends one part to the next
    assert sent_bytes("all-gather", size, devices=devices) == gather
    assert sent_bytes("reduce-scatter", size, devices=devices) == gather
    assert sent_bytes("all-reduce", size, devices=devices) == 2 * gather
    assert sent_bytes("collective-permute", size, devices=devices) == size
