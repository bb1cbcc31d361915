"""Engine.generate: a prompt in, tokens out, one by one."""

import dataclasses
from typing import Iterator, List, NamedTuple, Sequence, Union

from dsv4._dsv4 import Engine, ErrorCode, Sampler, StreamDecoder
from dsv4._errors import error, invalid


class Token(NamedTuple):
    """A drawn token, and the text that it completes: "" within a character or without tokenizer."""

    id: int
    text: str


@dataclasses.dataclass
class _Drawn:
    """What a generation has so far; shared by it and its loop, which must not know each other: an
    object that nobody holds any more shall go at once, and give its sequence back."""

    ids: List[int] = dataclasses.field(default_factory=list)
    pieces: List[str] = dataclasses.field(default_factory=list)
    stopped_at_eos: bool = False


def _run(engine, prompt, drawn: _Drawn, max_new_tokens, sampler, stop_at_eos, chunk):
    decoder = StreamDecoder(engine.tokenizer) if engine.tokenizer else None
    sequence = engine.create_sequence()
    try:
        for begin in range(0, len(prompt), chunk):
            part = prompt[begin : begin + chunk]
            is_last = begin + chunk >= len(prompt)
            logits = engine.step([(sequence, part, 1 if is_last else 0)])
        for i in range(max_new_tokens):
            token = sampler.draw(logits, position=len(prompt) + i)
            if stop_at_eos and token == engine.config.eos_token_id:
                drawn.stopped_at_eos = True
                break
            drawn.ids.append(token)
            drawn.pieces.append(decoder.push(token) if decoder else "")
            yield Token(token, drawn.pieces[-1])
            if i + 1 < max_new_tokens:
                logits = engine.step([(sequence, [token])])
    finally:
        engine.release_sequence(sequence)
        if decoder:
            drawn.pieces.append(decoder.finish())


class Generation(Iterator[Token]):
    """A running generation: an iterator of Token. What was drawn so far is in `ids` and `text`.

    Its sequence is given back at the end, by close(), or when the object goes.
    """

    def __init__(self, engine, prompt: List[int], *loop_arguments):
        self.prompt_ids = prompt
        self._drawn = _Drawn()
        self._tokens = _run(engine, prompt, self._drawn, *loop_arguments)

    @property
    def ids(self) -> List[int]:
        return self._drawn.ids

    @property
    def text(self) -> str:
        return "".join(self._drawn.pieces)

    @property
    def stopped_at_eos(self) -> bool:
        return self._drawn.stopped_at_eos

    def close(self) -> None:
        self._tokens.close()

    def __next__(self) -> Token:
        return next(self._tokens)


def generate(
    self: Engine,
    prompt: Union[str, Sequence[int]],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    stop_at_eos: bool = True,
    chunk: int = 0,
) -> Generation:
    """Feeds a prompt to a new sequence and draws tokens until the limit or the end token.

    prompt          text (the begin token is put before it), or ids as they are
    max_new_tokens  the end token is not among them
    temperature     0: greedy, ties to the smaller id; top_p, top_k, seed as dsv4.Sampler
    chunk           tokens of the prompt per step; 0: as many as the engine's limits allow

    Returns an iterator of Token(id, text) that runs one step for each.
    """
    if isinstance(prompt, str):
        if self.tokenizer is None:
            raise error(ErrorCode.NOT_FOUND, "the model has no tokenizer: give the prompt as ids")
        ids = [self.config.bos_token_id] + self.tokenizer.encode(prompt)
    else:
        ids = [int(token) for token in prompt]
    if not ids:
        raise invalid("the prompt has no tokens")
    if max_new_tokens < 0:
        raise invalid(f"{max_new_tokens} new tokens, expected 0 or more")
    if len(ids) + max_new_tokens > self.max_context:
        raise invalid(
            f"{len(ids)} prompt tokens and {max_new_tokens} new ones make "
            f"{len(ids) + max_new_tokens}, the engine was loaded for {self.max_context}"
        )
    if not 0 <= chunk <= self.max_tokens:
        raise invalid(f"prompt chunks of {chunk} tokens, expected 0 to {self.max_tokens}")
    sampler = Sampler(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
    return Generation(self, ids, max_new_tokens, sampler, stop_at_eos, chunk or self.max_tokens)


Engine.generate = generate
