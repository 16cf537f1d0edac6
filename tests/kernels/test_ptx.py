"""The reader of PTX finds what it is there for, in kernels of a few lines."""

import pytest
from ptx import races

KERNEL = """
.visible .entry kernel(
	.param .u64 .ptr .global .align 1 kernel_param_0,
	.param .u32 kernel_param_1
)
{{
	.reg .pred 	%p<9>;
	ld.param.b64 	%rd1, [kernel_param_0];
	ld.param.b32 	%r1, [kernel_param_1];
	mov.u32 	%r2, %tid.x;
	and.b32 	%r3, %r2, 15;
	mad.wide.s32 	%rd2, %r3, 2, %rd1;
	mad.wide.s32 	%rd3, %r1, 2, %rd1;
	mad.wide.s32 	%rd4, %r2, 16, %rd1;
	setp.lt.s32 	%p1, %r2, 16;
{body}
	ret;
}}
"""
LOAD_EDGES = "	ld.global.b16 	{ %rs1 }, [ %rd2 + 0 ];\n"
LOAD_LABEL = "	ld.global.b16 	{ %rs2 }, [ %rd3 + 0 ];\n"
LOAD_BODY = "	ld.global.v4.b32 	{ %r4, %r5, %r6, %r7 }, [ %rd4 + 0 ];\n"
# Of what came from this thread and from others.
REDUCE = "	cvt.f32.bf16 	%r8, %rs1;\n	shfl.sync.bfly.b32 	%r9, %r8, 8, 31, -1;\n	max.f32 	%r10, %r8, %r9;\n"
BARRIER = "	bar.sync 	0;\n"
STORE_EDGES = "	@%p1 st.global.b16 	[ %rd2 + 0 ], { %rs3 };\n"
STORE_LABEL = "	@%p1 st.global.b16 	[ %rd3 + 0 ], { %rs3 };\n"
STORE_BODY = "	st.global.v4.b32 	[ %rd4 + 0 ], { %r4, %r5, %r6, %r7 };\n"
ZEROS = "	mov.b16 	%rs3, 0;\n"


def found(*body):
    return races(KERNEL.format(body="".join(body)))


@pytest.mark.parametrize(
    "first, second",
    [
        (LOAD_EDGES, STORE_EDGES),  # one warp stores what a late one has to load
        (LOAD_LABEL, STORE_EDGES),
        (LOAD_LABEL, STORE_BODY),
        (LOAD_BODY + STORE_BODY, STORE_LABEL),  # which is the last?
        (STORE_EDGES, LOAD_EDGES),
    ],
    ids=["edges", "label, edges", "label, body", "the label's column twice", "edges again"],
)
def test_two_threads_that_meet_at_an_address_need_a_barrier(first, second):
    problems = found(first, REDUCE, second)
    assert problems and all(problem.startswith("no barrier between") for problem in problems)
    assert not found(first, BARRIER, REDUCE, second)


def test_a_barrier_on_one_of_two_ways_is_none():
    loop = "$L__BB0_1:\n"
    way = "	setp.lt.s32 	%p2, %r1, 8;\n	@%p2 bra 	$L__BB0_1;\n"
    assert found(LOAD_LABEL, REDUCE, way, BARRIER, loop, STORE_BODY)
    assert not found(LOAD_LABEL, REDUCE, way, loop, BARRIER, STORE_BODY)
    # Around a loop, the store of a round comes before the load of the next.
    assert found(loop, LOAD_EDGES, REDUCE, BARRIER, STORE_EDGES, way)


@pytest.mark.parametrize(
    "body",
    [
        (LOAD_BODY, REDUCE, STORE_BODY),  # each thread has its own columns
        (LOAD_BODY, REDUCE, STORE_EDGES),  # other columns
        (LOAD_EDGES, STORE_EDGES),  # nothing passes from a thread to another
        (REDUCE, STORE_BODY, STORE_LABEL),  # nothing is read
    ],
    ids=["body", "body, edges", "nothing exchanged", "nothing read"],
)
def test_no_barrier_where_threads_do_not_meet(body):
    assert not found(*body)


def test_no_order_among_zeros():
    assert not found(REDUCE, "	mov.b32 	%r4, 0;\n", ZEROS, LOAD_LABEL, BARRIER, STORE_BODY.replace("%r5", "%r4")
                     .replace("%r6", "%r4").replace("%r7", "%r4"), STORE_LABEL)  # fmt: skip


@pytest.mark.parametrize("limit, parts", [("%r8", True), ("%r10", False), ("%r1", False)])
def test_a_branch_around_a_barrier_is_taken_by_all_threads(limit, parts):
    branch = f"	setp.gt.f32 	%p3, {limit}, 0f00000000;\n	@%p3 bra 	$L__BB0_1;\n"
    problems = found(LOAD_EDGES, BARRIER, REDUCE, branch, BARRIER, "$L__BB0_1:\n")
    assert [problem.startswith("threads can part") for problem in problems] == [True] * parts
