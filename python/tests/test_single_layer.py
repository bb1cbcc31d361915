"""One attention layer: bits across chunks and batches, dtypes, faults."""

import numpy
import pytest

import dsv4
from conftest import MODEL, from_bf16, to_bf16

TOKENS = 150


@pytest.fixture(scope="module")
def config():
    return dsv4.ModelConfig.load(MODEL)


@pytest.fixture(scope="module")
def hidden(config):
    rng = numpy.random.default_rng(3)
    return to_bf16(rng.standard_normal((TOKENS, config.hidden_size)))


def run(layer, hidden, chunks, dtype):
    out = numpy.full(hidden.shape, 77, dtype)
    sequence = layer.create_sequence()
    begin = 0
    for count in chunks:
        layer.forward(
            [(sequence, count)], hidden[begin : begin + count], out[begin : begin + count]
        )
        begin += count
    assert layer.length(sequence) == begin == len(hidden)
    layer.release_sequence(sequence)
    return out


@pytest.mark.parametrize("kind", ["sliding", "csa", "hca"])
def test_chunks_and_dtypes(config, hidden, kind):
    layer = dsv4.SingleLayer.from_formula(
        config, kind, seed=2, max_tokens=TOKENS, max_context=TOKENS
    )
    assert layer.kind.name == kind and layer.activation == "bf16" and layer.workspace_bytes > 0
    whole = run(layer, hidden, [TOKENS], numpy.uint16)
    assert numpy.isfinite(from_bf16(whole)).all() and (whole != 77).any(axis=1).all()
    assert (run(layer, hidden, [1, 63, 64, 1, 1, 20], numpy.uint16) == whole).all()
    assert (run(layer, from_bf16(hidden), [TOKENS], numpy.float32) == from_bf16(whole)).all()


def test_batches(config, hidden):
    layer = dsv4.SingleLayer.from_formula(
        config, "csa", max_tokens=TOKENS, max_context=TOKENS, max_seqs=2
    )
    alone = run(layer, hidden[:100], [100], numpy.uint16)
    first, second = layer.create_sequence(), layer.create_sequence()
    together = numpy.zeros_like(hidden)
    layer.forward(
        [(second, 50), (first, 100)], numpy.concatenate([hidden[100:], hidden[:100]]), together
    )
    assert (together[50:] == alone).all()


def test_checkpoint_layers(config):
    for index in range(config.num_hidden_layers):
        layer = dsv4.SingleLayer.from_checkpoint(MODEL, index)
        assert layer.kind.name == config.layer_kind(index).name
        assert layer.config.hidden_size == config.hidden_size
    with pytest.raises(dsv4.Error, match="the model has layers 0 to"):
        dsv4.SingleLayer.from_checkpoint(MODEL, config.num_hidden_layers)


def test_exact_numerics(config, hidden):
    layer = dsv4.SingleLayer.from_formula(
        config, config.kind_named("hca"), numerics="exact", max_tokens=TOKENS, max_context=TOKENS
    )
    assert layer.activation == "f32"
    values = from_bf16(hidden)
    whole = run(layer, values, [TOKENS], numpy.float32)
    assert (run(layer, values, [100, 50], numpy.float32) == whole).all()


def test_faults(config, hidden):
    layer = dsv4.SingleLayer.from_formula(config, "sliding", max_tokens=8, max_context=16)
    sequence = layer.create_sequence()
    out = numpy.zeros_like(hidden)
    for batch, rows, message in (
        ([(sequence, 9)], 9, "the limit is 8"),
        ([(sequence, 3)], 4, r"hidden is \[4, "),
        ([(sequence + 1, 1)], 1, "sequence"),
    ):
        with pytest.raises(dsv4.Error, match=message) as caught:
            layer.forward(batch, hidden[:rows], out[:rows])
        assert caught.value.code == dsv4.ErrorCode.INVALID_ARGUMENT
    assert (out == 0).all() and layer.length(sequence) == 0
    with pytest.raises(dsv4.Error, match="all 1 sequences are taken"):
        layer.create_sequence()
    with pytest.raises(dsv4.Error, match="sliding, csa or hca"):
        dsv4.SingleLayer.from_formula(config, "dense")
