import math

import pytest
import torch

from verl.utils import torch_functional as tf

NAN, INF = float("nan"), float("inf")

# ---- masked statistics


def test_masked_sum_and_mean_ignore_what_the_mask_hides():
    values = torch.tensor([[1.0, 2.0, NAN], [4.0, INF, 100.0]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert tf.masked_sum(values, mask).item() == 7.0
    assert tf.masked_sum(values, mask, axis=-1).tolist() == [3.0, 4.0]
    assert tf.masked_mean(values, mask).item() == pytest.approx(7 / 3)
    assert tf.masked_mean(values, mask, axis=-1).tolist() == [1.5, 4.0]
    assert tf.masked_mean(values, mask, axis=0).tolist() == [2.5, 2.0, 0.0]  # an empty column gives 0


def test_masked_mean_gradient_is_one_over_the_count_under_the_mask():
    values = torch.tensor([1.0, 2.0, NAN, 4.0], requires_grad=True)
    tf.masked_mean(values, torch.tensor([1, 1, 0, 0])).backward()
    assert values.grad.tolist() == [0.5, 0.5, 0.0, 0.0]


def test_masked_var():
    values = torch.tensor([1.0, 3.0, 5.0, 99.0])
    mask = torch.tensor([1, 1, 1, 0])
    assert tf.masked_var(values, mask).item() == 4.0  # ((-2)^2 + 0 + 2^2) / 2
    assert tf.masked_var(values, mask, unbiased=False).item() == pytest.approx(8 / 3)
    with pytest.raises(ValueError, match="more than 1 value"):
        tf.masked_var(values, torch.tensor([1, 0, 0, 0]))
    with pytest.raises(ValueError, match="more than 0 value"):
        tf.masked_var(values, torch.zeros(4), unbiased=False)


def test_masked_whiten():
    values = torch.tensor([1.0, 3.0, 5.0, 7.0])
    mask = torch.tensor([1, 1, 1, 0])
    torch.testing.assert_close(tf.masked_whiten(values, mask), torch.tensor([-1.0, 0.0, 1.0, 2.0]))
    torch.testing.assert_close(tf.masked_whiten(values, mask, shift_mean=False), torch.tensor([2.0, 3.0, 4.0, 5.0]))


def test_clip_by_value_takes_numbers_and_tensors():
    x = torch.tensor([-5.0, 0.5, 5.0])
    assert tf.clip_by_value(x, -1.0, 2.0).tolist() == [-1.0, 0.5, 2.0]
    low, high = torch.tensor([-9.0, 1.0, 0.0]), torch.tensor([9.0, 2.0, 3.0])
    assert tf.clip_by_value(x, low, high).tolist() == [-5.0, 1.0, 3.0]


# ---- log-probs and entropy


def test_logprobs_from_logits_by_hand():
    # exp of the logits: 1, 2, 5 -> probabilities 1/8, 2/8, 5/8
    logits = torch.tensor([[[1.0, 2.0, 5.0], [5.0, 1.0, 2.0]]]).log()
    labels = torch.tensor([[2, 1]])
    log_probs = tf.logprobs_from_logits(logits, labels)
    assert log_probs.shape == (1, 2)
    torch.testing.assert_close(log_probs, torch.tensor([[math.log(5 / 8), math.log(1 / 8)]]))


def test_logprobs_from_bf16_logits_are_computed_in_fp32():
    logits = torch.linspace(-3, 3, 1000).to(torch.bfloat16).unsqueeze(0)
    labels = torch.tensor([400])
    expected = torch.log_softmax(logits.double(), dim=-1)[0, 400]
    result = tf.logprobs_from_logits(logits, labels)[0]
    assert result.dtype == torch.float32
    assert result.item() == pytest.approx(expected.item(), abs=1e-5)
    in_bf16 = torch.log_softmax(logits, dim=-1)[0, 400].item()
    assert abs(in_bf16 - expected.item()) > 1e-3  # so the test above can fail


def test_logprobs_gradient_is_one_hot_minus_softmax():
    logits = torch.tensor([1.0, 2.0, 5.0]).log().unsqueeze(0).requires_grad_()
    tf.logprobs_from_logits(logits, torch.tensor([2])).sum().backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[-1 / 8, -2 / 8, 3 / 8]]))


def test_logprobs_refuse_a_label_outside_the_vocabulary():
    with pytest.raises(RuntimeError, match="out of bounds"):
        tf.logprobs_from_logits(torch.zeros(1, 3), torch.tensor([-100]))


def test_entropy():
    uniform, certain = torch.zeros(4), torch.tensor([0.0, -INF, -INF, -INF])
    halves = torch.tensor([0.0, 0.0, -INF, -INF])
    logits = torch.stack([uniform, certain, halves]).requires_grad_()
    entropy = tf.entropy_from_logits(logits)
    torch.testing.assert_close(entropy, torch.tensor([math.log(4), 0.0, math.log(2)]))
    entropy.sum().backward()
    # dH/dlogit = -p (log p + H): zero in all three cases
    torch.testing.assert_close(logits.grad, torch.zeros(3, 4))


def test_entropy_gradient_by_hand():
    # p = 1/4, 3/4: dH/dlogit_i = -p_i (log p_i + H), and log p_1 + H = 3/4 (log 1/4 - log 3/4) = -3/4 log 3
    logits = torch.tensor([1.0, 3.0]).log().requires_grad_()
    tf.entropy_from_logits(logits).backward()
    slope = 3 / 16 * math.log(3)
    torch.testing.assert_close(logits.grad, torch.tensor([slope, -slope]))


# ---- masks, padding, truncation


def test_response_mask_ends_with_the_first_eos():
    ids = torch.tensor([[5, 6, 2, 2, 2], [2, 5, 6, 7, 8], [5, 6, 7, 8, 9], [5, 3, 2, 7, 3]])
    expected = [[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert tf.get_response_mask(ids, eos_token=2).tolist() == expected
    expected[3] = [1, 1, 0, 0, 0]
    several = tf.get_response_mask(ids, eos_token=[2, 3], dtype=torch.bool)
    assert several.dtype == torch.bool
    assert several.long().tolist() == expected


def test_pad_2d_list():
    lists = [[1, 2, 3], [4]]
    assert tf.pad_2d_list_to_length(lists, 0).tolist() == [[1, 2, 3], [4, 0, 0]]
    assert tf.pad_2d_list_to_length(lists, 9, max_length=4).tolist() == [[1, 2, 3, 9], [4, 9, 9, 9]]
    assert tf.pad_2d_list_to_length([[], []], 9, max_length=2).tolist() == [[9, 9], [9, 9]]
    assert tf.pad_2d_list_to_length([], 9, max_length=2).shape == (0, 2)
    with pytest.raises(ValueError, match="3 ids does not fit max_length=2"):
        tf.pad_2d_list_to_length(lists, 0, max_length=2)


def test_pad_sequence():
    ids = torch.tensor([[1, 2]])
    assert tf.pad_sequence_to_length(ids, 4, 7).tolist() == [[1, 2, 7, 7]]
    assert tf.pad_sequence_to_length(ids, 4, 7, left_pad=True).tolist() == [[7, 7, 1, 2]]
    assert tf.pad_sequence_to_length(ids, 2, 7).tolist() == [[1, 2]]
    with pytest.raises(ValueError, match="2 tokens do not fit max_seq_len=1"):
        tf.pad_sequence_to_length(ids, 1, 7)


def test_postprocess_pads_ids_and_mask():
    ids, mask = torch.tensor([[0, 5]]), torch.tensor([[1, 1]])
    padded = tf.postprocess_data(ids, mask, max_length=4, pad_token_id=0)
    assert [t.tolist() for t in padded] == [[[0, 0, 0, 5]], [[0, 0, 1, 1]]]
    padded = tf.postprocess_data(ids, mask, max_length=4, pad_token_id=0, left_pad=False)
    assert [t.tolist() for t in padded] == [[[0, 5, 0, 0]], [[1, 1, 0, 0]]]


@pytest.mark.parametrize(
    ("truncation", "kept", "kept_mask"),
    [("left", [3, 4, 5], [1, 1, 1]), ("right", [1, 2, 3], [0, 1, 1]), ("middle", [1, 4, 5], [0, 1, 1])],
)
def test_postprocess_truncates(truncation, kept, kept_mask):
    ids, mask = torch.tensor([[1, 2, 3, 4, 5]]), torch.tensor([[0, 1, 1, 1, 1]])
    cut_ids, cut_mask = tf.postprocess_data(ids, mask, max_length=3, pad_token_id=0, truncation=truncation)
    assert cut_ids.tolist() == [kept]
    assert cut_mask.tolist() == [kept_mask]


def test_postprocess_errors():
    ids, mask = torch.tensor([[1, 2, 3]]), torch.ones(1, 3)
    with pytest.raises(ValueError, match="3 tokens are more than max_length=2"):
        tf.postprocess_data(ids, mask, max_length=2, pad_token_id=0, truncation="error")
    with pytest.raises(ValueError, match="'top' is not one of"):
        tf.postprocess_data(ids, mask, max_length=2, pad_token_id=0, truncation="top")
    with pytest.raises(ValueError, match=r"\(3,\)"):
        tf.postprocess_data(ids[0], mask[0], max_length=4, pad_token_id=0)


# ---- schedules


def rates(make_schedule, steps: int) -> list[float]:
    """Learning rate of each of the first updates, for a base rate of 1."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = make_schedule(optimizer)
    used = []
    for _ in range(steps):
        used.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return used


def test_constant_schedule():
    assert rates(lambda o: tf.get_constant_schedule_with_warmup(o, 4), 6) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert rates(lambda o: tf.get_constant_schedule_with_warmup(o, 0), 2) == [1.0, 1.0]


def test_cosine_schedule():
    # 2 warmup steps, then 4 of decay: (1 + cos(pi/4)) / 2 = 0.853553, (1 + cos(3 pi/4)) / 2 = 0.146447
    used = rates(lambda o: tf.get_cosine_schedule_with_warmup(o, 2, 6), 9)
    assert used == pytest.approx([0.5, 1.0, 1.0, 0.853553, 0.5, 0.146447, 0.0, 0.0, 0.0], abs=1e-6)


def test_cosine_schedule_stops_at_its_minimum():
    used = rates(lambda o: tf.get_cosine_schedule_with_warmup(o, 0, 2, min_lr_ratio=0.2), 5)
    assert used == pytest.approx([1.0, 0.6, 0.2, 0.2, 0.2])
    # a whole cycle comes back up at the end
    used = rates(lambda o: tf.get_cosine_schedule_with_warmup(o, 0, 4, num_cycles=1.0), 5)
    assert used == pytest.approx([1.0, 0.5, 0.0, 0.5, 1.0])


def test_wsd_schedule():
    # 2 warmup, then 8 steps: half of them stable (2..6), 4 of cosine decay to 0.5
    used = rates(lambda o: tf.get_wsd_schedule_with_warmup(o, 2, 10, min_lr_ratio=0.5, stable_ratio=0.5), 12)
    decay = [0.926777, 0.75, 0.573223, 0.5, 0.5]
    assert used == pytest.approx([0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, *decay], abs=1e-6)


def test_schedule_resumes_where_it_stopped():
    def make():
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        return optimizer, tf.get_cosine_schedule_with_warmup(optimizer, 2, 6)

    optimizer, schedule = make()
    for _ in range(3):
        optimizer.step()
        schedule.step()
    _, resumed = make()
    resumed.load_state_dict(schedule.state_dict())
    assert resumed.get_last_lr() == pytest.approx([0.853553], abs=1e-6)
