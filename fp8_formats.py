"""
What an 8-bit float is (and a 6-bit, a 4-bit, and the 8-bit integer they compete with).

A format is a short list of numbers, its *grid*. This file says which numbers those are, how a value is
rounded to one of them, and which bits stand for it:

    value  --round_to_format-->  nearest grid value  --encode-->  uint8 code  --decode-->  grid value

All arithmetic here is exact except the one rounding. It takes only two kinds of operation: multiplying by a
power of two, and integer arithmetic on bits. Nothing calls log2(), because it rounds, too: just below 8 it
returns 3.0 in float32. One wrong exponent turns a value that fits into one that overflows.

`moss` calls `cast` (`round_to_format`, but fast), `uncast`, `pow2` and `floor_log2`; the rest explains.

Sources: OCP Microscaling Formats (MX) v1.0 for the formats; arXiv:2209.05433 for E4M3 and E5M2.

    $ python fp8_formats.py                     # the formats, their grids and their errors, as tables
    $ python fp8_formats.py --plot errors.png   # the last table as a picture (needs matplotlib)
"""
import argparse
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

# ---------------------------------------------------------------------------------------------------
# Formats as data. A code is sign | exponent field | fraction, and means
#     ± 1.fraction · 2^(field - bias)    field > 0: a normal number, mantissa_bits + 1 significant bits
#     ± 0.fraction · 2^(1 - bias)        field = 0: a subnormal number, a fixed step down to zero
# A binade [2^e, 2^(e+1)) holds the values of one exponent. To saturate is to become the largest value.

@dataclass(frozen=True)
class Format:
    name: str
    exponent_bits: int
    mantissa_bits: int             # stored fraction bits; a normal number has one more, the hidden leading 1
    bias: int
    emax: int                      # exponent of the largest finite value
    has_inf: bool = False
    has_nan: bool = False
    twos_complement: bool = False  # how a negative code is written; floats use a sign bit
    dtype: torch.dtype | None = None

    bits = property(lambda self: 1 + self.exponent_bits + self.mantissa_bits)
    emin = property(lambda self: 1 - self.bias)   # exponent of the smallest normal value, of subnormals too

    @property
    def max(self):
        """Largest finite value. E4M3 gives up 480, its very last code, to NaN."""
        steps_below_2 = 2 if self.has_nan and not self.has_inf else 1
        return (2 - steps_below_2 * 2.0**-self.mantissa_bits) * 2.0**self.emax

    min_normal = property(lambda self: 2.0**self.emin)
    min_subnormal = property(lambda self: 2.0 ** (self.emin - self.mantissa_bits))   # and their step


E5M2 = Format("E5M2", 5, 2, bias=15, emax=15, has_inf=True, has_nan=True, dtype=torch.float8_e5m2)
E4M3 = Format("E4M3", 4, 3, bias=7, emax=8, has_nan=True, dtype=torch.float8_e4m3fn)
E3M2 = Format("E3M2", 3, 2, bias=3, emax=4)
E2M3 = Format("E2M3", 2, 3, bias=1, emax=2)
E2M1 = Format("E2M1", 2, 1, bias=1, emax=2)
# MXINT8 is n / 64 for integers n. This uniform grid is a float "E1M6", with subnormals in [0, 1) and one
# binade [1, 2) of the same step, so every function below serves it, too. The grid is symmetric, -127..127:
# the code of -128 decodes to -2, and nothing rounds to it.
INT8 = Format("INT8", 1, 6, bias=1, emax=0, twos_complement=True)
FORMATS = {fmt.name.lower(): fmt for fmt in (E5M2, E4M3, E3M2, E2M3, E2M1, INT8)}


def format_of(data):
    """Return the Format of an FP8 tensor, which its dtype tells. TypeError for any other dtype."""
    for fmt in (E4M3, E5M2):
        if data.dtype == fmt.dtype:
            return fmt
    raise TypeError(f"expected a float8_e4m3fn or float8_e5m2 tensor, got {data.dtype}")

# ---------------------------------------------------------------------------------------------------
# Exponents, exactly

EXPONENT_OF_ZERO = -(1 << 14)  # below every exponent, as log2(0) = -Inf, yet safe to add to and subtract from
EXPONENT_OF_INF = 1 << 14      # above every exponent; stands for NaN as well


def _widen(x):
    """Convert float16 and bfloat16 to float32, without loss; float32 and float64 stay. Else TypeError."""
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise TypeError(f"expected a float16, bfloat16, float32 or float64 tensor, got {x.dtype}")
    return x if x.dtype == torch.float64 else x.float()


def floor_log2(x):
    """Return floor(log2|x|) as int32, exact for every finite x, subnormals included. 0 gives
    EXPONENT_OF_ZERO, Inf and NaN give EXPONENT_OF_INF, so that a clamp() after it does what one expects."""
    x = _widen(x)
    exponent = torch.frexp(x).exponent - 1  # frexp: |x| = m · 2^e with 0.5 <= m < 1
    return exponent.masked_fill(x == 0, EXPONENT_OF_ZERO).masked_fill(~x.isfinite(), EXPONENT_OF_INF)


def pow2(exponent):
    """Return 2^exponent as float32 for an int tensor, exact from 2^-149 to 2^127; below 0, above Inf."""
    e = exponent.to(torch.int32).clamp(-150, 128)
    normal = (e + 127) << 23                          # the exponent field alone; 128 lands on the code of Inf
    subnormal = (1 << (e + 150).clamp(max=24)) >> 1   # the one bit worth 2^e; -150 shifts it out, to 0
    return torch.where(e < -126, subnormal, normal).view(torch.float32)


# ---------------------------------------------------------------------------------------------------
# E8M0: a block scale that is all exponent. 2^-127 .. 2^127 and NaN; no sign, no zero, no Inf.

def e8m0_encode(exponent):
    """Clamp int exponents to [-127, 127] and return their uint8 codes, exponent + 127 (never 0xFF)."""
    return (exponent.clamp(-127, 127) + 127).to(torch.uint8)


def e8m0_decode(codes):
    """Return the float32 powers of two of uint8 codes: of 0 2^-127, subnormal in float32, and of 0xFF NaN."""
    return pow2(codes.to(torch.int32) - 127).masked_fill(codes == 0xFF, torch.nan)


# ---------------------------------------------------------------------------------------------------
# Rounding

def _round_units(units, rounding, generator):
    """Round a float tensor >= 0 to integers."""
    if rounding == "nearest_even":
        return units.round()
    floor = units.floor()
    fraction = units - floor  # exact. floor(units + 0.5) would not be: 0.49999997 + 0.5 is 1 in float32
    if rounding == "half_away":
        return floor + (fraction >= 0.5)
    if rounding == "stochastic":  # up with probability `fraction`, so right on average (to 2^-24 of a step)
        uniform = torch.rand(units.shape, dtype=units.dtype, device=units.device, generator=generator)
        return floor + (uniform < fraction)
    raise ValueError(f"rounding must be 'nearest_even', 'half_away' or 'stochastic', got {rounding!r}")


@torch.no_grad()
def round_to_format(x, fmt, rounding="nearest_even", saturate=True, generator=None):
    """Round every element of x to a value of fmt's grid. Shape and dtype stay: all the grids fit in float16
    and in bfloat16, so rounding happens once, from any of the four dtypes.

    Overflow is decided after rounding, as if the top binade went on: in E4M3 the tie 464 goes to 448, 14 x 32
    (14 is even), while 465 goes to 480 and overflows. Overflowing values, Inf included, become
        ±max    if saturate, or if the format has neither Inf nor NaN
        ±Inf    else, in E5M2
        NaN     else, in E4M3
    NaN stays NaN in every format (encode() objects where there is no code for it). Zeros keep their sign.
    """
    wide = _widen(x)
    # Below emin the step stops shrinking, which is all that a subnormal is; above emax it stops growing.
    exponent = floor_log2(wide).clamp(fmt.emin, fmt.emax)
    step = exponent - fmt.mantissa_bits  # the grid around x is the multiples of 2^step
    units = wide.abs() * pow2(-step)     # exact: only large values are scaled down, so none underflows
    rounded = _round_units(units, rounding, generator) * pow2(step)

    overflow = fmt.max
    if not saturate and fmt.has_nan:
        overflow = torch.inf if fmt.has_inf else torch.nan
    rounded = rounded.masked_fill(rounded > fmt.max, overflow)
    return torch.copysign(rounded, wide).to(x.dtype)


@torch.no_grad()
def cast(x, fmt):
    """Cast x to fmt.dtype, the fast way: round to nearest even, saturate, keep NaN. Bit for bit
    round_to_format(x, fmt).to(fmt.dtype). Raises ValueError for formats other than E4M3 and E5M2."""
    if fmt.dtype is None:
        raise ValueError(f"torch has no dtype for {fmt.name}: use round_to_format() or encode()")
    if x.dtype == torch.float64:  # torch would round twice, to float32 first: 1.0625 + 2^-40 -> 1.0625 -> 1
        x = round_to_format(x, fmt)
    # Without the clamp, overflow depends on the PyTorch build: E4M3 gives 448 or NaN, E5M2 gives Inf.
    return x.clamp(-fmt.max, fmt.max).to(fmt.dtype)


@torch.no_grad()
def uncast(q, dtype=torch.float32):
    """Convert FP8, and int8 as INT8, exactly. On a CPU a table of all codes takes a third of torch's time."""
    if q.dtype == torch.int8:
        return q.to(dtype) * INT8.min_subnormal
    if q.device.type != "cpu" or q.dtype not in (torch.float8_e4m3fn, torch.float8_e5m2):
        return q.to(dtype)
    values = torch.arange(256, dtype=torch.uint8, device="cpu").view(q.dtype).to(dtype)
    return values.index_select(0, q.reshape(-1).view(torch.uint8).int()).view(q.shape)


# ---------------------------------------------------------------------------------------------------
# Codes. Read as integers, the positive codes count the grid upwards: first the subnormal steps, then the
# normal values, without a gap. (What comes after max is Inf or NaN.)

def encode(x, fmt, rounding="nearest_even", saturate=True, generator=None):
    """Round x and return its codes: uint8, same shape, one code a byte (6- and 4-bit codes in the low bits).
    NaN becomes the all-ones code; a format without NaN raises ValueError. INT8 has one zero: -0 becomes 0."""
    value = round_to_format(_widen(x), fmt, rounding, saturate, generator)
    is_nan = value.isnan()
    if not fmt.has_nan and is_nan.any():
        raise ValueError(f"{fmt.name} has no code for NaN: mask NaNs, or mark the block's E8M0 scale 0xFF")
    # Inf takes the place of the next power of two after max, which is the code that follows max's.
    magnitude = value.abs().clamp(max=2.0 ** (fmt.emax + 1)).masked_fill(is_nan, 0)
    exponent = floor_log2(magnitude).clamp(min=fmt.emin)
    units = (magnitude * pow2(fmt.mantissa_bits - exponent)).to(torch.int32)
    # `units` includes the hidden 1, which adds 1 to the exponent field: emin gets field 1, subnormals 0.
    code = ((exponent - fmt.emin) << fmt.mantissa_bits) + units
    code = code.masked_fill(is_nan, (1 << (fmt.bits - 1)) - 1)
    if fmt.twos_complement:
        return (torch.where(value.signbit(), -code, code) & 0xFF).to(torch.uint8)
    return (code + (value.signbit().int() << (fmt.bits - 1))).to(torch.uint8)


def decode(codes, fmt):
    """Return the float32 values of uint8 codes, exactly. Bits above the format's width are ignored."""
    if codes.dtype != torch.uint8:
        raise TypeError(f"expected uint8 codes, got {codes.dtype}")
    if fmt.twos_complement:
        return codes.view(torch.int8).float() * fmt.min_subnormal
    codes = codes.to(torch.int32)
    field = (codes >> fmt.mantissa_bits) & ((1 << fmt.exponent_bits) - 1)
    fraction = codes & ((1 << fmt.mantissa_bits) - 1)
    units = fraction + ((field > 0).int() << fmt.mantissa_bits)  # a normal number's hidden leading 1
    magnitude = units * pow2(field.clamp(min=1) - fmt.bias - fmt.mantissa_bits)
    # Codes past max: in E5M2 fraction 00 is Inf and the others are NaN; in E4M3 there is only 111.
    special = magnitude > fmt.max
    magnitude = magnitude.masked_fill(special, torch.inf).masked_fill(special & (fraction != 0), torch.nan)
    negative = (codes >> (fmt.bits - 1)) & 1
    return torch.where(negative == 1, -magnitude, magnitude)


def grid(fmt):
    """Return the finite values >= 0 of a format, ascending, float32, by decoding every code."""
    values = decode(torch.arange(1 << fmt.bits, dtype=torch.uint8, device="cpu"), fmt)
    return values[values.isfinite() & ~values.signbit()].sort().values


# ---------------------------------------------------------------------------------------------------
# What `python fp8_formats.py` shows

def relative_error(fmt, k):
    """Return the RMS of |x - round(x)| / x over evenly spaced x in max·[2^-(k+1), 2^-k]."""
    x = fmt.max * 2.0**-k * torch.linspace(0.5, 1, 4096, dtype=torch.float64, device="cpu")
    return ((round_to_format(x, fmt) - x) / x).square().mean().sqrt().item()


def print_formats():
    special = {"E5M2": "Inf S.11111.00, NaN S.11111.{01,10,11}", "E4M3": "NaN S.1111.111"}
    print("format  bits  bias  emax      max  min normal  min subnormal  values >= 0  special codes")
    for fmt in FORMATS.values():
        print(f"{fmt.name:6}{fmt.bits:6}{fmt.bias:6}{fmt.emax:6}{fmt.max:9.6g}{f'2^{fmt.emin}':>12}"
              f"{f'2^{fmt.emin - fmt.mantissa_bits}':>15}{len(grid(fmt)):13}  {special.get(fmt.name, '-')}")
    print("-> A bit moved from the fraction to the exponent nearly squares the range (max / min subnormal:\n"
          "   2^18 in E4M3, 2^32 in E5M2) and doubles the spacing. The number of values hardly changes.\n")


def print_grids():
    print("E2M1, every value >= 0:", *(f"{v:g}" for v in grid(E2M1).tolist()), end="\n\n")
    print("E4M3          spacing   values")
    values = grid(E4M3)
    for e in (-7, -6, -5, -1, 0, 1, 7, 8):  # -7: the subnormals
        inside = values[floor_log2(values).clamp(min=-7) == e]
        spacing = max(e, E4M3.emin) - E4M3.mantissa_bits
        units = " ".join(f"{int(v):2}" for v in inside * 2.0**-spacing)
        binade = "subnormal" if e < E4M3.emin else f"[2^{e}, 2^{e + 1})"
        print(f"{binade:14}2^{spacing:<8}{units:23} · 2^{spacing:<3} = {inside[0]:g} .. {inside[-1]:g}")
    print("-> Each binade holds the same 8 multiples of a spacing that doubles from one to the next.\n"
          "   Subnormals go on with the first one's spacing. 15·2^5 = 480 is missing: its code is NaN's.\n")


def print_errors():
    columns = (E4M3, E5M2, INT8)
    print("RMS relative error of values around max·2^-k")
    print("   k" + "".join(f"{fmt.name:>9}" for fmt in columns))
    for k in (0, 1, 2, 4, 6, 8, 13, 14, 15, 16, 17, 18, 20, 28, 29, 30, 31, 32, 34):
        print(f"{k:4}" + "".join(f"{relative_error(fmt, k):9.2%}" for fmt in columns))
    print("-> Scaling by a power of two moves a value along its column. INT8 gains a bit with every step.\n"
          "   A float gains nothing while it is normal: it has an exponent of its own. It is rescued where\n"
          "   it would be subnormal: to a float, power-of-two scales add range, not precision.")


@contextmanager
def picture(path, **labels):
    """Give matplotlib's axes, saved after the `with`: gray on transparent, for light and dark pages."""
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("--plot needs matplotlib: pip install matplotlib")
    matplotlib.use("Agg")  # draws to files, needs no display
    from matplotlib import pyplot
    gray = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    pyplot.rcParams.update({**dict.fromkeys(gray, "#808080"), "legend.framealpha": 0, "savefig.dpi": 150,
                            "savefig.transparent": True, "savefig.bbox": "tight"})
    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    if Path(path).suffix[1:] not in figure.canvas.get_supported_filetypes():
        raise SystemExit(f"--plot {path}: no picture can be written under this name, let it end in .png")
    axes.set(**labels)
    yield axes
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)
    print(f"wrote {path}")


def plot_errors(path):
    title = "Floats keep their precision until they are subnormal, integers lose a bit a binade"
    with picture(path, yscale="log", xlabel="k, for values around max · 2^-k", ylabel="RMS relative error",
                 title=title) as axes:
        axes.yaxis.set_major_formatter(lambda y, _: f"{y:.0%}")
        for fmt in FORMATS.values():
            errors = [relative_error(fmt, k) for k in range(36)]
            errors = [e for e in errors if e < 1] + [1]  # stop where every value is rounded to zero
            axes.plot(errors, marker="o", markersize=3, label=fmt.name)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="What an 8-bit float is.")
    parser.add_argument("--plot", metavar="FILE.png", help="also draw the relative errors (needs matplotlib)")
    args = parser.parse_args()
    print_formats()
    print_grids()
    print_errors()
    if args.plot:
        plot_errors(args.plot)
