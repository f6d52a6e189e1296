"""What stands in for flash-attn's compiled half when upstream verl is measured, against PyTorch's plain attention."""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

pytestmark = pytest.mark.gpu
HEADS, KV_HEADS, SIZE = 6, 2, 64


@pytest.fixture(scope="module")
def kernels():
    import benchmarks

    path = Path(benchmarks.__file__).parent / "upstream" / "attention" / "flash_attn_2_cuda.py"
    spec = importlib.util.spec_from_file_location("flash_attn_2_cuda", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def plain(q, k, v, gradient):
    """Output and gradients in fp32, of one row: q (T, H, E)."""
    leaves = [tensor.float().requires_grad_() for tensor in (q, k, v)]
    rows = [tensor.transpose(0, 1).unsqueeze(0) for tensor in leaves]
    output = scaled_dot_product_attention(*rows, is_causal=True, enable_gqa=True)[0].transpose(0, 1)
    return output, torch.autograd.grad(output, leaves, gradient.float())


def agree(got, expected):
    """To what bf16 keeps of numbers about 1 and of sums of a few of them."""
    assert (got.float() - expected).norm() <= 0.01 * expected.norm()


def test_rows_end_to_end(kernels):
    torch.manual_seed(0)
    lengths = [1, 130, 77]
    starts = torch.tensor([0, 1, 131, 208], device="cuda", dtype=torch.int32)
    q, k, v, gradient = (
        drawn(208, HEADS, SIZE),
        drawn(208, KV_HEADS, SIZE),
        drawn(208, KV_HEADS, SIZE),
        drawn(208, HEADS, SIZE),
    )
    scale, window = SIZE**-0.5, (-1, -1)
    output, log_sums, _, state = kernels.varlen_fwd(
        q,
        k,
        v,
        None,
        starts,
        starts,
        None,
        None,
        None,
        None,
        130,
        130,
        0.0,
        scale,
        False,
        True,
        *window,
        0.0,
        False,
        None,
    )
    into = [torch.empty_like(tensor) for tensor in (q, k, v)]
    kernels.varlen_bwd(
        gradient, q, k, v, output, log_sums, *into, starts, starts, None, 130, 130, 0.0, scale, False, True,
        *window, 0.0, False, None, state,
    )  # fmt: skip
    rows = [plain(*parts) for parts in zip(*(tensor.split(lengths) for tensor in (q, k, v, gradient)), strict=True)]
    agree(output, torch.cat([row[0] for row in rows]))
    for number, got in enumerate(into):
        agree(got, torch.cat([row[1][number] for row in rows]))


def test_padded_rows(kernels):
    torch.manual_seed(0)
    q, k, v, gradient = (drawn(1, 96, heads, SIZE) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS))
    scale, window = SIZE**-0.5, (-1, -1)
    output, log_sums, _, state = kernels.fwd(q, k, v, None, None, 0.0, scale, True, *window, 0.0, False, None)
    into = [torch.empty_like(tensor) for tensor in (q, k, v)]
    kernels.bwd(gradient, q, k, v, output, log_sums, *into, None, 0.0, scale, True, *window, 0.0, False, None, state)
    expected, gradients = plain(q[0], k[0], v[0], gradient[0])
    agree(output[0], expected)
    for got, one in zip(into, gradients, strict=True):
        agree(got[0], one)


def test_what_it_does_not_do(kernels):
    q = drawn(1, 8, HEADS, SIZE)
    with pytest.raises(NotImplementedError, match="softcap"):
        kernels.fwd(q, q, q, None, None, 0.0, 1.0, True, -1, -1, 30.0, False, None)
