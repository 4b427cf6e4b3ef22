"""Bytes, FLOP and loops of programs that are short enough to be counted by hand."""

import importlib
import json
import re
import sys
from pathlib import Path

import pytest


@pytest.fixture
def kernels(monkeypatch):
    """`kernels(text)`: the kernels of a program. Mosaic's move 1000 bytes a row, read 7 again."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    hlo = importlib.import_module("hlo")

    def of(text):
        def mosaic_bytes(op_name, array):
            return 1000 * array.dims[0], 7 * array.dims[0]

        return hlo.kernels(hlo.parse(text), mosaic_bytes)

    yield of
    sys.modules.pop("hlo")


FUSED = """HloModule jit_f, is_scheduled=true

%fused (p0: f32[8,16], p1: f32[8,16]) -> {out} {{
  %p0 = f32[8,16]{{1,0}} parameter(0)
  %p1 = f32[8,16]{{1,0}} parameter(1)
  %zero = s32[] constant(0)
{body}
}}

ENTRY %main (a: f32[8,16], b: f32[8,16]) -> {out} {{
  %a = f32[8,16]{{1,0}} parameter(0)
  %b = f32[8,16]{{1,0}} parameter(1)
  ROOT %f = {out} fusion(%a, %b), kind=kLoop, calls=%fused, metadata={{op_name="jit(f)/add"}}
}}
"""
WHOLE = 8 * 16 * 4


def traffic(found):
    (kernel,) = found
    return kernel.bytes_read, kernel.bytes_written


def test_a_fusion_reads_each_operand_and_writes_its_output_once(kernels):
    body = """  %twice = f32[8,16]{1,0} multiply(%p0, %p0)
  ROOT %sum = f32[8,16]{1,0} add(%twice, %p1)"""
    (kernel,) = kernels(FUSED.format(out="f32[8,16]{1,0}", body=body))
    assert (kernel.bytes_read, kernel.bytes_written) == (2 * WHOLE, WHOLE)
    assert (kernel.kind, kernel.op_name, kernel.loops) == ("kLoop", "jit(f)/add", ())


def test_a_fusion_writes_every_array_of_a_tuple(kernels):
    body = """  %sum = f32[8,16]{1,0} add(%p0, %p1)
  %narrow = bf16[8,16]{1,0} convert(%sum)
  ROOT %both = (f32[8,16]{1,0}, bf16[8,16]{1,0}) tuple(%sum, %narrow)"""
    out = "(f32[8,16]{1,0}, bf16[8,16]{1,0})"
    assert traffic(kernels(FUSED.format(out=out, body=body))) == (2 * WHOLE, WHOLE + WHOLE // 2)


def test_a_sliced_operand_counts_its_slices_even_behind_other_operations(kernels):
    body = """  %double = f32[8,16]{1,0} add(%p0, %p0)
  %first = f32[2,16]{1,0} slice(%double), slice={[0:2], [0:16]}
  %square = f32[8,16]{1,0} multiply(%double, %p0)
  %moved = f32[2,16]{1,0} dynamic-slice(%square, %zero, %zero), dynamic_slice_sizes={2,16}
  %other = f32[2,16]{1,0} slice(%p1), slice={[0:2], [0:16]}
  %sum = f32[2,16]{1,0} add(%first, %moved)
  ROOT %sums = f32[2,16]{1,0} add(%sum, %other)"""
    found = kernels(FUSED.format(out="f32[2,16]{1,0}", body=body))
    assert traffic(found) == (WHOLE // 2 + WHOLE // 4, WHOLE // 4)


def test_a_reduced_operand_counts_whole(kernels):
    body = """  %sum = f32[8]{0} reduce(%p0, %zero), dimensions={1}, to_apply=%add
  %wide = f32[8,16]{1,0} broadcast(%sum), dimensions={0}
  %all = f32[8,16]{1,0} add(%wide, %p1)
  ROOT %part = f32[1,16]{1,0} slice(%all), slice={[0:1], [0:16]}"""
    found = kernels(FUSED.format(out="f32[1,16]{1,0}", body=body))
    assert traffic(found) == (WHOLE + WHOLE // 8, WHOLE // 8)


def test_an_update_in_place_counts_as_the_update(kernels):
    body = """  %new = f32[1,16]{1,0} slice(%p1), slice={[0:1], [0:16]}
  ROOT %set = f32[8,16]{1,0} dynamic-update-slice(%p0, %new, %zero, %zero)"""
    found = kernels(FUSED.format(out="f32[8,16]{1,0}", body=body))
    assert traffic(found) == (WHOLE // 8, WHOLE // 8)


def test_an_update_of_what_the_kernel_itself_makes_writes_all_of_it(kernels):
    body = """  %made = f32[8,16]{1,0} negate(%p0)
  %new = f32[1,16]{1,0} slice(%p1), slice={[0:1], [0:16]}
  ROOT %set = f32[8,16]{1,0} dynamic-update-slice(%made, %new, %zero, %zero)"""
    found = kernels(FUSED.format(out="f32[8,16]{1,0}", body=body))
    assert traffic(found) == (WHOLE - WHOLE // 8 + WHOLE // 8, WHOLE)


def test_a_scatter_in_place_reads_and_writes_the_rows_that_it_updates(kernels):
    found = kernels("""
ENTRY %main (table: f32[100,16], ids: s32[3,1], rows: f32[3,16]) -> f32[100,16] {
  %table = f32[100,16]{1,0} parameter(0)
  %ids = s32[3,1]{1,0} parameter(1)
  %rows = f32[3,16]{1,0} parameter(2)
  ROOT %s = f32[100,16]{1,0} scatter(%table, %ids, %rows), to_apply=%add
}
""")
    rows = 3 * 16 * 4
    assert traffic(found) == (3 * 4 + 2 * rows, rows)


GEMM = '{"fusion_backend_config":{"kind":"__triton_nested_gemm_fusion"}}'
NESTED = """
%inner (q0: bf16[32,64], q1: bf16[64,8]) -> bf16[32,8] {
  %q0 = bf16[32,64]{1,0} parameter(0)
  %q1 = bf16[64,8]{1,0} parameter(1)
  ROOT %dot = f32[32,8]{1,0} dot(%q0, %q1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%fused (p0: bf16[64,64], p1: bf16[64,8]) -> f32[32,8] {
  %p0 = bf16[64,64]{1,0} parameter(0)
  %p1 = bf16[64,8]{1,0} parameter(1)
  %half = bf16[32,64]{1,0} slice(%p0), slice={[0:32], [0:64]}
  ROOT %product = f32[32,8]{1,0} fusion(%half, %p1), kind=kCustom, calls=%inner
}

ENTRY %main (a: bf16[64,64], b: bf16[64,8]) -> f32[32,8] {
  %a = bf16[64,64]{1,0} parameter(0)
  %b = bf16[64,8]{1,0} parameter(1)
  ROOT %f = f32[32,8]{1,0} fusion(%a, %b), kind=kCustom, calls=%fused, backend_config=GEMM
}
""".replace("GEMM", GEMM)


def test_a_fusion_in_a_fusion_counts_its_bytes_and_its_products(kernels):
    (kernel,) = kernels(NESTED)
    assert kernel.bytes_read == (32 * 64 + 64 * 8) * 2
    assert kernel.bytes_written == 32 * 8 * 4
    assert kernel.flops == 2 * 32 * 64 * 8
    assert kernel.kind == "triton_nested_gemm_fusion"


LOOPS = """
%inner (c: (s32[], f32[4])) -> (s32[], f32[4]) {
  %c = (s32[], f32[4]{0}) parameter(0)
  %x = f32[4]{0} get-tuple-element(%c), index=1
  %copy = f32[4]{0} copy(%x)
  ROOT %out = (s32[], f32[4]{0}) tuple(%i, /*index=1*/%copy)
}

%outer (c: (s32[], f32[4])) -> (s32[], f32[4]) {
  %c = (s32[], f32[4]{0}) parameter(0)
  ROOT %w = (s32[], f32[4]{0}) while(%c), body=%inner, backend_config=5, metadata={op_name="in"}
}

ENTRY %main (c: (s32[], f32[4])) -> (s32[], f32[4]) {
  %c = (s32[], f32[4]{0}) parameter(0)
  ROOT %v = (s32[], f32[4]{0}) while(%c), body=%outer, backend_config=3
}
"""


def test_loops_multiply_and_name_what_xla_added_inside(kernels):
    text = re.sub(r"config=(\d)", r'config={"known_trip_count":{"n":"\1"}}', LOOPS)
    (kernel,) = kernels(text)
    assert kernel.times == 15 and kernel.num_bytes == 2 * 4 * 4
    assert [tuple(loop) for loop in kernel.loops] == [("v", 3), ("w", 5)]
    assert kernel.op_name == "in"


def test_an_asynchronous_operation_counts_once(kernels):
    copy, gather, negate = kernels("""
%wrapped (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  ROOT %n = f32[4]{0} negate(%p)
}

ENTRY %main (a: f32[4], b: f32[4]) -> f32[4] {
  %a = f32[4]{0} parameter(0)
  %cs = (f32[4]{0:S(5)}, f32[4]{0}, u32[]) copy-start(%a)
  %cd = f32[4]{0:S(5)} copy-done(%cs)
  %gs = (f32[4]{0}, f32[8]{0}) all-gather-start(%a), dimensions={0}
  %gd = f32[8]{0} all-gather-done(%gs)
  %ns = ((f32[4]{0}), f32[4]{0}, u32[]) async-start(%a), calls=%wrapped
  %nu = ((f32[4]{0}), f32[4]{0}, u32[]) async-update(%ns)
  ROOT %nd = f32[4]{0} async-done(%nu)
}
""")
    assert (copy.kind, copy.bytes_read, copy.bytes_written) == ("copy", 16, 16)
    assert (gather.kind, gather.bytes_read, gather.bytes_written) == ("all-gather", 16, 32)
    assert (negate.kind, negate.bytes_read, negate.bytes_written) == ("negate", 16, 16)


ATTENTION = """
ENTRY %main (q: bf16[2,8,4,16], k: bf16[2,8,4,16], v: bf16[2,8,4,16]) -> f32[2] {
  %q = bf16[2,8,4,16]{3,2,1,0} parameter(0)
  %k = bf16[2,8,4,16]{3,2,1,0} parameter(1)
  %v = bf16[2,8,4,16]{3,2,1,0} parameter(2)
  %c = (bf16[2,4,8,16]{3,1,2,0}, f32[2,4,8], u8[0]{0}) custom-call(%q, %k, %v), ATTRIBUTES
  ROOT %g = bf16[2,4,8,16]{3,1,2,0} get-tuple-element(%c), index=0
}
"""


@pytest.mark.parametrize("which, products", [("", 2), ("Backward", 5)])
@pytest.mark.parametrize("mask, seen", [("NO_MASK", 1), ("CAUSAL", 2)])
def test_attention_of_cudnn_counts_the_products_that_its_mask_leaves(
    kernels, which, products, mask, seen
):
    config = {"intermediate_tensor_shape": {"dimensions": ["2", "4", "8", "8"]}, "mask_type": mask}
    attributes = f'custom_call_target="__cudnn$fmhaSoftmax{which}", backend_config='
    attributes += json.dumps({"cudnn_fmha_backend_config": config})
    (kernel,) = kernels(ATTENTION.replace("ATTRIBUTES", attributes))
    assert kernel.kind == f"__cudnn$fmhaSoftmax{which}"
    assert kernel.flops == products * 2 * (2 * 4 * 8 * 8) * 16 // seen
    array = 2 * 8 * 4 * 16 * 2
    assert (kernel.bytes_read, kernel.bytes_written) == (3 * array, array + 2 * 4 * 8 * 4)


def test_a_kernel_of_mosaic_moves_what_its_definition_says(kernels):
    (kernel,) = kernels("""
ENTRY %main (x: f32[64,32]) -> f32[64,32] {
  %x = f32[64,32]{1,0} parameter(0)
  ROOT %c = f32[64,32]{1,0} custom-call(%x), custom_call_target="mosaic_gpu_v2"
}
""")
    assert kernel.num_bytes == 64 * 1000 and kernel.bytes_written == 64 * 32 * 4
    assert kernel.bytes_again == 64 * 7
