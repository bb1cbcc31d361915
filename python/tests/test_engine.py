"""Loading, steps, generation."""

import threading
import time

import numpy
import pytest

import dsv4
from conftest import MODEL, V4_FLASH

PROMPT = "ROMEO:\nWhat light through yonder window breaks?"


@pytest.fixture(scope="module")
def engine():
    return dsv4.Engine.load(MODEL, max_tokens=64, max_seqs=3, max_context=256, max_logits=64)


def logits_of(engine, ids, chunk):
    """Logits of every position, the prompt cut into chunks."""
    sequence = engine.create_sequence()
    parts = [
        numpy.asarray(engine.step([(sequence, ids[i : i + chunk], len(ids[i : i + chunk]))]))
        for i in range(0, len(ids), chunk)
    ]
    assert engine.length(sequence) == len(ids)
    engine.release_sequence(sequence)
    return numpy.concatenate(parts)


def test_description_memory_and_config(engine):
    assert "CPU_DSV4" in engine.description
    assert engine.memory["total"] == sum(engine.memory["parts"].values())
    planned = dsv4.plan_memory(
        engine.config, max_tokens=64, max_seqs=3, max_context=256, max_logits=64
    )
    assert planned["pool"] == engine.memory["pool"]
    assert (engine.max_tokens, engine.max_seqs, engine.max_context) == (64, 3, 256)


def test_logits_do_not_depend_on_chunks_or_neighbours(engine):
    ids = [engine.config.bos_token_id] + engine.tokenizer.encode(PROMPT)
    whole = logits_of(engine, ids, 64)
    assert whole.shape == (len(ids), engine.config.vocab_size) and whole.dtype == numpy.float32
    assert (logits_of(engine, ids, 5) == whole).all()
    first, second = engine.create_sequence(), engine.create_sequence()
    both = numpy.asarray(engine.step([(second, ids[::-1], 2), (first, ids, len(ids))]))
    assert (both[2:] == whole).all()
    engine.release_sequence(first)
    engine.release_sequence(second)


def test_logits_survive_the_next_step(engine):
    ids = engine.tokenizer.encode(PROMPT)
    sequence = engine.create_sequence()
    logits = numpy.asarray(engine.step([(sequence, ids)]))
    copy = logits.copy()
    engine.step([(sequence, ids)])
    engine.release_sequence(sequence)
    assert (logits == copy).all()


def test_generate_is_the_greedy_loop(engine):
    ids = [engine.config.bos_token_id] + engine.tokenizer.encode(PROMPT)
    generation = engine.generate(PROMPT, max_new_tokens=24)
    drawn = [token for token in generation]
    assert generation.prompt_ids == ids
    assert [token.id for token in drawn] == generation.ids
    assert (
        "".join(token.text for token in drawn)
        == generation.text
        == engine.tokenizer.decode(generation.ids)
    )
    assert len(drawn) == 24 or generation.stopped_at_eos
    expected = list(ids)
    for _ in drawn:
        expected.append(int(numpy.argmax(logits_of(engine, expected, 64)[-1])))
    assert generation.ids == expected[len(ids) :]


def test_generate_from_ids_in_chunks_with_a_seed(engine):
    ids = engine.tokenizer.encode(PROMPT)
    options = dict(max_new_tokens=12, temperature=0.8, top_p=0.95, seed=5)
    one = [token.id for token in engine.generate(ids, **options)]
    other = [token.id for token in engine.generate(ids, chunk=3, **options)]
    assert one == other
    assert one != [
        token.id for token in engine.generate(ids, max_new_tokens=12, temperature=0.8, seed=6)
    ]


def test_sequences_come_back(engine):
    for _ in range(5):  # more than max_seqs
        generation = engine.generate(PROMPT, max_new_tokens=8)
        next(generation)
        generation.close()
        next(engine.generate(PROMPT, max_new_tokens=8))  # dropped while it runs
    sequences = [engine.create_sequence() for _ in range(3)]
    with pytest.raises(dsv4.Error) as caught:
        engine.create_sequence()
    assert caught.value.code == dsv4.ErrorCode.OUT_OF_MEMORY
    for sequence in sequences:
        engine.release_sequence(sequence)


def test_a_failed_step_changes_nothing(engine):
    sequence = engine.create_sequence()
    engine.step([(sequence, [1, 2, 3])])
    for feeds in (
        [(sequence, [engine.config.vocab_size])],
        [(sequence, [-1])],
        [(sequence, [])],
        [(sequence, [1] * 65)],
        [(sequence + 1000, [1])],
        [(sequence, [1, 2], 3)],
    ):
        with pytest.raises(dsv4.Error) as caught:
            engine.step(feeds)
        assert caught.value.code == dsv4.ErrorCode.INVALID_ARGUMENT
        assert engine.length(sequence) == 3
    with pytest.raises(TypeError):
        engine.step([(sequence, "abc")])
    engine.release_sequence(sequence)


def test_faults_of_generate(engine):
    for options, message in (
        (dict(prompt=[]), "the prompt has no tokens"),
        (dict(prompt=[1], max_new_tokens=-1), "expected 0 or more"),
        (dict(prompt=[1], max_new_tokens=256), "the engine was loaded for 256"),
        (dict(prompt=[1], chunk=65), "expected 0 to 64"),
        (dict(prompt=[1], temperature=-1.0), "temperature"),
        (dict(prompt=[1], top_p=0.0), "top"),
    ):
        with pytest.raises(dsv4.Error, match=message) as caught:
            engine.generate(**options)
        assert caught.value.code == dsv4.ErrorCode.INVALID_ARGUMENT


def test_faults_of_load():
    for options, code, message in (
        (dict(device="tpu:0"), "INVALID_ARGUMENT", "tpu"),
        (dict(numerics="fast"), "INVALID_ARGUMENT", "serving, reference or exact"),
        (dict(products="f64"), "INVALID_ARGUMENT", "expected f32 or fp8"),
        (dict(products="fp8", numerics="serving"), "UNSUPPORTED", "products of CPU_DSV4: fp8"),
        (dict(kv_cache_dtype="int4"), "UNSUPPORTED", "required one of auto, fp8_ds_mla"),
        (dict(max_token=1), "INVALID_ARGUMENT", "max_tokens"),
        (dict(max_tokens="many"), "INVALID_ARGUMENT", "option max_tokens is 'many'"),
        (dict(numerics="exact", kv_cache_dtype="fp8_ds_mla"), "UNSUPPORTED", "exact"),
    ):
        with pytest.raises(dsv4.Error, match=message) as caught:
            dsv4.Engine.load(MODEL, **options)
        assert caught.value.code == getattr(dsv4.ErrorCode, code), options


def test_progress_and_exceptions_from_it():
    seen = []
    dsv4.Engine.load(MODEL, progress=lambda fraction, what: seen.append((fraction, what)))
    assert seen and seen[-1][0] == 1 and all(isinstance(what, str) for _, what in seen)

    def interrupt(fraction, what):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dsv4.Engine.load(MODEL, progress=interrupt)


def test_the_gil_is_released(engine):
    """Another thread runs while a step does; two threads may use one engine."""
    beats, stop = [0], threading.Event()

    def beat():
        while not stop.is_set():
            beats[0] += 1
            time.sleep(0.0002)

    thread = threading.Thread(target=beat)
    thread.start()
    sequence = engine.create_sequence()
    inside = 0
    for _ in range(3):
        before = beats[0]
        engine.step([(sequence, [1] * 64)])
        inside += beats[0] - before
    stop.set()
    thread.join()
    engine.release_sequence(sequence)
    assert inside > 0

    alone = [token.id for token in engine.generate(PROMPT, max_new_tokens=10)]
    results = []
    threads = [
        threading.Thread(
            target=lambda: results.append(
                [t.id for t in engine.generate(PROMPT, max_new_tokens=10)]
            )
        )
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [alone, alone]


def test_tokenizer(engine):
    tokenizer = dsv4.Tokenizer.load(MODEL)
    ids = tokenizer.encode(PROMPT)
    assert tokenizer.decode(ids) == PROMPT and len(tokenizer.pieces(ids)) == len(ids)
    assert all(tokenizer.contains(i) for i in ids)
    assert tokenizer.find("no such token") is None
    decoder = dsv4.StreamDecoder(tokenizer)
    assert "".join(decoder.push(i) for i in ids) + decoder.finish() == PROMPT
    with pytest.raises(dsv4.Error, match="10000000"):
        tokenizer.decode([10000000])


def test_formula_model_without_tokenizer():
    engine = dsv4.Engine.load(f"formula:{MODEL}/config.json:3", max_context=64)
    assert engine.tokenizer is None
    assert [token.text for token in engine.generate([1, 2, 3], max_new_tokens=4)] == [""] * 4
    with pytest.raises(dsv4.Error, match="no tokenizer") as caught:
        engine.generate("text")
    assert caught.value.code == dsv4.ErrorCode.NOT_FOUND


def test_config():
    config = dsv4.ModelConfig.load(V4_FLASH)
    assert (config.num_heads, config.head_dim, config.sliding_window) == (64, 512, 128)
    assert config.kind_named("hca").compress_ratio == 128
    with pytest.raises(dsv4.Error, match="sliding, csa or hca"):
        config.kind_named("dense")
    with pytest.raises(dsv4.Error, match="layer 1000"):
        config.layer_kind(1000)
    with pytest.raises(dsv4.Error) as caught:
        dsv4.ModelConfig.parse("{")
    assert caught.value.code == dsv4.ErrorCode.DATA_CORRUPT
