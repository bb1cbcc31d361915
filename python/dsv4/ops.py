"""The operations of a device as functions on arrays.

All arrays of a call lie on one device; outputs are given by the caller and written in place. On a
GPU an operation is launched on `stream` (the number of a cudaStream_t or hipStream_t; None: the
default stream) of the current device, and returns before it has run: keep its arrays until the
stream has passed. On a CPU it has run when the function returns.

Shapes and dtypes are checked. Contents on a device (slots, lengths, block tables) are not: they
must name rows that exist.
"""

from dsv4._dsv4.ops import (
    Cache,
    Lists,
    Ranges,
    attend,
    decode_rows,
    encode_rows,
    gather_rows,
    index_logits,
    index_query,
    inverse_rope,
    linear,
    map_slots,
    page_bytes,
    qnorm_rope_insert,
    rms_norm,
    top_k,
)

__all__ = [
    "Cache",
    "Lists",
    "Ranges",
    "attend",
    "decode_rows",
    "encode_rows",
    "gather_rows",
    "index_logits",
    "index_query",
    "inverse_rope",
    "linear",
    "map_slots",
    "page_bytes",
    "qnorm_rope_insert",
    "rms_norm",
    "top_k",
]
