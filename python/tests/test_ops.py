"""Operations against float64 in numpy, within derived bounds."""

import math

import numpy
import pytest

import dsv4
from conftest import BF16, F32, V4_FLASH, assert_within, from_bf16, gamma, to_bf16
from dsv4 import ops


def test_rms_norm(rng):
    x = to_bf16(rng.standard_normal((7, 512)))
    weight = rng.standard_normal(512).astype(numpy.float32)
    out = numpy.zeros((7, 512), numpy.uint16)
    ops.rms_norm(x, weight, out, eps=1e-6)
    exact = from_bf16(x).astype(float)
    exact = weight * exact / numpy.sqrt((exact**2).mean(-1, keepdims=True) + 1e-6)
    assert_within(from_bf16(out), exact, numpy.abs(exact) * (BF16 + gamma(512 + 8)))


@pytest.mark.parametrize("rows", [1, 5, 33])
def test_linear_f32(rng, rows):
    x = rng.standard_normal((rows, 192)).astype(numpy.float32)
    w = rng.standard_normal((96, 192)).astype(numpy.float32)
    out = numpy.zeros((rows, 96), numpy.float32)
    ops.linear(x, w, out)
    magnitude = numpy.abs(x).astype(float) @ numpy.abs(w).astype(float).T
    assert_within(out, x.astype(float) @ w.astype(float).T, gamma(192 + 2) * magnitude)


def test_linear_bits_do_not_depend_on_the_batch(rng):
    x = to_bf16(rng.standard_normal((40, 256)))
    w = to_bf16(rng.standard_normal((64, 256)))
    together = numpy.zeros((40, 64), numpy.float32)
    ops.linear(x, w, together)
    for begin, end in [(0, 1), (1, 8), (8, 40)]:
        alone = numpy.zeros((end - begin, 64), numpy.float32)
        ops.linear(x[begin:end], w, alone)
        assert (alone == together[begin:end]).all()


def e4m3(code):
    """Value of an OCP E4M3 code, by its definition."""
    sign = -1.0 if code & 0x80 else 1.0
    exponent, mantissa = (code >> 3) & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    if exponent == 0:
        return sign * mantissa * 2.0**-9
    return sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7)


E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]


def test_linear_fp8_weights(rng):
    codes = rng.integers(0, 0x78, (256, 384)).astype(numpy.uint8)
    scale = rng.integers(120, 130, (2, 3)).astype(numpy.uint8)
    table = numpy.array([e4m3(code) for code in range(256)])
    w = table[codes] * numpy.kron(2.0 ** (scale.astype(float) - 127), numpy.ones((128, 128)))
    x = to_bf16(rng.standard_normal((3, 384)))
    out = numpy.zeros((3, 256), numpy.float32)
    ops.linear(x, codes, out, scale=scale)
    values = from_bf16(x).astype(float)
    assert_within(out, values @ w.T, gamma(384 + 2) * (numpy.abs(values) @ numpy.abs(w).T))


def test_linear_fp4_weights(rng):
    pairs = rng.integers(0, 256, (64, 64)).astype(numpy.uint8)
    scale = rng.integers(120, 130, (64, 4)).astype(numpy.uint8)
    table = numpy.array(E2M1)
    w = numpy.empty((64, 128))
    w[:, ::2], w[:, 1::2] = table[pairs & 15], table[pairs >> 4]
    w *= numpy.repeat(2.0 ** (scale.astype(float) - 127), 32, axis=1)
    x = to_bf16(rng.standard_normal((3, 128)))
    out = numpy.zeros((3, 64), numpy.float32)
    ops.linear(x, pairs, out, scale=scale)
    values = from_bf16(x).astype(float)
    assert_within(out, values @ w.T, gamma(128 + 2) * (numpy.abs(values) @ numpy.abs(w).T))


def test_linear_refuses_what_does_not_fit(rng):
    x = rng.standard_normal((2, 128)).astype(numpy.float32)
    w = rng.standard_normal((16, 64)).astype(numpy.float32)
    out = numpy.zeros((2, 16), numpy.float32)
    with pytest.raises(dsv4.Error, match=r"w is \[16, 64\] f32, expected \[\*, 128\] bf16 or f32"):
        ops.linear(x, w, out)
    codes = numpy.zeros((16, 128), numpy.uint8)
    with pytest.raises(dsv4.Error, match=r"scale is \[2, 2\] .*expected \[1, 1\]"):
        ops.linear(x, codes, out, scale=numpy.zeros((2, 2), numpy.uint8))


def test_gather_rows(rng):
    x = rng.standard_normal((9, 64)).astype(numpy.float32)
    rows = numpy.array([8, 0, 3, 3], numpy.int32)
    out = numpy.zeros((4, 64), numpy.float32)
    ops.gather_rows(x, rows, out)
    assert (out == x[rows]).all()


@pytest.mark.parametrize("n, k", [(100, 512), (3000, 512), (5000, 1024)])
def test_top_k(rng, n, k):
    logits = rng.integers(-50, 50, (4, n)).astype(numpy.float32)  # many ties
    end = numpy.array([n, n // 2, 1, 0], numpy.int32)
    indices = numpy.full((4, k), 77, numpy.int32)
    length = numpy.full(4, 77, numpy.int32)
    ops.top_k(logits, end, indices, length)
    for t in range(4):
        order = sorted(range(end[t]), key=lambda i: (-logits[t, i], i))[:k]
        assert length[t] == len(order)
        assert indices[t].tolist() == sorted(order) + [-1] * (k - len(order))


def test_map_slots():
    indices = numpy.array([[0, 5, -1], [1, 2, 3]], numpy.int32)
    table = numpy.array([[7, 3], [2, 9]], numpy.int32)
    slots = numpy.zeros((2, 3), numpy.int32)
    ops.map_slots(indices, numpy.array([1, 0], numpy.int32), table, 4, slots)
    assert slots.tolist() == [[2 * 4, 9 * 4 + 1, -1], [7 * 4 + 1, 7 * 4 + 2, 7 * 4 + 3]]


# ---- rows of caches


def test_fp8_ds_mla_row_by_bytes():
    """The golden tile of the format's description, in block 1 of a cache with gaps."""
    values = numpy.zeros((1, 512), numpy.float32)
    values[0, :4] = [1.0, -0.3, 0.001, 100.0]
    values[0, 448:451] = [1.0, -2.0, 0.5]
    memory = numpy.full((3, 4 * 584 + 40), 0xEE, numpy.uint8)
    cache = ops.Cache(memory[:, : 4 * 584], "fp8_ds_mla", rows_per_block=4)
    ops.encode_rows(cache, numpy.array([6], numpy.int64), values)
    page = memory[1]
    assert page[2 * 576 : 2 * 576 + 5].tolist() == [0x48, 0xBA, 0x02, 0x7C, 0x00]
    assert page[2 * 576 + 448 : 2 * 576 + 454].tolist() == [0x80, 0x3F, 0x00, 0xC0, 0x00, 0x3F]
    assert page[4 * 576 + 16 : 4 * 576 + 24].tolist() == [0x7D] + [105] * 6 + [0]
    memory[1, 2 * 576 : 3 * 576] = memory[1, 4 * 576 + 16 : 4 * 576 + 24] = 0xEE
    assert (memory == 0xEE).all()


@pytest.mark.parametrize("format, error", [("f32", 0), ("bf16", BF16), ("fp8_ds_mla", 2.0**-4)])
def test_encode_and_decode(rng, format, error):
    values = rng.standard_normal((5, 512)).astype(numpy.float32)
    memory = numpy.zeros((4, ops.page_bytes(format, 3)), numpy.uint8)
    cache = ops.Cache(memory, format, rows_per_block=3)
    slots = numpy.array([11, 0, 5, 7, 2], numpy.int64)
    ops.encode_rows(cache, slots, values)
    back = numpy.zeros_like(values)
    ops.decode_rows(cache, slots, back)
    assert_within(back, values, error * numpy.abs(values) + (1e-3 if error > BF16 else 0))


def test_cache_faults():
    memory = numpy.zeros((4, 3 * 584), numpy.uint8)
    with pytest.raises(dsv4.Error, match='cache format "int4", expected one of fp8_ds_mla'):
        ops.Cache(memory, "int4", 3)
    with pytest.raises(dsv4.Error, match="fp8_ds_mla"):
        ops.Cache(memory, "fp8_ds_mla", 3, row_elems=128)
    too_many = ops.Cache(memory, "fp8_ds_mla", rows_per_block=4)
    slots, values = numpy.array([0], numpy.int64), numpy.zeros((1, 512), numpy.float32)
    with pytest.raises(dsv4.Error, match="2336 adjacent bytes or more a block"):
        ops.encode_rows(too_many, slots, values)
    cache = ops.Cache(memory, "fp8_ds_mla", rows_per_block=3)
    for slot in (-1, 12):
        with pytest.raises(dsv4.Error, match=r"slots\[0\] is -?\d+, expected 0 to 11"):
            ops.encode_rows(cache, numpy.array([slot], numpy.int64), values)


# ---- attention


def exact_attention(q, rows, scale, sink):
    """q [heads, dim], rows [n, dim] in float64 -> out, lse, largest logit, and error scales."""
    z = scale * q @ rows.T
    z_scale = (scale * numpy.abs(q) @ numpy.abs(rows).T).max(-1)
    top = z.max(-1)
    p = numpy.exp(z - top[:, None])
    den = p.sum(-1) + numpy.exp(sink - top)
    magnitude = (p @ numpy.abs(rows)) / den[:, None]
    return p @ rows / den[:, None], numpy.log(p.sum(-1)) + top, top, z_scale, magnitude


def f32_cache(rng, blocks, rows_per_block, dim):
    memory = rng.standard_normal((blocks, rows_per_block, dim)).astype(numpy.float32)
    return ops.Cache(memory, "f32", rows_per_block, dim), memory.reshape(-1, dim).astype(float)


def attend_bounds(rows, dim, z_scale, magnitude):
    """Error bounds of z and out: dot products of dim terms, exponentials (8 roundings), sums."""
    dz = gamma(dim + 4) * z_scale
    ep = numpy.expm1(dz + 3 * z_scale * F32) + gamma(8 + 10 * (6 + rows / 64))
    return dz, ep + gamma(rows + 4), (2 * ep + 2 * gamma(rows + 4))[:, None] * magnitude


def test_attend_lists(rng):
    tokens, heads, dim = 3, 5, 128
    window, window_rows = f32_cache(rng, 6, 7, dim)
    more, more_rows = f32_cache(rng, 9, 16, dim)
    q = rng.standard_normal((tokens, heads + 1, dim)).astype(numpy.float32)[:, :heads]
    slots = rng.integers(0, 42, (tokens, 40)).astype(numpy.int32)
    slots[rng.random(slots.shape) < 0.2] = -1
    more_slots = rng.integers(0, 144, (tokens, 100)).astype(numpy.int32)
    length = numpy.array([40, 0, 17], numpy.int32)
    more_length = numpy.array([100, 0, 1], numpy.int32)
    sink = rng.standard_normal(heads).astype(numpy.float32)
    out = numpy.full((tokens, heads, dim), numpy.nan, numpy.float32)
    lse = numpy.full((tokens, heads), numpy.nan, numpy.float32)
    max_logits = numpy.full((tokens, heads), numpy.nan, numpy.float32)
    ops.attend(
        q,
        out,
        window=ops.Lists(window, slots, length),
        sink=sink,
        softmax_scale=0.25,
        compressed=ops.Lists(more, more_slots, more_length),
        round_p_to_bf16=False,
        lse=lse,
        max_logits=max_logits,
    )
    for t in (0, 2):
        own = [window_rows[s] for s in slots[t, : length[t]] if s >= 0]
        own += [more_rows[s] for s in more_slots[t, : more_length[t]] if s >= 0]
        exact = exact_attention(q[t].astype(float), numpy.array(own), 0.25, sink.astype(float))
        dz, dw, dout = attend_bounds(len(own), dim, exact[3], exact[4])
        assert_within(out[t], exact[0], dout + F32 * numpy.abs(exact[0]))
        assert_within(lse[t], exact[1], dw + 2 * F32 * numpy.abs(exact[1]))
        assert_within(max_logits[t], exact[2], dz + F32 * numpy.abs(exact[2]))
    assert (out[1] == 0).all()  # no rows
    assert (lse[1] == -numpy.inf).all() and (max_logits[1] == -numpy.inf).all()


def test_attend_ranges_are_the_lists_of_the_same_rows(rng):
    heads, dim, rows_per_block = 4, 512, 8
    cache, _ = f32_cache(rng, 12, rows_per_block, dim)
    table = numpy.array([[3, 9, 0, 4], [11, 2, 7, 5]], numpy.int32)
    token_to_seq = numpy.array([1, 0], numpy.int32)
    begin, end = numpy.zeros(2, numpy.int32), numpy.array([30, 17], numpy.int32)
    q = rng.standard_normal((2, heads, dim)).astype(numpy.float32)
    ranged, listed = numpy.zeros_like(q), numpy.ones_like(q)
    ops.attend(
        q, ranged, compressed=ops.Ranges(cache, table, begin, end), token_to_seq=token_to_seq
    )
    entries = numpy.tile(numpy.arange(32, dtype=numpy.int32), (2, 1))
    slots = numpy.zeros_like(entries)
    ops.map_slots(entries, token_to_seq, table, rows_per_block, slots)
    ops.attend(q, listed, compressed=ops.Lists(cache, slots, end))
    assert (ranged == listed).all()


def test_attend_with_scratch_of_the_caller(rng):
    cache, _ = f32_cache(rng, 4, 16, 128)
    q = rng.standard_normal((2, 3, 128)).astype(numpy.float32)
    slots = rng.integers(0, 64, (2, 50)).astype(numpy.int32)
    lists = ops.Lists(cache, slots, numpy.array([50, 9], numpy.int32))
    expected, out, taken = numpy.empty_like(q), numpy.empty_like(q), []

    def allocate(num_bytes):
        # Guarded on both sides, and at an odd address.
        taken.append(numpy.full(num_bytes + 129, 0xAB, numpy.uint8))
        return taken[-1][65:-64]

    ops.attend(q, expected, compressed=lists)
    ops.attend(q, out, compressed=lists, scratch=allocate)
    assert (out == expected).all() and len(taken) == 1
    assert (taken[0][:65] == 0xAB).all() and (taken[0][-64:] == 0xAB).all()
    with pytest.raises(dsv4.Error, match=r"scratch has 10 bytes, \d+ were asked for"):
        ops.attend(q, out, compressed=lists, scratch=lambda n: numpy.zeros(10, numpy.uint8))
    with pytest.raises(ZeroDivisionError):
        ops.attend(q, out, compressed=lists, scratch=lambda n: 1 / 0)


def test_attend_faults(rng):
    cache, _ = f32_cache(rng, 2, 4, 128)
    q = numpy.zeros((1, 2, 128), numpy.float32)
    slots, length = numpy.zeros((1, 4), numpy.int32), numpy.ones(1, numpy.int32)
    with pytest.raises(dsv4.Error, match=r"out is \[1, 2, 64\] f32, expected \[1, 2, 128\] f32"):
        ops.attend(q, numpy.zeros((1, 2, 64), numpy.float32))
    with pytest.raises(dsv4.Error, match="compressed cache has rows of 128, expected head_dim 64"):
        ops.attend(q[:, :, :64], q[:, :, :64], compressed=ops.Lists(cache, slots, length))
    with pytest.raises(dsv4.Error, match=r"length is \[2\] i32, expected \[1\] i32"):
        ops.attend(q, q, window=ops.Lists(cache, slots, numpy.ones(2, numpy.int32)))


# ---- rotary embedding and the indexer


def rotated(values, frequencies, positions, direction):
    """Interleaved pairs of the tail, turned by position * frequency."""
    out = values.astype(float)
    n = len(frequencies)
    angle = (positions.astype(numpy.float32)[:, None] * frequencies[None]).astype(float)
    c, s = numpy.cos(angle)[:, None], direction * numpy.sin(angle)[:, None]
    even, odd = out[..., -2 * n :: 2].copy(), out[..., -2 * n + 1 :: 2].copy()
    out[..., -2 * n :: 2], out[..., -2 * n + 1 :: 2] = even * c - odd * s, even * s + odd * c
    return out


def test_inverse_rope(rng):
    config = dsv4.ModelConfig.load(V4_FLASH)
    frequencies = numpy.array(
        dsv4.rope_frequencies(config, config.kind_named("csa")), numpy.float32
    )
    assert frequencies.shape == (32,)
    o = rng.standard_normal((3, 2, 512)).astype(numpy.float32)
    positions = numpy.array([0, 5, 70001], numpy.int32)
    out = numpy.zeros_like(o)
    ops.inverse_rope(o, frequencies, positions, out)
    assert_within(out, rotated(o, frequencies, positions, -1), 8 * F32 * numpy.abs(o).max())
    assert (out[0] == o[0]).all()


def test_indexer(rng):
    config = dsv4.ModelConfig.load(V4_FLASH)
    heads, dim, rows_per_block = 8, 128, 16
    frequencies = numpy.array(
        dsv4.rope_frequencies(config, config.kind_named("csa")), numpy.float32
    )
    q = rng.standard_normal((2, heads, dim)).astype(numpy.float32)
    weights = rng.standard_normal((2, heads)).astype(numpy.float32)
    positions = numpy.array([150, 90], numpy.int32)
    q_out, weights_out = numpy.zeros_like(q), numpy.zeros_like(weights)
    ops.index_query(q, weights, frequencies, positions, q_out, weights_out, format="index_f32")
    codes = numpy.zeros(q.shape, numpy.uint8)  # of sm_90 only
    with pytest.raises(dsv4.Error, match="q_out: this device"):
        ops.index_query(q, weights, frequencies, positions, codes, weights_out)
    keys = rng.standard_normal((6, rows_per_block, dim)).astype(numpy.float32)
    cache = ops.Cache(keys, "index_f32", rows_per_block, dim)
    table = numpy.array([[4, 1, 3], [0, 5, 2]], numpy.int32)
    token_to_seq, end = numpy.array([1, 0], numpy.int32), numpy.array([37, 22], numpy.int32)
    logits = numpy.full((2, 40), numpy.nan, numpy.float32)
    ops.index_logits(q_out, weights_out, token_to_seq, end, table, cache, logits)
    exact_q = rotated(q, frequencies, positions, 1)
    for t in range(2):
        rows = keys[table[token_to_seq[t]]].reshape(-1, dim)[: end[t]].astype(float)
        dots = exact_q[t] @ rows.T
        w = weights[t].astype(float) / math.sqrt(heads * dim)
        size = numpy.abs(w) @ (numpy.abs(exact_q[t]) @ numpy.abs(rows).T)
        assert_within(
            logits[t, : end[t]], w @ numpy.maximum(dots, 0), gamma(dim + heads + 16) * size
        )
        assert numpy.isnan(logits[t, end[t] :]).all()
