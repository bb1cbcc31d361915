"""The sparse attention functions of the package `flash_mla`, for the formats of DeepSeek-V4.

    import dsv4.flash_mla as flash_mla

Signatures, shapes and conventions are FlashMLA's: lse and max_logits in natural units, lse = +inf
for a query without keys, the attention sink in the output alone. Any number of heads from 1 to 128,
on a CPU too. Not here, and refused by name: head_dim 576 (DeepSeek-V3), attention over dense rows.

q, caches, and results are used where they lie. Strides are honoured; nothing is copied but small
arrays: lengths, and in flash_mla_sparse_fwd the indices, whose invalid entries are replaced.
"""

import contextlib
import dataclasses
from typing import Optional, Tuple

import torch

from dsv4._dsv4 import RawTensor
from dsv4._errors import invalid, unsupported
from dsv4.ops import Cache, Lists, attend

__all__ = [
    "FlashMLASchedMeta",
    "flash_mla_sparse_fwd",
    "flash_mla_with_kvcache",
    "get_mla_metadata",
]

_HEAD_DIM = 512
_ROW_BYTES = 584
_MAX_HEADS = 128
_BYTE_DTYPES = (torch.float8_e4m3fn, torch.int8, torch.uint8)


@dataclasses.dataclass
class FlashMLASchedMeta:
    """What calls of the same shapes share. There is nothing to schedule: work is cut by shapes that
    the first call fixes, as with FlashMLA."""

    @dataclasses.dataclass
    class Config:
        b: int
        s_q: int
        h_q: int
        page_block_size: int
        h_k: int
        causal: bool
        is_fp8_kvcache: bool
        topk: Optional[int]
        extra_page_block_size: Optional[int]
        extra_topk: Optional[int]

    have_initialized: bool = False
    config: Optional[Config] = None
    tile_scheduler_metadata: Optional[torch.Tensor] = None  # stays None
    num_splits: Optional[torch.Tensor] = None  # stays None


def get_mla_metadata(*args, **kwargs) -> Tuple[FlashMLASchedMeta, None]:
    """An empty FlashMLASchedMeta, and None. Arguments are taken for compatibility and not used."""
    return FlashMLASchedMeta(), None


def flash_mla_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    block_table: Optional[torch.Tensor],
    cache_seqlens: Optional[torch.Tensor],
    head_dim_v: int,
    tile_scheduler_metadata: FlashMLASchedMeta,
    num_splits: None = None,
    softmax_scale: Optional[float] = None,
    causal: bool = False,
    is_fp8_kvcache: bool = False,
    indices: Optional[torch.Tensor] = None,
    attn_sink: Optional[torch.Tensor] = None,
    extra_k_cache: Optional[torch.Tensor] = None,
    extra_indices_in_kvcache: Optional[torch.Tensor] = None,
    topk_length: Optional[torch.Tensor] = None,
    extra_topk_length: Optional[torch.Tensor] = None,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Attention of queries to listed rows of paged fp8_ds_mla caches.

    q                         [b, s_q, h_q, 512] bfloat16
    k_cache                   [num_blocks, page_block_size, 1, 584] float8_e4m3fn, int8 or uint8;
                              blocks any distance apart
    block_table, cache_seqlens  not used by sparse attention
    head_dim_v                512
    indices                   [b, s_q, topk] int32: block * page_block_size + offset, below 0: none
    attn_sink                 [h_q] float32
    extra_k_cache, extra_indices_in_kvcache  more rows, in their own cache
    topk_length, extra_topk_length  [b] int32: only the first entries count

    Returns out [b, s_q, h_q, 512] bfloat16, lse [b, h_q, s_q] float32.
    """
    meta = tile_scheduler_metadata
    if not isinstance(meta, FlashMLASchedMeta):
        raise invalid(
            f"tile_scheduler_metadata is of type {type(meta).__name__}, expected the result of "
            "get_mla_metadata()"
        )
    if num_splits is not None:
        raise invalid("num_splits must be None")
    if indices is None:
        raise unsupported(
            "attention over dense rows (indices=None); dsv4.flash_mla has sparse attention only"
        )
    if causal:
        raise invalid("causal must be False for sparse attention")
    if not is_fp8_kvcache:
        raise unsupported("is_fp8_kvcache=False; sparse attention reads FP8 caches only")
    tensors = (
        q,
        k_cache,
        indices,
        attn_sink,
        extra_k_cache,
        extra_indices_in_kvcache,
        topk_length,
        extra_topk_length,
    )
    key = (head_dim_v, *map(_outline, tensors))
    form = _decode_forms.get(key)
    if form is None:
        _check_decode(head_dim_v, *tensors)
        form = _remember(_decode_forms, key, _DecodeForm(*tensors))
    if meta.config is not form.config:
        if not meta.have_initialized:
            meta.have_initialized, meta.config = True, form.config
        elif meta.config != form.config:
            _refuse_other_config(meta.config, form.config)

    out = torch.empty(form.out_shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(form.lse_shape, dtype=torch.float32, device=q.device)
    rows = [(_fp8_cache(k_cache), indices, form.lengths(topk_length, indices))]
    if extra_k_cache is not None:
        extra = extra_indices_in_kvcache
        rows.append((_fp8_cache(extra_k_cache), extra, form.lengths(extra_topk_length, extra)))
    sink = None if attn_sink is None else _raw(attn_sink)
    with _on_device(q) as stream:
        for j in range(form.num_launches):
            lists = [
                Lists(cache, view.of(slots, j), length)
                for (cache, slots, length), view in zip(rows, form.slots)
            ]
            attend(
                form.q.of(q, j),
                form.out.of(out, j),
                # Rows that stand alone go where long lists may be cut into chains.
                window=lists[0] if len(lists) == 2 else None,
                compressed=lists[-1],
                sink=sink,
                softmax_scale=_HEAD_DIM**-0.5 if softmax_scale is None else softmax_scale,
                lse=form.lse.of(lse, j),
                scratch=_scratch(q),
                stream=stream,
            )
    _plus_inf_without_keys(lse)
    return out, lse.permute(0, 2, 1) if form.as_one else lse.permute(1, 2, 0)


def flash_mla_sparse_fwd(
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    sm_scale: float,
    d_v: int = 512,
    attn_sink: Optional[torch.Tensor] = None,
    topk_length: Optional[torch.Tensor] = None,
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attention of queries to listed rows of one bfloat16 array (prefill).

    q            [s_q, h_q, 512] bfloat16
    kv           [s_kv, 1, 512] bfloat16
    indices      [s_q, 1, topk] int32; below 0 or from s_kv on: none
    attn_sink    [h_q] float32
    topk_length  [s_q] int32: only the first entries count

    Returns out [s_q, h_q, 512] bfloat16, max_logits [s_q, h_q] float32 (-inf for a query without
    keys), lse [s_q, h_q] float32 (+inf).
    """
    tensors = (q, kv, indices, attn_sink, topk_length)
    key = (d_v, *map(_outline, tensors))
    if key not in _prefill_forms:
        _check_prefill(d_v, *tensors)
        _remember(_prefill_forms, key, True)
    s_q, heads, _ = q.shape
    out = torch.empty((s_q, heads, d_v), dtype=q.dtype, device=q.device)
    lse = torch.empty((s_q, heads), dtype=torch.float32, device=q.device)
    max_logits = torch.empty_like(lse)
    if s_q == 0:
        return out, max_logits, lse
    slots = indices[:, 0]
    slots = slots.masked_fill((slots < 0) | (slots >= kv.shape[0]), -1)
    # A row is a block of its own: blocks may lie any distance apart, so kv needs no copy.
    cache = Cache(_raw(kv), "bf16", rows_per_block=1)
    with _on_device(q) as stream:
        attend(
            _raw(q),
            _raw(out),
            compressed=Lists(cache, _raw(slots), _lengths(topk_length, s_q, slots)),
            sink=None if attn_sink is None else _raw(attn_sink),
            softmax_scale=sm_scale,
            lse=_raw(lse),
            max_logits=_raw(max_logits),
            scratch=_scratch(q),
            stream=stream,
        )
    return out, max_logits, _plus_inf_without_keys(lse)


# ---- calls of one form: what follows from shapes, strides, dtypes and devices alone

# Checks and views of calls that were found right: they take longer than a kernel.
_decode_forms = {}
_prefill_forms = {}
_MAX_FORMS = 4096


def _outline(tensor):
    if tensor is None:
        return None
    return (tensor.shape, tensor.stride(), tensor.dtype, tensor.device)


def _remember(forms, key, form):
    if len(forms) >= _MAX_FORMS:
        forms.clear()
    forms[key] = form
    return form


class _View:
    """A tensor as launch j sees it: `shape` and `strides`, `step` elements after launch j - 1."""

    def __init__(self, tensor, shape, strides, step=0):
        self.dtype, self.device = _DTYPES[tensor.dtype], _device_name(tensor)
        self.shape, self.strides = tuple(shape), tuple(strides)
        self.step_bytes = step * tensor.element_size()

    def of(self, tensor, j):
        pointer = tensor.data_ptr() + j * self.step_bytes
        return RawTensor(pointer, self.dtype, self.shape, self.strides, self.device, owner=tensor)


class _DecodeForm:
    """Tokens of a launch lie one stride apart. Where those of two dimensions do not, there is one
    launch for each token of a sequence: batch is large where speed matters, s_q is 1 to 4."""

    def __init__(self, q, k_cache, indices, _sink, extra_k_cache, extra_indices, *_lengths):
        batch, s_q, heads, dim = q.shape
        has_extra = extra_k_cache is not None
        self.config = FlashMLASchedMeta.Config(
            b=batch,
            s_q=s_q,
            h_q=heads,
            page_block_size=k_cache.shape[1],
            h_k=k_cache.shape[2],
            causal=False,
            is_fp8_kvcache=True,
            topk=indices.shape[2],
            extra_page_block_size=extra_k_cache.shape[1] if has_extra else None,
            extra_topk=extra_indices.shape[2] if has_extra else None,
        )
        listed = (indices, extra_indices) if has_extra else (indices,)
        self.as_one = s_q == 1 or all(t.stride(0) == s_q * t.stride(1) for t in (q, *listed))
        self.s_q, self.num_launches = s_q, 1 if self.as_one else s_q
        self.num_tokens = batch * s_q if self.as_one else batch
        self.out_shape = (batch, s_q, heads, dim)
        self.lse_shape = (batch, s_q, heads) if self.as_one else (s_q, batch, heads)
        self.q = self._view(q)
        self.out = self._view(q, (s_q * heads * dim, heads * dim, dim, 1))
        self.slots = [self._view(t) for t in listed]
        lse = torch.empty(0, dtype=torch.float32, device=q.device)
        self.lse = _View(lse, (self.num_tokens, heads), (heads, 1), batch * heads)

    def _view(self, tensor, strides=None):
        """[b, s_q, ...] as [tokens, ...] of one launch."""
        strides = tensor.stride() if strides is None else strides
        of_token = strides[1] if self.as_one and self.s_q > 1 else strides[0]
        step = 0 if self.as_one else strides[1]
        return _View(tensor, (self.num_tokens, *tensor.shape[2:]), (of_token, *strides[2:]), step)

    def lengths(self, given, indices):
        """Entries of each token's list."""
        if given is not None and self.as_one and self.s_q > 1:
            given = given.repeat_interleave(self.s_q)
        return _lengths(given, self.num_tokens, indices)


# ---- checks


def _check_decode(
    head_dim_v,
    q,
    k_cache,
    indices,
    attn_sink,
    extra_k_cache,
    extra_indices,
    topk_length,
    extra_topk_length,
):
    _check_queries(q, 4, head_dim_v)
    batch, s_q, heads, _ = q.shape
    _check_cache("k_cache", k_cache, q)
    _check("indices", indices, q, torch.int32, (batch, s_q, None))
    _check("topk_length", topk_length, q, torch.int32, (batch,))
    _check("attn_sink", attn_sink, q, torch.float32, (heads,))
    if (extra_k_cache is None) != (extra_indices is None):
        raise invalid("extra_k_cache and extra_indices_in_kvcache come together")
    if extra_k_cache is None and extra_topk_length is not None:
        raise invalid("extra_topk_length is given without extra_k_cache")
    if extra_k_cache is not None:
        _check_cache("extra_k_cache", extra_k_cache, q)
        _check("extra_indices_in_kvcache", extra_indices, q, torch.int32, (batch, s_q, None))
        _check("extra_topk_length", extra_topk_length, q, torch.int32, (batch,))


def _check_prefill(d_v, q, kv, indices, attn_sink, topk_length):
    _check_queries(q, 3, d_v)
    s_q, heads, _ = q.shape
    _check("kv", kv, q, torch.bfloat16, (None, 1, _HEAD_DIM))
    _check("indices", indices, q, torch.int32, (s_q, 1, None))
    _check("attn_sink", attn_sink, q, torch.float32, (heads,))
    _check("topk_length", topk_length, q, torch.int32, (s_q,))


def _check(name, tensor, q, dtype, shape):
    """Refuses what is not a tensor of `dtype` and `shape` (None: any extent) beside q."""
    if tensor is None:
        return
    if tensor.device != q.device:
        raise invalid(f"{name} is on {tensor.device}, q on {q.device}")
    fits = tensor.dim() == len(shape) and all(
        want is None or want == have for want, have in zip(shape, tensor.shape)
    )
    if tensor.dtype != dtype or not fits:
        expected = ", ".join("*" if extent is None else str(extent) for extent in shape)
        raise invalid(
            f"{name} is {list(tensor.shape)} {tensor.dtype}, expected [{expected}] {dtype}"
        )
    if tensor.dim() and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise invalid(f"{name} has distant innermost elements: stride {tensor.stride(-1)}")


def _check_queries(q, rank, head_dim_v):
    if q.dim() == rank and q.shape[-1] == 576:
        raise unsupported("head_dim 576 (DeepSeek-V3 caches); dsv4.flash_mla has head_dim 512 only")
    _check("q", q, q, torch.bfloat16, (None,) * (rank - 1) + (_HEAD_DIM,))
    if not 1 <= q.shape[-2] <= _MAX_HEADS:
        raise unsupported(f"{q.shape[-2]} query heads, expected 1 to {_MAX_HEADS}")
    if head_dim_v != _HEAD_DIM:
        raise unsupported(f"head_dim_v {head_dim_v}, expected {_HEAD_DIM}")


def _check_cache(name, cache, q):
    if cache.device != q.device:
        raise invalid(f"{name} is on {cache.device}, q on {q.device}")
    if cache.dim() == 4 and cache.shape[-1] == 656:
        raise unsupported(f"{name} has DeepSeek-V3.2 rows of 656 bytes, expected rows of 584")
    if cache.dtype not in _BYTE_DTYPES or cache.dim() != 4 or cache.shape[2:] != (1, _ROW_BYTES):
        raise invalid(
            f"{name} is {list(cache.shape)} {cache.dtype}, expected [num_blocks, "
            f"page_block_size, 1, {_ROW_BYTES}] float8_e4m3fn, int8 or uint8"
        )
    if cache.shape[1] > 1 and cache.stride(1) != _ROW_BYTES:
        raise invalid(f"{name}: the bytes of a block must be adjacent, stride(1) {cache.stride(1)}")


def _refuse_other_config(first, now):
    for field in dataclasses.fields(now):
        before, given = getattr(first, field.name), getattr(now, field.name)
        if before != given:
            raise invalid(
                f"{field.name} is {given}, it was {before} in the first call with this metadata"
            )


# ---- torch to dsv4

_DTYPES = {torch.bfloat16: "bf16", torch.float32: "f32", torch.int32: "i32"}


def _device_name(tensor):
    return "cpu" if tensor.device.type == "cpu" else f"cuda:{tensor.device.index}"


def _raw(tensor):
    dtype = _DTYPES.get(tensor.dtype, "u8")
    shape, strides = tensor.shape, tensor.stride()
    return RawTensor(tensor.data_ptr(), dtype, shape, strides, _device_name(tensor), owner=tensor)


def _fp8_cache(cache):
    return Cache(_raw(cache), "fp8_ds_mla", rows_per_block=cache.shape[1])


def _lengths(given, tokens, indices):
    """Entries of each token's list."""
    return _raw(_full(tokens, indices) if given is None else given)


# Lengths of lists that are used whole. They are kept for ever: recorded graphs may read them.
_full_lengths = {}
_MAX_FULL_LENGTHS = 1024


def _full(tokens, indices):
    key = (tokens, indices.shape[-1], indices.device)
    kept = _full_lengths.get(key)
    if kept is not None:
        return kept
    lengths = torch.full((tokens,), key[1], dtype=torch.int32, device=indices.device)
    on_gpu = indices.device.type != "cpu"
    # What is made while a graph is captured belongs to that graph.
    if len(_full_lengths) < _MAX_FULL_LENGTHS and not (
        on_gpu and torch.cuda.is_current_stream_capturing()
    ):
        if on_gpu:  # calls on other streams will read it
            torch.cuda.current_stream(indices.device).synchronize()
        _full_lengths[key] = lengths
    return lengths


def _scratch(q):
    """Temporary memory as torch gives it: in stream order, and from a captured graph's own pool."""

    def allocate(num_bytes):
        return _raw(torch.empty(num_bytes, dtype=torch.uint8, device=q.device))

    return allocate


@contextlib.contextmanager
def _on_device(q):
    """The current stream of q's device, made the current device meanwhile; None on a CPU."""
    if q.device.type == "cpu":
        yield None
    elif q.device.index == torch.cuda.current_device():
        yield torch.cuda.current_stream(q.device).cuda_stream
    else:
        with torch.cuda.device(q.device):
            yield torch.cuda.current_stream(q.device).cuda_stream


def _plus_inf_without_keys(lse):
    infinity = float("inf")
    return lse.nan_to_num_(nan=float("nan"), posinf=infinity, neginf=infinity)
