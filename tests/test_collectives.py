"""What compiled programs send, against what the programs say."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import woodjax as wj


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    out = tmp_path_factory.mktemp("collectives") / "texts.json"
    job = str(Path(__file__).with_name("collectives_job.py"))
    run = subprocess.run([sys.executable, job, str(out)], capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(out.read_text())


# The input is [8, 16] in float32. Kind, operand and result on a device, group, runs: one line for each collective.
EXPECTED = {
    "psum over 8": [("all-reduce", 64, 64, 8, 1)],
    "psum over data of 2x2": [("all-reduce", 256, 256, 2, 1)],
    "psum over block of 2x4": [("all-reduce", 128, 128, 4, 1)],
    "psum over both of 2x4": [("all-reduce", 64, 64, 8, 1)],
    "pmax of a few": [("all-reduce", 4, 4, 4, 1)],
    "all_gather over data of 2x4": [("all-gather", 256, 512, 2, 1)],
    "all_gather of bool": [("all-gather", 16, 128, 8, 1)],
    "psum_scatter over 4": [("reduce-scatter", 128, 32, 4, 1)],
    "psum_scatter over block of 2x4": [("reduce-scatter", 128, 32, 4, 1)],
    "all_to_all over block of 2x4": [("all-to-all", 128, 128, 4, 1)],
    "all_to_all over both of 2x4": [("all-to-all", 64, 64, 8, 1)],
    "ppermute over 8": [("collective-permute", 64, 64, 8, 1)],
    "ppermute over block of 2x2": [("collective-permute", 256, 256, 4, 1)],
    "nested scans": [("all-reduce", 64, 64, 8, 15), ("all-reduce", 64, 64, 8, 1)],
    "fori_loop": [("all-reduce", 64, 64, 8, 7)],
    "fori_loop of unknown length": [("all-reduce", 64, 64, 8, None)],
    "in the condition of a loop": [("all-reduce", 64, 64, 8, None)],
    "cond": [("all-reduce", 32, 32, 8, 3)],
    "nothing": [],
}


@pytest.mark.parametrize("name", EXPECTED)
def test_what_was_written(texts, name):
    assert [tuple(x[:5]) for x in wj.collectives(texts[name])] == EXPECTED[name]


def test_sums_of_several_arrays_are_all_counted(texts):
    found = wj.collectives(texts["psum of a tuple"])
    assert {(x.kind, x.group_size, x.count) for x in found} == {("all-reduce", 8, 1)}
    # [1, 16] floats, [1, 3] integers, and [1, 16] halves, which a backend may sum as floats.
    assert sum(x.operand_bytes for x in found) in {64 + 12 + 32, 64 + 12 + 64}


def test_what_the_partitioner_adds_is_found(texts):
    found = wj.collectives(texts["partitioned matmul"])
    assert {(x.kind, x.group_size, x.count) for x in found} == {("all-reduce", 2, 1), ("all-gather", 2, 1)}
    assert wj.largest_gather(texts["partitioned matmul"]) == wj.gathered_bytes(texts["partitioned matmul"]) == 4 * 8 * 4


def test_sources_say_where_to_look(texts):
    (scatter,) = wj.collectives(texts["psum_scatter over 4"])
    assert scatter.source.endswith("reduce_scatter")


def test_gathers_alone_gather(texts):
    assert wj.largest_gather(texts["all_gather over data of 2x4"]) == 512
    assert wj.gathered_bytes(texts["all_gather of bool"]) == 128
    assert wj.largest_gather(texts["psum over 8"]) == wj.gathered_bytes(texts["psum over 8"]) == 0
    assert wj.largest_gather(texts["psum over 8"], kinds=("all-reduce",)) == 64
    # The branch that sends less is looked at too.
    assert wj.largest_gather(texts["cond"], kinds=("all-reduce",)) == 64


def ring(kind, sizes):
    """Bytes that the first of `g` devices sends, chunk by chunk round a ring; `sizes` are those of the chunks."""
    g = len(sizes)
    around = [sizes[-step % g] for step in range(g - 1)]  # what it passes on at each step
    return {"all-gather": sum(around), "reduce-scatter": sum(around), "all-reduce": 2 * sum(around)}[kind]


@pytest.mark.parametrize("kind", ["all-gather", "reduce-scatter", "all-reduce"])
@pytest.mark.parametrize("g", [1, 2, 4, 8])
def test_bytes_on_the_wire_are_those_of_a_ring(kind, g):
    operand, result = {"all-gather": (32, 32 * g), "reduce-scatter": (32 * g, 32), "all-reduce": (32 * g,) * 2}[kind]
    assert wj.wire_bytes(wj.Collective(kind, operand, result, g, 3, "")) == 3 * ring(kind, [32] * g)


@pytest.mark.parametrize(
    ("kind", "g", "sent"),
    [("all-to-all", 4, 96), ("ragged-all-to-all", 4, 96), ("collective-permute", 8, 128), ("send", 2, 128)],
)
def test_bytes_on_the_wire_of_the_others(kind, g, sent):
    assert wj.wire_bytes(wj.Collective(kind, 128, 128, g, 1, "")) == sent
    assert wj.wire_bytes(wj.Collective(kind, 128, 128, 1, 1, "")) == 0


def test_unknown_lengths_are_not_guessed(texts):
    (found,) = wj.collectives(texts["fori_loop of unknown length"])
    with pytest.raises(ValueError, match="unknown number of times"):
        wj.wire_bytes(found)
    assert wj.wire_bytes(found._replace(count=1)) == 2 * 64 * 7 / 8


# As XLA writes programs for GPUs and TPUs, where communication has a start and an end.
ASYNC = """HloModule step, is_scheduled=true, replica_count=1, num_partitions=8

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  ROOT %sum = f32[] add(%x, %y)
}

%wrapped (p: bf16[64,128]) -> bf16[8,128] {
  %p = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %inner = bf16[8,128]{1,0} reduce-scatter(%p), replica_groups=[1,8]<=[8], dimensions={0}, to_apply=%add
}

%body (s: (s32[], f32[16])) -> (s32[], f32[16]) {
  %s = (s32[], f32[16]{0}) parameter(0)
  %w = f32[16]{0} get-tuple-element(%s), index=1
  %ar = f32[16]{0} all-reduce-start(%w), channel_id=1, replica_groups=[4,2]<=[2,4]T(1,0), to_apply=%add
  ROOT %ard = f32[16]{0} all-reduce-done(%ar)
}

%condition (c: (s32[], f32[16])) -> pred[] {
  %c = (s32[], f32[16]{0}) parameter(0)
  ROOT %go = pred[] constant(true)
}

ENTRY %main (a: f32[4,8], b: bf16[64,128]) -> f32[4,8] {
  %a = f32[4,8]{1,0} parameter(0)
  %b = bf16[64,128]{1,0} parameter(1)
  %ag = (f32[4,8]{1,0}, f32[16,8]{1,0:T(8,128)S(1)}) all-gather-start(%a), replica_groups=[2,4]<=[8], dimensions={0}
  %agd = f32[16,8]{1,0} all-gather-done(%ag), metadata={op_name="jit(f)/all_gather"}
  %cp = (f32[4,8], f32[4,8], u32[], u32[]) collective-permute-start(f32[4,8]{1,0} %a), source_target_pairs={{0,1},{1,0}}
  %cpd = f32[4,8]{1,0} collective-permute-done(%cp)
  %as = ((bf16[64,128]{1,0}), bf16[8,128]{1,0}, u32[]) async-start(%b), calls=%wrapped
  %asd = bf16[8,128]{1,0} async-done(%as), calls=%wrapped
  %tb = ((f32[4,8]), f32[4,8], s32[], /*index=3*/s32[]) all-to-all-start(%a), replica_groups={}, dimensions={0}
  %tbd = f32[4,8]{1,0} all-to-all-done(%tb)
  %sizes = s32[8]{0} constant({...})
  %ra = f32[4,8]{1,0} ragged-all-to-all(%a, %a, %sizes, %sizes, %sizes, /*index=5*/%sizes), replica_groups=[1,8]<=[8]
  %cb = f32[4,8]{1,0} collective-broadcast(%a), replica_groups={{0,1,2},{3,4,5}}
  %t = token[] after-all()
  %se = (f32[4,8]{1,0}, u32[], token[]) send(%a, %t), channel_id=7
  %sed = token[] send-done(%se), channel_id=7
  %ho = (f32[4,8]{1,0}, u32[], token[]) send(%a, %t), channel_id=8, is_host_transfer=true
  %none = f32[4,8]{1,0} all-gather(%a), replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}, dimensions={0}
  %i = s32[] constant(0)
  %v = f32[16]{0} constant({...})
  %init = (s32[], f32[16]{0}) tuple(%i, %v)
  %loop = (s32[], f32[16]) while(%init), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"6"}}
  ROOT %out = f32[4,8]{1,0} copy(%a)
}
"""


def test_starts_and_ends_are_one():
    found = wj.collectives(ASYNC)
    assert [tuple(x[:5]) for x in found] == [
        ("all-gather", 128, 512, 4, 1),
        ("collective-permute", 128, 128, 2, 1),
        ("reduce-scatter", 16384, 2048, 8, 1),
        ("all-to-all", 128, 128, 8, 1),
        ("ragged-all-to-all", 128, 128, 8, 1),
        ("collective-broadcast", 128, 128, 3, 1),
        ("send", 128, 128, 2, 1),
        ("all-gather", 128, 128, 1, 1),
        ("all-reduce", 64, 64, 2, 6),
    ]
    assert wj.largest_gather(ASYNC) == 512
    assert wj.largest_gather(ASYNC, kinds=("reduce-scatter",)) == 2048


def test_one_device_sends_nothing():
    compiled = jax.jit(lambda x: x @ x).lower(jnp.ones((3, 3))).compile()
    assert wj.collectives(compiled) == ()
    assert wj.largest_gather(compiled) == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("HloModule nothing", "no ENTRY"),
        (
            ASYNC.replace("replica_groups={},", "replica_groups=@new<2>,"),
            "notation that is not known: replica_groups=@new",
        ),
        (ASYNC.replace("%p = bf16[", "%p = q7x["), "'q7x'"),
    ],
)
def test_what_cannot_be_read_is_an_error(text, message):
    with pytest.raises(ValueError, match=message):
        wj.collectives(text)


@pytest.mark.parametrize(("name", "block_size"), [("by columns", None), ("by sums", 4)])
def test_the_cost_model_sends_what_a_program_with_its_communication_does(texts, name, block_size):
    compiled = wj.collectives(texts[name])
    options = {"data_devices": 2, "block_size": block_size, "exchange": "sums"}
    model = wj.scaling_cost(256, 8, 8, wj.TPU_V5E, **options).collectives
    # A compiler may send several small sums as one.
    for kind in {x.kind for x in (*compiled, *model)}:
        found, expected = ([wj.wire_bytes(x) for x in every if x.kind == kind] for every in (compiled, model))
        assert sum(found) == pytest.approx(sum(expected), rel=1e-9), kind
    assert wj.largest_gather(texts[name]) == max(x.result_bytes for x in model if x.kind == "all-gather")


# As XLA's backend for TPU leaves loops: no count beside them, constants passed in from outside, copies.
COUNTED = """HloModule loops, num_partitions=4

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%inner_body (p: (s32[], f32[8], s32[])) -> (s32[], f32[8], s32[]) {
  %p = (s32[], f32[8]{0}, s32[]) parameter(0)
  %p0 = s32[]{:T(128)} get-tuple-element(%p), index=0
  %p1 = f32[8]{0} get-tuple-element(%p), index=1
  %p2 = s32[] get-tuple-element(%p), index=2
  %next = s32[] add(%p0, %p2)
  %total = f32[8]{0} all-reduce(%p1), replica_groups={{0,1},{2,3}}, to_apply=%add
  ROOT %inner_out = (s32[], f32[8]{0}, s32[]) tuple(%next, %total, %p2)
}

%inner_condition (q: (s32[], f32[8], s32[])) -> pred[] {
  %q = (s32[], f32[8]{0}, s32[]) parameter(0)
  %q0 = s32[] get-tuple-element(%q), index=0
  %inner_limit = s32[] constant(7)
  ROOT %inner_less = pred[] compare(%q0, %inner_limit), direction=LT
}

%outer_body (r: (s32[], f32[8], s32[], s32[])) -> (s32[], f32[8], s32[], s32[]) {
  %r = (s32[], f32[8]{0}, s32[], s32[]) parameter(0)
  %r0 = s32[] get-tuple-element(%r), index=0
  %r1 = f32[8]{0} get-tuple-element(%r), index=1
  %r2 = s32[] get-tuple-element(%r), index=2
  %r3 = s32[] get-tuple-element(%r), index=3
  %one = s32[] constant(1)
  %step = s32[] copy(%r3)
  %inner_start = (s32[], f32[8]{0}, s32[]) tuple(%one, %r1, %step)
  %inner = (s32[], f32[8]{0}, s32[]) while(%inner_start), condition=%inner_condition, body=%inner_body
  %inner_result = f32[8]{0} get-tuple-element(%inner), index=1
  %outer_next = s32[] add(%one, %r0)
  ROOT %outer_out = (s32[], f32[8]{0}, s32[], s32[]) tuple(%outer_next, %inner_result, %r2, %r3)
}

%outer_condition (s: (s32[], f32[8], s32[], s32[])) -> pred[] {
  %s = (s32[], f32[8]{0}, s32[], s32[]) parameter(0)
  %s0 = s32[] get-tuple-element(%s), index=0
  %s2 = s32[] get-tuple-element(%s), index=2
  ROOT %outer_less = pred[] compare(%s0, %s2), direction=LT
}

ENTRY %main (v: f32[8], n: s32[]) -> f32[8] {
  %v = f32[8]{0} parameter(0)
  %n = s32[] parameter(1)
  %zero = s32[] constant(0)
  %limit = s32[] constant(5)
  %two = s32[] constant(2)
  %outer_start = (s32[], f32[8]{0}, s32[], s32[]) tuple(%zero, %v, %limit, %two)
  %outer = (s32[], f32[8]{0}, s32[], s32[]) while(%outer_start), condition=%outer_condition, body=%outer_body
  ROOT %result = f32[8]{0} get-tuple-element(%outer), index=1
}
"""


def test_loops_whose_length_is_not_written_down_are_counted():
    (found,) = wj.collectives(COUNTED)
    assert tuple(found[:5]) == ("all-reduce", 32, 32, 2, 5 * 3)  # 0, 1, 2, 3, 4 and 1, 3, 5
    (once,) = wj.collectives(COUNTED.replace("%inner_limit = s32[] constant(7)", "%inner_limit = s32[] constant(2)"))
    assert once.count == 5
    assert wj.collectives(COUNTED.replace("%limit = s32[] constant(5)", "%limit = s32[] constant(-5)")) == ()


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("the start is an argument", ("tuple(%zero, %v, %limit, %two)", "tuple(%n, %v, %limit, %two)")),
        ("the limit is", ("tuple(%zero, %v, %limit, %two)", "tuple(%zero, %v, %n, %two)")),
        ("the step is", ("tuple(%zero, %v, %limit, %two)", "tuple(%zero, %v, %limit, %n)")),
        ("the limit changes", ("tuple(%outer_next, %inner_result, %r2", "tuple(%outer_next, %inner_result, %r0")),
        ("it counts down", ("%inner_limit), direction=LT", "%inner_limit), direction=GT")),
        ("it is multiplied", ("%next = s32[] add(", "%next = s32[] multiply(")),
        ("it does not go up", ("%two = s32[] constant(2)", "%two = s32[] constant(0)")),
        ("it goes up by itself", ("%next = s32[] add(%p0, %p2)", "%next = s32[] add(%p0, %p0)")),
        ("it is another element", ("%outer_next = s32[] add(%one, %r0)", "%outer_next = s32[] add(%one, %r2)")),
        ("the start is no constant of one number", ("%zero = s32[] constant(0)", "%zero = s32[] constant({...})")),
    ],
)
def test_loops_that_cannot_be_counted_are_not(what, change):
    assert COUNTED.count(change[0]) == 1, what
    (found,) = wj.collectives(COUNTED.replace(*change))
    assert found.count is None, what
