"""Every kernel compiles for Hopper and fits into its shared memory, for which no GPU is needed. On a GPU, no
kernel reads or writes where it should not."""

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
    """Return a function that compiles the kernel. An argument is in `constants`, or has a type in `types`, or
    is an int32. Pointers and sizes are taken to be multiples of 16, as they are in training."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile
    signature = {arg: "constexpr" if arg in constants else types.get(arg, "i32") for arg in kernel.arg_names}
    attributes = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values())
                  if kind == "i32" or kind.startswith("*")}
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": warps, "num_stages": stages}
    return lambda: compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def gemm(tile, mode, add, out, fp8="fp8e4nv", tma=True):
    """Return a function that compiles the product; mode: "fast", "promoted", or K per scale in the loop."""
    from gemm_kernel import _gemm_kernel
    BLOCK_M, BLOCK_N, warps, stages, _ = tile
    in_loop = isinstance(mode, int)
    BLOCK_K, quarters = mode if in_loop else 128, BLOCK_N == 256 and (add or out == "fp32")
    types = {"a_desc": f"tensordesc<{fp8}[{BLOCK_M}, {BLOCK_K}]>",
             "b_desc": f"tensordesc<fp8e4nv[{BLOCK_N}, {BLOCK_K}]>",
             "c_desc": f"tensordesc<{out}[{BLOCK_M}, {BLOCK_N // (4 if quarters else 2)}]>",
             "c_ptr": f"*{out}", "add_ptr": "*bf16", "a_scale_ptr": "*fp32", "b_scale_ptr": "*fp32"}
    constants = {"BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N, "BLOCK_K": BLOCK_K, "PROGRAMS": 132,
                 "IN_LOOP": in_loop, "PROMOTE": 16 if mode == "promoted" else 0, "A_PER_ROW": 1,
                 "B_ROWS": 128 if mode == 128 else 1, "ADD": add, "TMA_STORE": tma, "QUARTERS": quarters,
                 "FLATTEN": mode == "fast"}
    constants |= {name: None for name, given in (("c_desc", tma), ("add_ptr", add)) if not given}
    return compile_for_hopper(_gemm_kernel, types, constants, warps, stages)


def all_kernels():
    """Yield (name, function that compiles it) of all kernels, as their wrappers launch them."""
    from autoscale import _adamw_kernel
    from gemm_kernel import tile_shape
    from microscale import (NORMS, _quantize_kernel, _rope_kernel, _rows_kernel, _swiglu_backward_kernel,
                            _swiglu_kernel, _transpose_kernel, power_of_two_from)
    tiles, outs = [tile_shape(M, M, 132) for M in (8192, 2048, 1280, 512)], ("bf16", "fp32")
    assert len({tile[:2] for tile in tiles}) == 4
    for tile, mode, add, out in itertools.product(tiles, ("fast", "promoted"), (False, True), outs):
        yield f"gemm {tile} {mode} {add} {out}", gemm(tile, mode, add, out)
    for K in (32, 128):
        yield f"gemm in loop {K}", gemm(tile_shape(512, 512, 132, in_loop=True), K, False, "bf16")
    yield "gemm E5M2", gemm(tiles[0], "promoted", False, "bf16", fp8="fp8e5")
    yield "gemm without TMA stores", gemm(tiles[0], "promoted", True, "fp32", tma=False)

    for q in ("*fp8e4nv", "*fp8e5"):
        fixed, pointers = {"IS_E4M3": q == "*fp8e4nv"}, {"q_ptr": q, "scale_ptr": "*fp32"}
        launches = ("given", 64, 128), ("fp32", 16, 256)
        for x, (rule, rows, cols) in itertools.product(("*bf16", "*fp32"), launches):
            constants = {"GROUP": 128, "RULE": rule, "ROWS": rows, "COLS": cols, "AS_E8M0": False,
                         "stride_c": 1, **fixed}
            yield f"quantize {q} {x} {rule}", compile_for_hopper(
                _quantize_kernel, {"x_ptr": x, **pointers}, constants, 4)
        for norm, C in itertools.product(NORMS, (768, 4096, 11008)):
            cols = power_of_two_from(C)
            constants = {"NORM": norm, "RULE": "up", "COLS": cols, "ROWS": max(2048 // cols, 1),
                         "stride_c": 1, **({} if norm == "rms" else {"weight_ptr": None}), **fixed}
            types = {"x_ptr": "*bf16", "weight_ptr": "*bf16", "eps": "fp32", **pointers}
            yield f"rows {q} {norm} {C}", compile_for_hopper(
                _rows_kernel, types, constants, 4 if C <= 4096 else 8)
        yield f"transpose {q}", compile_for_hopper(
            _transpose_kernel, {"q_ptr": q, "factor_ptr": "*fp32", "out_ptr": q},
            {"HAS_FACTOR": True, "BLOCK_R": 64, "BLOCK_C": 256, **fixed}, 8)

    fp8, bf16, fp32 = "*fp8e4nv", "*bf16", "*fp32"
    for F in (768, 2048, 11008):
        constants = {"BLOCK": min(power_of_two_from(F), 4096)}
        types = {"h_ptr": bf16, "a_q_ptr": fp8, "a_scale_ptr": fp32, "h_q_ptr": fp8, "h_scale_ptr": fp32}
        yield f"swiglu {F}", compile_for_hopper(_swiglu_kernel, types, constants, 8)
        types = {"h_ptr": fp8, "h_scale_ptr": fp32, "da_ptr": bf16, "q_ptr": fp8, "scale_ptr": fp32}
        yield f"swiglu backward {F}", compile_for_hopper(_swiglu_backward_kernel, types, constants, 8)
    types = {"out_ptr": bf16, "x_ptr": bf16, "cos_ptr": fp32, "sin_ptr": fp32}
    yield "rope", compile_for_hopper(_rope_kernel, types, {"HALF": 64, "ROWS": 2, "PAIRS": 1024}, 4)

    types = {name: "fp32" for name in _adamw_kernel.arg_names if name not in ("N", "K")}
    types |= {"w_ptr": fp8, "w_t_ptr": fp8, **{f"{name}_ptr": fp32 for name in ("p", "g", "m", "v", "scale")}}
    yield "adamw", compile_for_hopper(_adamw_kernel, types, {"BLOCK_N": 64, "BLOCK_K": 64}, 8)


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
    """Launch every kernel at shapes that leave parts of its tiles outside; return how many launches."""
    import torch

    import gemm_kernel as gk
    import microscale as ms
    from autoscale import adamw_triton
    from fp8_formats import E4M3, E5M2
    from microscale import ALL

    def random(*shape, dtype=torch.bfloat16):
        return torch.randn(*shape, device=device, dtype=dtype)

    launches, scale = 0, torch.full((1, 1), 0.01, device=device)
    for (R, C), fmt in itertools.product(((33, 160), (7, 1), (64, 300)), (E4M3, E5M2)):
        x = random(R, C)
        for z in (x, random(C, R).t()):
            ms.quantize_triton(z, fmt, (1, 32), "floor")
            ms.quantize_triton(z, fmt, (1, 128), "fp32")
        ms.quantize_triton(x, fmt, (ALL, ALL), "fp32", scale)
        for kind in ms.NORMS:
            q = ms.quantize_norm_triton(x, kind, random(C) if kind == "rms" else None, fmt)
        for factor in (None, q.scale / q.scale.max()):
            ms.transpose_triton(q.data, factor)
        p, g, m, v = (random(R, C, dtype=torch.float32).abs() for _ in range(4))
        w, w_t = (torch.empty(shape, device=device, dtype=E4M3.dtype) for shape in ((R, C), (C, R)))
        adamw_triton(p, g, m, v, w, w_t, scale, 1e-3, (0.9, 0.95), 1e-8, 0.1, 3)
        launches += 11
    for R, ffn in ((7, 1), (5, 48), (2, 4100)):
        _, h = ms.quantize_swiglu_triton(random(R, 2 * ffn))
        ms.quantize_swiglu_gradient_triton(h, random(R, ffn))
        launches += 2
    for B, T, heads, dim in ((1, 1, 1, 6), (2, 5, 4, 16), (1, 3, 33, 64), (2, 17, 32, 128)):
        x, angles = random(B, T, heads, dim), torch.randn(2, T, dim // 2, device=device).unbind()
        ms.rope_triton(random(B, T, heads + 3, dim)[:, :, 1:-2], x, *angles)
        launches += 1
    large = ((2181, 4104, 2320), (1290, 1304, 272)) if device == "cuda" else ()   # for the largest tiles
    for (M, N, K), (name, (_, promote)) in itertools.product(
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
    # each tensor becomes an allocation of its own, with an end
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "7", sys.executable, __file__, "cuda"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert re.search(r"^\d{3} launches$", done.stdout, re.MULTILINE)


if __name__ == "__main__" and sys.argv[1:] in (["cuda"], ["cpu"]):
    print(launch_at_ragged_shapes(sys.argv[1]), "launches")
elif __name__ == "__main__":
    for kernel_name, compile_it in all_kernels():
        print(kernel_name, compile_it().metadata.shared)
