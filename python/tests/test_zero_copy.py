"""Arrays are used where they lie: addresses, strides, and what lies between."""

import numpy
import pytest

import dsv4
from conftest import to_bf16
from dsv4 import ops


def test_numpy_addresses():
    array = numpy.arange(24, dtype=numpy.float32).reshape(4, 6)
    assert dsv4.address_of(array) == array.ctypes.data
    assert dsv4.address_of(array[1:, 2:]) == array.ctypes.data + (6 + 2) * 4


@pytest.mark.parametrize("dtype", ["float32", "int32", "int64", "int8", "uint8", "uint16"])
def test_numpy_dtypes(dtype):
    array = numpy.zeros(3, dtype)
    assert dsv4.address_of(array) == array.ctypes.data


@pytest.mark.parametrize("dtype", ["float64", "float16", "int16", "bool", "complex64"])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(dsv4.Error, match="expected float32") as caught:
        dsv4.address_of(numpy.zeros(3, dtype))
    assert caught.value.code == dsv4.ErrorCode.INVALID_ARGUMENT


def test_torch_addresses():
    torch = pytest.importorskip("torch")
    tensor = torch.zeros(4, 6, dtype=torch.bfloat16)
    assert dsv4.address_of(tensor) == tensor.data_ptr()
    assert dsv4.address_of(tensor[1:, 2:]) == tensor[1:, 2:].data_ptr()
    x, weight = torch.randn(3, 64), torch.ones(64)
    out = torch.zeros(3, 64)
    ops.rms_norm(x, weight, out, eps=0)
    torch.testing.assert_close(out, x / x.pow(2).mean(-1, keepdim=True).sqrt())


def test_strides_are_honoured_and_gaps_left_alone(rng):
    wide = rng.standard_normal((5, 100)).astype(numpy.float32)
    weight = rng.standard_normal(64).astype(numpy.float32)
    plain = numpy.empty((5, 64), numpy.float32)
    ops.rms_norm(numpy.ascontiguousarray(wide[:, 10:74]), weight, plain)
    target = numpy.full((10, 80), 77, numpy.float32)
    ops.rms_norm(wide[:, 10:74], weight, target[::2, 8:72])
    assert (target[::2, 8:72] == plain).all()
    target[::2, 8:72] = 77
    assert (target == 77).all()


def test_read_only_outputs_are_refused(rng):
    x = rng.standard_normal((2, 64)).astype(numpy.float32)
    x.flags.writeable = False  # fine for an input, where numpy lends such arrays at all
    out = numpy.zeros((2, 64), numpy.float32)
    out.flags.writeable = False
    with pytest.raises((dsv4.Error, BufferError)):
        ops.rms_norm(numpy.array(x), numpy.ones(64, numpy.float32), out)
    assert (out == 0).all()


def test_distant_innermost_elements_are_refused(rng):
    x = rng.standard_normal((2, 128)).astype(numpy.float32)
    with pytest.raises(dsv4.Error, match="x is .* distant innermost"):
        ops.rms_norm(x[:, ::2], numpy.ones(64, numpy.float32), numpy.zeros((2, 64), numpy.float32))


def test_not_an_array():
    with pytest.raises(dsv4.Error, match="x is of type list"):
        ops.rms_norm([1.0], numpy.ones(1, numpy.float32), numpy.ones((1, 1), numpy.float32))


def test_raw_tensor_keeps_its_owner(rng):
    x = to_bf16(rng.standard_normal((2, 64)))
    out = numpy.zeros((2, 64), numpy.uint16)
    weight = to_bf16(numpy.ones(64))
    ops.rms_norm(x, weight, out)
    raw = dsv4.RawTensor(x.ctypes.data, "bf16", x.shape, (64, 1), "cpu", owner=x)
    del x
    again = numpy.zeros_like(out)
    ops.rms_norm(raw, weight, again)
    assert (again == out).all()
    assert "RawTensor([2, 64] bf16 on cpu)" == repr(raw)
