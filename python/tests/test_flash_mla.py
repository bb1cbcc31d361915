"""dsv4.flash_mla on a CPU and, where there is one, a GPU: conventions, strides, refusals.

FlashMLA's own tests go through tools/flash_mla_suite.py.
"""

import pytest

torch = pytest.importorskip("torch")

import dsv4  # noqa: E402
import dsv4.flash_mla as flash_mla  # noqa: E402
from dsv4 import ops  # noqa: E402


def usable_gpu():
    return torch.cuda.is_available() and any(
        report["usable"] for report in dsv4.backends() if report["platform"] == "cuda"
    )


DEVICES = ["cpu"] + (["cuda:0"] if usable_gpu() else [])


def non_contiguous(tensor):
    """The same values in a larger tensor: every stride differs from a contiguous one's."""
    wide = torch.empty(
        [n + 1 for n in tensor.shape[:-1]] + [tensor.shape[-1] + 8], dtype=tensor.dtype
    )
    view = wide[tuple(slice(n) for n in tensor.shape)]
    view.copy_(tensor)
    return view


def make_cache(blocks, rows_per_block, generator):
    """Pages of random rows with gaps between blocks, and the rows as their bytes stand for them."""
    rows = torch.randn(blocks * rows_per_block, 512, generator=generator)
    pages = torch.zeros(blocks, (rows_per_block * 584 + 575) // 576 * 576, dtype=torch.uint8)
    view = pages[:, : rows_per_block * 584].view(blocks, rows_per_block, 1, 584)
    cache = ops.Cache(view, "fp8_ds_mla", rows_per_block)
    slots = torch.arange(len(rows))
    ops.encode_rows(cache, slots, rows)
    ops.decode_rows(cache, slots, rows)
    return view, rows.double()


def reference(q, rows, sink, scale):
    """q [h, 512], rows [n, 512] -> out, lse (inf without rows), in float64."""
    if len(rows) == 0:
        return torch.zeros_like(q), torch.full((len(q),), float("inf")).double()
    z = scale * q @ rows.T
    lse = z.logsumexp(-1)
    out = torch.softmax(z, -1) @ rows
    return out / (1 + torch.exp(sink - lse))[:, None], lse


def on(device, *tensors):
    """Copies that keep strides."""
    moved = []
    for tensor in tensors:
        if tensor is None or device == "cpu":
            moved.append(tensor)
            continue
        base = tensor._base if tensor._base is not None else tensor
        moved.append(
            base.to(device).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
        )
    return moved


def close(given, exact):
    """bf16 output, P rounded to bf16: 2^-8 of sum p |v| <= 4 sigma of the rows here."""
    torch.testing.assert_close(given.cpu().double(), exact, rtol=2**-8, atol=2**-8 * 4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("heads", [1, 8, 64])
@pytest.mark.parametrize("with_extra", [False, True])
@pytest.mark.parametrize("with_length", [False, True])
def test_with_kvcache(device, heads, with_extra, with_length):
    generator = torch.Generator().manual_seed(1)
    batch, s_q, topk = 3, 2, 70
    q = non_contiguous((torch.randn(batch, s_q, heads, 512, generator=generator) / 8).bfloat16())
    sink = torch.randn(heads, generator=generator)
    sink[0] = float("inf") if heads > 1 else 0.5
    sink[-1] = float("-inf")
    scopes = []
    for _ in range(1 + with_extra):
        cache, rows = make_cache(5, 61, generator)
        indices = torch.randint(-40, len(rows), (batch, s_q, topk), generator=generator).clamp(
            min=-1
        )
        indices[1] = -1  # lonely queries
        length = (
            torch.randint(0, topk + 1, (batch,), generator=generator).int() if with_length else None
        )
        scopes.append((cache, rows, non_contiguous(indices.int()), length))
    meta, none = flash_mla.get_mla_metadata()
    assert none is None
    cache, _, indices, length = scopes[0]
    dq, dcache, dindices, dlength, dsink = on(device, q, cache, indices, length, sink)
    extra = on(device, *(scopes[1][i] for i in (0, 2, 3))) if with_extra else [None] * 3
    out, lse = flash_mla.flash_mla_with_kvcache(
        dq,
        dcache.view(torch.float8_e4m3fn),
        None,
        None,
        512,
        meta,
        None,
        0.1,
        False,
        True,
        dindices,
        dsink,
        extra[0],
        extra[1],
        dlength,
        extra[2],
    )
    assert out.shape == (batch, s_q, heads, 512) and out.dtype == torch.bfloat16
    assert lse.shape == (batch, heads, s_q) and lse.dtype == torch.float32
    assert meta.have_initialized and meta.config.topk == topk
    for b in range(batch):
        for j in range(s_q):
            own = []
            for _, rows, indices, length in scopes:
                listed = indices[b, j, : None if length is None else length[b]]
                own.append(rows[listed[listed >= 0].long()])
            exact, exact_lse = reference(q[b, j].double(), torch.cat(own), sink.double(), 0.1)
            close(out[b, j], exact)
            torch.testing.assert_close(lse[b, :, j].cpu().double(), exact_lse, rtol=1e-5, atol=1e-5)
    assert (lse[1] == float("inf")).all() and (out[1] == 0).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("heads", [4, 64])
@pytest.mark.parametrize("with_length", [False, True])
def test_sparse_fwd(device, heads, with_length):
    generator = torch.Generator().manual_seed(2)
    s_q, s_kv, topk = 9, 95, 128
    q = non_contiguous((torch.randn(s_q, heads, 512, generator=generator) / 8).bfloat16())
    kv = non_contiguous(torch.randn(s_kv, 1, 512, generator=generator).bfloat16())
    indices = torch.randint(0, s_kv, (s_q, 1, topk), generator=generator).int()
    invalid = torch.tensor([-(2**31), -123456, -1, s_kv, 114514, 2**31 - 1], dtype=torch.int32)
    mask = torch.rand(indices.shape, generator=generator) < 0.3
    indices[mask] = invalid[torch.randint(0, len(invalid), (int(mask.sum()),), generator=generator)]
    indices[4] = 2**31 - 1
    indices = non_contiguous(indices)
    before = indices.clone()
    length = torch.randint(0, topk + 1, (s_q,), generator=generator).int() if with_length else None
    sink = torch.randn(heads, generator=generator)
    arguments = on(device, q, kv, indices, sink, length)
    out, max_logits, lse = flash_mla.flash_mla_sparse_fwd(
        *arguments[:3], sm_scale=0.5, attn_sink=arguments[3], topk_length=arguments[4]
    )
    for t in range(s_q):
        listed = indices[t, 0, : None if length is None else length[t]].long()
        rows = kv[listed[(listed >= 0) & (listed < s_kv)], 0].double()
        exact, exact_lse = reference(q[t].double(), rows, sink.double(), 0.5)
        close(out[t], exact)
        torch.testing.assert_close(lse[t].cpu().double(), exact_lse, rtol=1e-5, atol=1e-5)
        largest = (
            (0.5 * q[t].double() @ rows.T).amax(-1)
            if len(rows)
            else torch.full((heads,), float("-inf"))
        )
        torch.testing.assert_close(
            max_logits[t].cpu().double(), largest.double(), rtol=1e-5, atol=1e-5
        )
    assert (lse[4] == float("inf")).all() and (out[4] == 0).all()
    assert (max_logits[4] == float("-inf")).all()
    assert (indices == before).all()


def test_default_scale_and_inference_mode():
    generator = torch.Generator().manual_seed(3)
    cache, rows = make_cache(2, 64, generator)
    indices = torch.arange(64, dtype=torch.int32).view(1, 1, 64)
    with torch.inference_mode():
        q = torch.randn(1, 1, 8, 512, generator=generator).bfloat16()
        out, lse = flash_mla.flash_mla_with_kvcache(
            q,
            cache,
            None,
            None,
            512,
            flash_mla.get_mla_metadata()[0],
            is_fp8_kvcache=True,
            indices=indices,
        )
    exact, exact_lse = reference(
        q[0, 0].double(), rows[:64], torch.tensor(float("-inf")), 512**-0.5
    )
    close(out[0, 0], exact)
    torch.testing.assert_close(lse[0, :, 0].double(), exact_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_contiguous_tokens_have_the_bits_of_others(device):
    """One launch for all tokens of all sequences, or one for each token of a sequence."""
    generator = torch.Generator().manual_seed(5)
    cache, rows = make_cache(4, 64, generator)
    q = torch.randn(3, 4, 8, 512, generator=generator).bfloat16()
    indices = torch.randint(-1, len(rows), (3, 4, 90), generator=generator).int()
    length = torch.tensor([90, 0, 7], dtype=torch.int32)
    results = []
    for form in (lambda t: t, non_contiguous):
        dq, dcache, dindices, dlength = on(device, form(q), cache, form(indices), length)
        meta, _ = flash_mla.get_mla_metadata()
        results.append(
            flash_mla.flash_mla_with_kvcache(
                *(dq, dcache, None, None, 512, meta),
                is_fp8_kvcache=True,
                indices=dindices,
                topk_length=dlength,
            )
        )
    for one, other in zip(*results):
        assert one.shape == other.shape and torch.equal(one, other)


def test_refusals():
    generator = torch.Generator().manual_seed(4)
    cache, _ = make_cache(2, 64, generator)
    q = torch.zeros(1, 1, 8, 512).bfloat16()
    indices = torch.zeros(1, 1, 64, dtype=torch.int32)

    def call(message, code, **changes):
        arguments = dict(
            q=q,
            k_cache=cache,
            block_table=None,
            cache_seqlens=None,
            head_dim_v=512,
            tile_scheduler_metadata=flash_mla.get_mla_metadata()[0],
            is_fp8_kvcache=True,
            indices=indices,
        )
        with pytest.raises(dsv4.Error, match=message) as caught:
            flash_mla.flash_mla_with_kvcache(**{**arguments, **changes})
        assert caught.value.code == getattr(dsv4.ErrorCode, code)

    call("head_dim 576", "UNSUPPORTED", q=torch.zeros(1, 1, 8, 576).bfloat16())
    call("rows of 656 bytes", "UNSUPPORTED", k_cache=torch.zeros(2, 64, 1, 656, dtype=torch.uint8))
    call("dense rows", "UNSUPPORTED", indices=None)
    call("is_fp8_kvcache=False", "UNSUPPORTED", is_fp8_kvcache=False)
    call("129 query heads", "UNSUPPORTED", q=torch.zeros(1, 1, 129, 512).bfloat16())
    call("head_dim_v 448", "UNSUPPORTED", head_dim_v=448)
    call("causal", "INVALID_ARGUMENT", causal=True)
    call("come together", "INVALID_ARGUMENT", extra_k_cache=cache)
    call(
        "without extra_k_cache",
        "INVALID_ARGUMENT",
        extra_topk_length=torch.zeros(1, dtype=torch.int32),
    )
    call("get_mla_metadata", "INVALID_ARGUMENT", tile_scheduler_metadata=torch.zeros(1))
    call(r"indices is \[1, 1, 64\] torch.int64", "INVALID_ARGUMENT", indices=indices.long())
    call("attn_sink is", "INVALID_ARGUMENT", attn_sink=torch.zeros(9))
    meta, _ = flash_mla.get_mla_metadata()
    flash_mla.flash_mla_with_kvcache(
        q, cache, None, None, 512, meta, is_fp8_kvcache=True, indices=indices
    )
    call(
        "topk is 32, it was 64",
        "INVALID_ARGUMENT",
        tile_scheduler_metadata=meta,
        indices=indices[..., :32],
    )
    with pytest.raises(dsv4.Error, match="head_dim 576"):
        flash_mla.flash_mla_sparse_fwd(
            torch.zeros(1, 8, 576).bfloat16(),
            torch.zeros(4, 1, 576).bfloat16(),
            torch.zeros(1, 1, 4, dtype=torch.int32),
            1.0,
        )
