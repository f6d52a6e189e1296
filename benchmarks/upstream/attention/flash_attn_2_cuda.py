"""flash-attn's compiled half by PyTorch, which has a copy of the same kernels: for upstream verl on a machine that has
flash-attn's Python alone, which its source is enough for.

The functions are those that `flash_attn.flash_attn_interface` of 2.8.3 calls, with its arguments in its order.
Gradients are copied into the tensors that it hands over, which the compiled module writes into. What the kernels here
do not do is refused.
"""

import torch

_forward, _backward = torch.ops.aten._flash_attention_forward, torch.ops.aten._flash_attention_backward


def _refuse(**arguments: object) -> None:
    for name, value in arguments.items():
        if value is not None and value is not False and value != 0:
            raise NotImplementedError(f"flash_attn_2_cuda by PyTorch has no {name}: install flash-attn itself")


def _attend(q, k, v, segments, p_dropout, scale, causal, left, right):
    output, log_sums, state, _, mask = _forward(
        q, k, v, *segments, p_dropout, causal, False, scale=scale, window_size_left=left, window_size_right=right
    )
    return output, log_sums, mask, state


def _differentiate(dout, q, k, v, out, lse, into, segments, p_dropout, scale, causal, left, right, state):
    unused = torch.empty(0, device=q.device)
    gradients = _backward(
        dout, q, k, v, out, lse, *segments, p_dropout, causal, state, unused, scale=scale, window_size_left=left,
        window_size_right=right,
    )  # fmt: skip
    for tensor, gradient in zip(into, gradients, strict=True):
        tensor.copy_(gradient)
    return *into, unused


def fwd(q, k, v, out, alibi, p_dropout, scale, causal, left, right, softcap, return_softmax, generator):
    """Output (B, T, H, E) of q (B, T, H, E) over k and v (B, S, J, E), and log-sums (B, H, T)."""
    _refuse(out=out, alibi_slopes=alibi, softcap=softcap, return_softmax=return_softmax, generator=generator)
    segments = (None, None, q.shape[1], k.shape[1])
    return _attend(q, k, v, segments, p_dropout, scale, causal, left, right)


def varlen_fwd(
    q, k, v, out, starts_q, starts_k, seqused_k, leftpad_k, block_table, alibi, longest_q, longest_k, p_dropout, scale,
    zero_tensors, causal, left, right, softcap, return_softmax, generator,
):  # fmt: skip
    """Output (tokens, H, E) of rows that lie end to end, and log-sums (H, tokens)."""
    _refuse(out=out, seqused_k=seqused_k, leftpad_k=leftpad_k, block_table=block_table, zero_tensors=zero_tensors)
    _refuse(alibi_slopes=alibi, softcap=softcap, return_softmax=return_softmax, generator=generator)
    segments = (starts_q, starts_k, longest_q, longest_k)
    return _attend(q, k, v, segments, p_dropout, scale, causal, left, right)


def bwd(
    dout, q, k, v, out, lse, dq, dk, dv, alibi, p_dropout, scale, causal, left, right, softcap, deterministic,
    generator, state,
):  # fmt: skip
    """Fills dq, dk and dv."""
    _refuse(alibi_slopes=alibi, softcap=softcap, deterministic=deterministic, generator=generator)
    segments = (None, None, q.shape[1], k.shape[1])
    return _differentiate(dout, q, k, v, out, lse, (dq, dk, dv), segments, p_dropout, scale, causal, left, right, state)


def varlen_bwd(
    dout, q, k, v, out, lse, dq, dk, dv, starts_q, starts_k, alibi, longest_q, longest_k, p_dropout, scale,
    zero_tensors, causal, left, right, softcap, deterministic, generator, state,
):  # fmt: skip
    """Fills dq, dk and dv of rows that lie end to end."""
    _refuse(alibi_slopes=alibi, softcap=softcap, deterministic=deterministic, generator=generator)
    _refuse(zero_tensors=zero_tensors)
    segments = (starts_q, starts_k, longest_q, longest_k)
    return _differentiate(dout, q, k, v, out, lse, (dq, dk, dv), segments, p_dropout, scale, causal, left, right, state)
