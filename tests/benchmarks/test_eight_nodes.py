"""The plan of several nodes against figures by hand and the measured step, and the pages' table against the script."""

import re
from pathlib import Path

import pytest

from benchmarks.eight_nodes import MFU, Cluster, decode_limit, fsdp_seconds, main, plan, row_bytes
from benchmarks.shapes import SHAPES, Shape, training_flops
from verl.models.shape import LIMITS

DOCS = Path(__file__).parents[2] / "docs"
# A body of 204 parameters and an embedding of 40 (tests/benchmarks/test_common.py).
HAND = Shape("hand", hidden=4, layers=2, heads=2, kv_heads=1, intermediate=3, vocab=10, tied=True)


def test_collectives_by_hand():
    pairs = Cluster(nodes=2, gpus=2, nics=2, share=0.5, hop=0.001)
    # Three quarters of 8 GB pass each link; two NICs of 50 GB/s at half their rate are slower than NVLink's 225 GB/s.
    assert pairs.over_all(8e9, calls=0) == pytest.approx(6 / 50)
    assert pairs.over_all(0, calls=10) == pytest.approx(10 * 3 * 0.001)
    # Within a node half of it passes, on NVLink alone.
    assert pairs.in_node(9e9, calls=1) == pytest.approx(4.5 / 225 + 0.001)
    # Both ranks of a node send twice a half of their 1 GB, on its two NICs.
    assert pairs.between_nodes(1e9, calls=1) == pytest.approx(2 * 1 / 50 + 2 * 0.001)
    # NICs that are faster together than NVLink do not make it faster.
    assert Cluster(nodes=2, gpus=2, nics=20, share=0.5).over_all(9e9, calls=0) == pytest.approx(6.75 / 225)


def test_bytes_of_an_update_by_hand():
    cluster = Cluster(nodes=2, gpus=2, nics=2, share=0.5, hop=0.0)
    # Layers twice and the embedding once, in two bytes: 2 * (2 * 204 + 40) = 896; gradients in four: 976.
    assert fsdp_seconds(HAND, cluster, micro_batches=3) == pytest.approx((3 * 896 + 976) * 3 / 4 / 50e9)
    within = (3 * 896 + 976) / 2 / 225e9
    assert fsdp_seconds(HAND, cluster, 3, hybrid=True) == pytest.approx(within + 2 * 488 / 50e9)


def test_bytes_of_a_row_by_hand():
    # A prompt of 2 tokens is 32 bytes, 8 answers of 3 tokens 384, values of theirs 96, a teacher's answer 24 + 40.
    generate, critic, reference, actor = 32 + 384 + 96, 32 + 64 + 384, 32 + 384 + 96, 32 + 384 + 64 + 192
    assert row_bytes(2, 3, checked=0) == generate + critic + reference + actor
    assert row_bytes(2, 3, checked=0.5) == generate + critic + reference + actor + (32 + 384 + 192) / 2


def test_decoding_reads_the_weights_in_every_step():
    # 16 answers, of which one ends in every step: 488 bytes of weights, 16 of keys and values a token attended to. The
    # first step attends to 16 * (1 + 1) tokens, the second to 15 * (2 + 1), the last to 1 * (16 + 1).
    attended = sum((16 - step) * (2 + step) for step in range(16))
    expected = (16 * 488 + 16 * attended) / LIMITS["NVIDIA H200"].bandwidth
    assert decode_limit(HAND, 16, prompt=1, longest=16) == pytest.approx(expected)


def test_updates_of_the_measured_step():
    """1.5B, 64 prompts of 220 tokens and 8 answers of 256 on one H200: 2.99 s, 1.04 s and 2.70 s were measured."""
    shape, flops = SHAPES["1.5b"], LIMITS["NVIDIA H200"].flops
    actor = training_flops(shape, [476] * 512, [220] * 7 * 64)
    critic = training_flops(shape, [476] * 512 + [380] * 64, [220] * 8 * 64)
    assert actor / (MFU["actor"] * flops) == pytest.approx(2.99, rel=0.06)
    assert actor / 3 / (MFU["actor"] * flops) == pytest.approx(1.04, rel=0.06)
    assert critic / (MFU["critic"] * flops) == pytest.approx(2.70, rel=0.06)


def test_what_does_not_divide_is_refused(capsys):
    with pytest.raises(ValueError, match="--batch: expected a multiple of 64, got 100"):
        plan(HAND, Cluster(), 100, 512, 1536, 2048)
    with pytest.raises(SystemExit):
        main(["--longest", "1000"])
    assert "--longest: expected a multiple of 16, got 1000" in capsys.readouterr().err


def test_the_pages_have_the_scripts_table(capsys):
    main([])
    printed = capsys.readouterr().out.splitlines()
    assert "\n".join(printed) in (DOCS / "nodes.md").read_text(encoding="utf-8")
    chinese = (DOCS / "zh/nodes.md").read_text(encoding="utf-8").splitlines()
    cells = [line.split("|")[2:] for line in chinese]
    first = cells.index(printed[0].split("|")[2:])
    assert cells[first : first + len(printed)] == [line.split("|")[2:] for line in printed]
    assert all(re.search(r"[\u4e00-\u9fff]|^\|---", line) for line in chinese[first : first + len(printed)])
