"""Every kernel compiles for Hopper and fits into its shared memory, which needs a compiler and no GPU; and on one, none
reads or writes where it should not."""

import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SHARED_MEMORY = 232_448   # bytes that a program can have on compute capability 9.0


def compile_for_hopper(kernel, types, constants, warps, stages=3):
    """types, constants: {argument: Triton type}, {argument: value} -> a function that compiles the kernel. Pointers and
    sizes are taken to be multiples of 16, as they are in training."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    aligned = [name for name, kind in types.items() if kind == "i32" or kind.startswith("*")]
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": warps, "num_stages": stages}
    return lambda: compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def gemm(tile, mode, add, out, fp8="fp8e4nv", tma=True):
    """tile: as `tile_shape` gives them; mode: "fast", "promoted", or what K is split into."""
    from gemm_kernel import _gemm_kernel
    BLOCK_M, BLOCK_N, warps, stages, _ = tile
    in_loop = isinstance(mode, int)
    BLOCK_K, quarters = mode if in_loop else 128, BLOCK_N == 256 and (add or out == "fp32")
    types = {"a_desc": f"tensordesc<{fp8}[{BLOCK_M}, {BLOCK_K}]>",
             "b_desc": f"tensordesc<fp8e4nv[{BLOCK_N}, {BLOCK_K}]>",
             "c_desc": f"tensordesc<{out}[{BLOCK_M}, {BLOCK_N // (4 if quarters else 2)}]>", "c_ptr": f"*{out}",
             "add_ptr": "*bf16", "a_scale_ptr": "*fp32", "b_scale_ptr": "*fp32", "M": "i32", "N": "i32", "K": "i32"}
    constants = {"BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N, "BLOCK_K": BLOCK_K, "PROGRAMS": 132, "IN_LOOP": in_loop,
                 "PROMOTE": 16 if mode == "promoted" else 0, "A_PER_ROW": 1, "B_ROWS": 128 if mode == 128 else 1,
                 "ADD": add, "TMA_STORE": tma, "QUARTERS": quarters, "FLATTEN": mode == "fast"}
    for name, given in (("c_desc", tma), ("add_ptr", add)):
        if not given:
            constants[name] = None
            del types[name]
    return compile_for_hopper(_gemm_kernel, types, constants, warps, stages)


def all_kernels():
    """All kernels as the wrappers launch them: yields (name, function that compiles it)."""
    from autoscale import _adamw_kernel
    from gemm_kernel import tile_shape
    from microscale import (NORMS, _quantize_kernel, _rope_backward_kernel, _rope_kernel, _rows_kernel,
                            _swiglu_backward_kernel, _swiglu_kernel, _transpose_kernel, power_of_two_from)
    tiles = [tile_shape(M, M, 132) for M in (8192, 2048, 1280, 512)]
    assert len({tile[:2] for tile in tiles}) == 4
    for tile, mode, add, out in itertools.product(tiles, ("fast", "promoted"), (False, True), ("bf16", "fp32")):
        yield f"gemm {tile} {mode} {add} {out}", gemm(tile, mode, add, out)
    for K in (32, 128):
        yield f"gemm in loop {K}", gemm(tile_shape(512, 512, 132, in_loop=True), K, False, "bf16")
    yield "gemm E5M2", gemm(tiles[0], "promoted", False, "bf16", fp8="fp8e5")
    yield "gemm without TMA stores", gemm(tiles[0], "promoted", True, "fp32", tma=False)

    for e4m3 in (True, False):
        q = "*fp8e4nv" if e4m3 else "*fp8e5"
        fixed = {"IS_E4M3": e4m3}
        sizes = {"q_ptr": q, "scale_ptr": "*fp32", "R": "i32", "C": "i32", "stride_r": "i32"}
        for x, both in itertools.product(("*bf16", "*fp32"), (True, False)):
            group = {"GROUP": 128, "RULE": "given" if both else "fp32", "ROWS": 64 if both else 16,
                     "COLS": 128 if both else 256, "AS_E8M0": False, "BOTH": both, "stride_c": 1}
            types = {"x_ptr": x, **({"t_ptr": q} if both else {}), "groups": "i32", **sizes}
            yield f"quantize {x} {both}", compile_for_hopper(
                _quantize_kernel, types, {**group, **fixed, **({} if both else {"t_ptr": None})}, 4)
        for norm, C in itertools.product(NORMS, (768, 4096, 11008)):
            cols = power_of_two_from(C)
            weight = {"weight_ptr": "*bf16"} if norm == "rms" else {}
            constants = {"NORM": norm, "RULE": "up", "stride_c": 1, "ROWS": max(2048 // cols, 1), "COLS": cols, **fixed}
            yield f"rows {norm} {C}", compile_for_hopper(
                _rows_kernel, {"x_ptr": "*bf16", "eps": "fp32", **weight, **sizes},
                constants if weight else {**constants, "weight_ptr": None}, 4 if C <= 4096 else 8)
        yield "transpose", compile_for_hopper(
            _transpose_kernel, {"q_ptr": q, "factor_ptr": "*fp32", "out_ptr": q, "R": "i32", "C": "i32"},
            {"HAS_FACTOR": True, "BLOCK_R": 64, "BLOCK_C": 256, **fixed}, 8)

    fp8, bf16, fp32 = "*fp8e4nv", "*bf16", "*fp32"
    for F in (768, 2048, 11008):
        constants = {"BLOCK": min(power_of_two_from(F), 4096)}
        yield f"swiglu {F}", compile_for_hopper(
            _swiglu_kernel, {"h_ptr": bf16, "a_q_ptr": fp8, "a_scale_ptr": fp32, "h_q_ptr": fp8, "h_scale_ptr": fp32,
                             "F": "i32"}, constants, 8)
        yield f"swiglu backward {F}", compile_for_hopper(
            _swiglu_backward_kernel, {"h_ptr": fp8, "h_scale_ptr": fp32, "da_ptr": bf16, "q_ptr": fp8,
                                      "scale_ptr": fp32, "F": "i32"}, constants, 8)
    table, strides = {"cos_ptr": fp32, "sin_ptr": fp32}, {f"stride_{axis}": "i32" for axis in "bth"}
    yield "rope", compile_for_hopper(
        _rope_kernel, {"x_ptr": bf16, **table, "R": "i32", "T": "i32", "pairs": "i32", **strides},
        {"HALF": 64, "ROWS": 2, "PAIRS": 1024}, 4)
    gradients = {f"{x}_ptr": bf16 for x in ("dq", "dk", "dv")}
    strides = {f"{x}_{axis}": "i32" for x in ("dq", "dk", "dv") for axis in "bth"}
    sizes = {name: "i32" for name in ("R", "T", "pairs", "kv_pairs")}
    for width, kv_width in ((2048, 2048), (2048, 512), (512, 128)):
        yield f"rope backward {width} {kv_width}", compile_for_hopper(
            _rope_backward_kernel, {**gradients, **table, "q_ptr": fp8, "scale_ptr": fp32, **sizes, **strides},
            {"HALF": 64, "ROWS": max(1024 // width, 1), "PAIRS": width, "KV_PAIRS": kv_width}, 4)

    numbers = {name: "fp32" for name in _adamw_kernel.arg_names if name not in ("N", "K")}
    pointers = {f"{name}_ptr": "*fp32" for name in ("p", "g", "m", "v", "scale")}
    constants = {"BLOCK_N": 64, "BLOCK_K": 64}
    types = {**numbers, **pointers, "w_ptr": "*fp8e4nv", "w_t_ptr": "*fp8e4nv", "N": "i32", "K": "i32"}
    types = {name: kind for name, kind in types.items() if name not in constants}
    yield "adamw", compile_for_hopper(_adamw_kernel, types, constants, 8)


def compile_all(folder):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, __file__], capture_output=True, text=True, timeout=300,
                          env={**environment, "PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(folder)})


BESIDE = {"test_all_kernels_compile": compile_all}


def test_all_kernels_compile_for_hopper_and_fit_into_its_shared_memory(beside):
    pytest.importorskip("triton")
    done = beside["test_all_kernels_compile"].result()
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    used = {line.rsplit(" ", 1)[0]: int(line.rsplit(" ", 1)[1]) for line in done.stdout.splitlines()}
    assert len(used) > 40
    assert {name: n for name, n in used.items() if n > SHARED_MEMORY} == {}


def launch_at_ragged_shapes(device):
    """Every kernel, at shapes that leave parts of their tiles outside; -> how many launches."""
    import torch

    import gemm_kernel as gk
    import microscale as ms
    from autoscale import adamw_triton
    from fp8_formats import E4M3, E5M2
    from microscale import ALL

    def random(*shape, dtype=torch.bfloat16):
        return torch.randn(*shape, device=device, dtype=dtype)

    def fp8(*shape):
        return torch.empty(*shape, device=device, dtype=E4M3.dtype)
    launches, scale = 0, torch.full((1, 1), 0.01, device=device)
    for (R, C), fmt in itertools.product(((33, 160), (7, 1), (64, 300)), (E4M3, E5M2)):
        x = random(R, C)
        for z, (block, rule) in itertools.product((x, random(C, R).t()), (((1, 32), "floor"), ((1, 128), "fp32"))):
            ms.quantize_triton(z, fmt, block, rule)
        ms.quantize_triton(x, fmt, (ALL, ALL), "fp32", scale, both=True)
        for kind in ms.NORMS:
            q = ms.norm_rows_triton(x, kind, random(C) if kind == "rms" else None, fmt)
        for factor in (None, q.scale / q.scale.max()):
            ms.transpose_triton(q.data, factor, fmt)
        p, g, m, v = (random(R, C, dtype=torch.float32).abs() for _ in range(4))
        adamw_triton(p, g, m, v, fp8(R, C), fp8(C, R), scale, 1e-3, (0.9, 0.95), 1e-8, 0.1, 3)
        launches += 11
    for R, ffn in ((7, 1), (5, 48), (2, 4100)):
        _, h = ms.swiglu_rows_triton(random(R, 2 * ffn))
        ms.swiglu_backward_triton(h, random(R, ffn))
        launches += 2
    for B, T, heads, kv_heads, head_dim in ((1, 1, 1, 1, 6), (2, 5, 4, 2, 16), (1, 3, 33, 33, 64), (2, 17, 32, 8, 128)):
        angles = torch.randn(2, T, head_dim // 2, device=device).unbind()
        ms.rope_triton_(random(B, T, heads, head_dim), *angles)
        ms.rope_backward_triton(random(B, T, heads, head_dim), random(B, T, kv_heads, head_dim),
                                random(B, T, kv_heads, head_dim), *angles)
        launches += 2
    large = ((2181, 4104, 2320), (1290, 1304, 272)) if device == "cuda" else ()   # for the largest tiles
    for (M, N, K), (name, (_, _, _, promote)) in itertools.product(
            ((1, 1, 16), (130, 200, 272), (129, 264, 2320), *large), gk.VARIANTS.items()):
        a, b = gk.operands(M, N, K, name, device)
        for dtype, add in ((torch.bfloat16, None), (torch.float32, random(M, N, dtype=torch.float32))):
            gk.matmul_triton(a, b, dtype, promote, add)
            launches += 1
    return launches


@pytest.mark.gpu
@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="compute-sanitizer is not installed")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_no_kernel_leaves_its_tensors_or_races(tool):
    environment = {**os.environ, "PYTHONPATH": str(ROOT),
                   "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}   # each tensor an allocation of its own, with an end
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "7", sys.executable, __file__, "cuda"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert re.search(r"^\d{3} launches$", done.stdout, re.MULTILINE)


if __name__ == "__main__" and sys.argv[1:] in (["cuda"], ["cpu"]):
    print(launch_at_ragged_shapes(sys.argv[1]), "launches")
elif __name__ == "__main__":
    for kernel_name, compile_it in all_kernels():
        print(kernel_name, compile_it().metadata.shared)
