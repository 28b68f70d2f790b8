"""Every kernel compiles for Hopper and fits into its shared memory, for which no GPU is needed. On a GPU, no
kernel reads or writes where it should not."""

import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parent.parent
SHARED_MEMORY = 232_448   # bytes that a program can have on compute capability 9.0

TRAINING = {   # multiples of 16, which take every tile of the product, and every number of warps
    "rows": [(16, 768), (16, 4096), (16, 11008)], "ffns": [(1, 768), (1, 2048), (1, 11008)],
    "heads": [(1, 16, 32, 32, 128), (1, 16, 32, 8, 128), (1, 16, 8, 2, 128)],
    "products": [(64, 64, 128), (128, 256, 128), (256, 256, 128), (256, 512, 128)]}
RAGGED = {     # parts of tiles are outside of the tensors
    "rows": [(33, 160), (7, 1), (64, 300)], "ffns": [(7, 1), (5, 48), (2, 4100)],
    "heads": [(1, 1, 1, 1, 6), (2, 5, 4, 2, 16), (1, 3, 33, 33, 64), (2, 17, 32, 8, 128)],
    "products": [(1, 1, 16), (130, 200, 272), (129, 264, 2320), (2181, 4104, 2320), (1290, 1304, 272)]}


def launch_every_kernel(device, rows, ffns, heads, products):
    """Launch every kernel through its wrapper at these sizes."""
    import gemm_kernel as gk
    import microscale as ms
    from autoscale import adamw_triton
    from fp8_formats import E4M3, E5M2, FORMATS
    from microscale import ALL

    def random(*shape, dtype=torch.bfloat16):
        return torch.randn(*shape, device=device, dtype=dtype)

    scale = torch.full((1, 1), 0.01, device=device)
    for (R, C), fmt in itertools.product(rows, (E4M3, E5M2)):
        x, p, g, m, v = random(R, C), *(random(R, C, dtype=torch.float32).abs() for _ in range(4))
        for z in (p, random(C, R).t()):
            ms.quantize_triton(z, fmt, (1, 32), "floor")
            ms.quantize_triton(z, fmt, (1, 128), "fp32")
            ms.quantize_triton(z, fmt, (ALL, ALL), "fp32", scale)
        for kind in ms.NORMS:
            q = ms.quantize_norm_triton(x, kind, random(C) if kind == "rms" else None, fmt)
        for factor in (None, q.scale):
            ms.transpose_triton(q.data, factor)
        w, w_t = (torch.empty(shape, device=device, dtype=E4M3.dtype) for shape in ((R, C), (C, R)))
        adamw_triton(p, g, m, v, w, w_t, scale, 1e-3, (0.9, 0.95), 1e-8, 0.1, 3)
        for other in FORMATS.values():
            ms.quantize_triton(x, other, (1, 32), "up")
    for R, ffn in ffns:
        _, h = ms.quantize_swiglu_triton(random(R, 2 * ffn))
        ms.quantize_swiglu_gradient_triton(h, random(R, ffn))
        _, h = ms.quantize_swiglu_triton(random(R, 2 * ffn), random(R, dtype=torch.float32))
        ms.quantize_swiglu_gradient_triton(h, random(R, ffn), random(R, dtype=torch.float32))
        choices = torch.arange(3 * R, device=device).view(R, 3) % R
        for add in (None, random(R, ffn)):
            ms.combine_triton(random(R, ffn), choices, add)
    for B, T, n, kv, dim in heads:
        angles = torch.randn(2, T, dim // 2, device=device).unbind()
        qkv = random(B, T, n + 2 * kv, dim)
        for out in (qkv[:, :, :n], qkv[:, :, n:n + kv]):
            ms.rope_triton(out, random(*out.shape), *angles)
    ways = [("group", False, torch.bfloat16, False), ("mx", False, torch.bfloat16, False),
            *itertools.product(["moss"], (False, True), (torch.bfloat16, torch.float32), (False, True))]
    for (M, N, K), (recipe, promote, dtype, add) in itertools.product(products, ways):
        a, b = gk.operands(M, N, K, recipe, device)
        gk.matmul_triton(a, b, dtype, promote, random(M, N, dtype=dtype) if add else None)
    a = ms.quantize_reference(random(M, K), E5M2, (1, ALL), "up")
    out = torch.zeros(M * N + 1, device=device)[1:].view(M, N)   # where TMA cannot write
    gk.matmul_triton(a, b, promote=True, add=out, out=out)
    first, of_tile = [0, 128, 128, 512], [0, 2, 2, 2, 2]   # a group of one tile, an empty one, unused rows
    groups = gk.Groups(*(torch.tensor(x, device=device, dtype=torch.int32) for x in (first, of_tile)))
    for N, K in ((256, 144), (1024, 2048)):
        x, dy = (ms.quantize_reference(random(640, n), E4M3, (1, ALL), "up") for n in (K, N))
        w = ms.quantize_reference(random(3 * N, K), E4M3, (N, ALL), "up")
        gk.matmul_triton(x, w, promote=False, groups=groups, way="fprop")
        w_t = ms.Quantized(ms.transpose_triton(w.data), w.scale.t().contiguous(), (ALL, N))
        gk.matmul_triton(dy, w_t, promote=True, groups=groups, way="dgrad")
        out = torch.zeros(3 * N, K, device=device)
        dy_t, x_t = (ms.Quantized(ms.transpose_triton(q.data), scale, (ALL, ALL)) for q in (dy, x))
        gk.matmul_triton(dy_t, x_t, promote=True, add=out, out=out, groups=groups, way="wgrad")
    print("all kernels were launched")


def compile_instead_of_launching():
    """Make Triton compile for Hopper what it would launch, and print names and bytes of shared memory."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver, jit
    driver.set_active(SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32),
                                      get_current_device=lambda: 0, get_current_stream=lambda _: 0))
    run = jit.JITFunction.run

    def compile_only(kernel, *args, **options):
        print(kernel.__name__, run(kernel, *args, **{**options, "warmup": True}).metadata.shared)
    jit.JITFunction.run = compile_only


def compile_all(folder):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, __file__], capture_output=True, text=True, timeout=300,
                          env={**environment, "PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(folder)})


BESIDE = {"test_all_kernels_compile": compile_all}


def test_all_kernels_compile_for_hopper_and_fit_into_its_shared_memory(beside):
    pytest.importorskip("triton")
    done = beside["test_all_kernels_compile"].result()
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    code = "".join(path.read_text("utf-8") for path in ROOT.glob("*.py"))
    used = re.findall(r"^(_\w+_kernel) (\d+)$", done.stdout, re.MULTILINE)
    assert {name for name, _ in used} == set(re.findall(r"def (_\w+_kernel)\(", code))
    assert max(int(n) for _, n in used) <= SHARED_MEMORY


@pytest.mark.gpu
@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="compute-sanitizer is not installed")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_no_kernel_leaves_its_tensors_or_races(tool):
    # each tensor becomes an allocation of its own, with an end
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "7", sys.executable, __file__, "cuda"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    # racecheck reports a kernel of PyTorch's as well, the reduction behind amax
    of_pytorch = re.findall("Error: Race reported between .* at void at::native::reduce_kernel", done.stdout)
    shown = int(re.search(r"(\d+) (?:hazards? displayed|errors?)", done.stdout.rpartition("SUMMARY")[2])[1])
    assert shown == len(of_pytorch), done.stdout[-3000:] + done.stderr[-3000:]
    assert done.returncode == 7 * (shown > 0) and "all kernels were launched" in done.stdout


if __name__ == "__main__" and "cuda" in sys.argv:
    launch_every_kernel("cuda", **RAGGED)
elif __name__ == "__main__":
    compile_instead_of_launching()
    launch_every_kernel("cpu", **TRAINING)
