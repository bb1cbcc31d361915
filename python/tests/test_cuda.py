"""On an NVIDIA GPU: torch tensors without a copy, streams, graphs, layer and engine."""

import pytest

torch = pytest.importorskip("torch")

import dsv4  # noqa: E402
from conftest import MODEL, BF16, gamma  # noqa: E402
from dsv4 import ops  # noqa: E402

GPUS = [report for report in dsv4.backends() if report["platform"] == "cuda" and report["usable"]]
pytestmark = pytest.mark.skipif(
    not (GPUS and torch.cuda.is_available()), reason="no NVIDIA GPU, or no kernels for it"
)


def stream():
    return torch.cuda.current_stream().cuda_stream


def assert_within(given, exact, bound):
    excess = ((given.double() - exact).abs() / bound).max().item()
    assert excess <= 1, f"{excess:.3g} times the bound"


def test_addresses():
    tensor = torch.zeros(4, 6, dtype=torch.bfloat16, device="cuda")
    assert dsv4.address_of(tensor) == tensor.data_ptr()
    assert dsv4.address_of(tensor[1:, 2:]) == tensor[1:, 2:].data_ptr()


def test_tensors_of_two_devices_are_refused():
    x = torch.zeros(2, 64, device="cuda")
    with pytest.raises(dsv4.Error, match="weight is on cpu, other arguments are on cuda:0"):
        ops.rms_norm(x, torch.ones(64), x)


def test_rms_norm_in_order_with_a_stream():
    side = torch.cuda.Stream()
    weight = torch.ones(4096, device="cuda")
    out = torch.empty(512, 4096, dtype=torch.bfloat16, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)  # x is not ready for long after the call
        x = torch.randn(512, 4096, device="cuda").bfloat16()
        ops.rms_norm(x, weight, out, eps=0, stream=stream())
    side.synchronize()
    exact = x.double() / x.double().pow(2).mean(-1, keepdim=True).sqrt()
    assert_within(out, exact, exact.abs() * (BF16 + gamma(4096 + 8)) + 1e-30)


def test_linear():
    x = torch.randn(33, 1024, device="cuda").bfloat16()
    w = torch.randn(256, 1024, device="cuda").bfloat16()
    out = torch.empty(33, 256, device="cuda")
    ops.linear(x, w, out, stream=stream())
    magnitude = x.double().abs() @ w.double().abs().T
    assert_within(out, x.double() @ w.double().T, gamma(1024 + 2) * magnitude)


def test_top_k():
    logits = torch.randint(-50, 50, (4, 30000), device="cuda").float()
    end = torch.tensor([30000, 700, 1, 0], dtype=torch.int32, device="cuda")
    indices = torch.full((4, 512), 77, dtype=torch.int32, device="cuda")
    length = torch.full((4,), 77, dtype=torch.int32, device="cuda")
    ops.top_k(logits, end, indices, length, stream=stream())
    for t, count in enumerate(end.tolist()):
        row = logits[t, :count].tolist()
        order = sorted(range(count), key=lambda i: (-row[i], i))[:512]
        assert length[t].item() == len(order)
        assert indices[t].tolist() == sorted(order) + [-1] * (512 - len(order))


def test_flash_mla_in_a_graph():
    import dsv4.flash_mla as flash_mla

    kv = torch.randn(4096, 1, 512, device="cuda").bfloat16()
    q = torch.randn(16, 64, 512, device="cuda").bfloat16()
    indices = torch.randint(0, 4096, (16, 1, 512), dtype=torch.int32, device="cuda")
    flash_mla.flash_mla_sparse_fwd(q, kv, indices, 0.05)  # kernels are loaded
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = flash_mla.flash_mla_sparse_fwd(q, kv, indices, 0.05)
    for _ in range(3):
        indices.random_(0, 4096)
        q.normal_()
        expected = flash_mla.flash_mla_sparse_fwd(q, kv, indices, 0.05)
        for tensor in captured:
            tensor.zero_()
        graph.replay()
        for ours, theirs in zip(captured, expected):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", ["sliding", "csa", "hca"])
def test_single_layer(kind):
    config = dsv4.ModelConfig.load(MODEL)
    layer = dsv4.SingleLayer.from_formula(
        config, kind, device="cuda:0", max_tokens=300, max_context=300, max_seqs=2
    )
    hidden = torch.randn(300, config.hidden_size, device="cuda").bfloat16()
    whole, chunks = torch.zeros_like(hidden), torch.zeros_like(hidden)
    sequence = layer.create_sequence()
    layer.forward([(sequence, 300)], hidden, whole, stream=stream())
    layer.release_sequence(sequence)
    sequence, begin = layer.create_sequence(), 0
    for count in (1, 127, 128, 1, 43):
        rows = slice(begin, begin + count)
        layer.forward([(sequence, count)], hidden[rows], chunks[rows], stream=stream())
        begin += count
    assert torch.equal(whole, chunks) and whole.abs().sum().item() > 0
    layer.release_sequence(sequence)
    sequence, host = layer.create_sequence(), torch.zeros_like(hidden, device="cpu")
    layer.forward([(sequence, 300)], hidden.cpu(), host)
    assert torch.equal(host, whole.cpu())


def test_generate():
    engine = dsv4.Engine.load(MODEL, device="cuda:0", max_context=128)
    assert "cuda:0" in engine.description or "NVIDIA" in engine.description
    first = engine.generate("ROMEO:", max_new_tokens=20)
    ids = [token.id for token in first]
    assert ids == [token.id for token in engine.generate("ROMEO:", max_new_tokens=20, chunk=1)]
    assert first.text == engine.tokenizer.decode(ids)
