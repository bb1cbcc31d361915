"""Shared by the tests: paths, bfloat16 in numpy, and a paged cache."""

import pathlib

import numpy
import pytest

TREE = pathlib.Path(__file__).resolve().parents[2]
MODEL = str(TREE / "models" / "tiny-shakespeare")
V4_FLASH = str(TREE / "configs" / "v4-flash.json")

# Unit roundoffs: relative error of one rounding.
F32 = 2.0**-24
BF16 = 2.0**-8


def to_bf16(values):
    """The bits of the nearest bfloat16, ties to even, as uint16 (finite values)."""
    bits = numpy.asarray(values, dtype=numpy.float32).view(numpy.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(numpy.uint16)


def from_bf16(bits):
    return (bits.astype(numpy.uint32) << 16).view(numpy.float32)


def gamma(terms):
    """Relative error of a sum of so many terms in float32."""
    return terms * F32 / (1 - terms * F32)


def assert_within(given, expected, bound):
    """|given - expected| <= bound everywhere; shows the worst element."""
    given, expected = numpy.asarray(given, float), numpy.asarray(expected, float)
    with numpy.errstate(invalid="ignore"):  # of equal infinities
        error = numpy.where(given == expected, 0, numpy.abs(given - expected))
    excess = error / numpy.maximum(bound, 1e-30)
    worst = numpy.unravel_index(numpy.argmax(numpy.nan_to_num(excess, nan=numpy.inf)), excess.shape)
    what = f"at {worst}: {given[worst]}, expected {expected[worst]}"
    assert excess[worst] <= 1, f"{what}, {excess[worst]:.3g} times the bound"


@pytest.fixture
def rng():
    return numpy.random.default_rng(7)
