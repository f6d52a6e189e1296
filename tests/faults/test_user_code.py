"""A user's function on a real run: whatever it does, the run does not end as if it were done."""

from __future__ import annotations

import pytest

from tests.faults.runs import trainer

pytestmark = [pytest.mark.faults, pytest.mark.distributed]


@pytest.mark.parametrize("way", ["exit()", "os._exit(0)"])
def test_a_reward_that_ends_the_process_in_the_second_step(folder, tmp_path, way):
    reward = tmp_path / "mine.py"
    reward.write_text(
        "import os\nseen = []\ndef compute_score(p, a, t):\n    seen.append(a)\n"
        f"    return 1.0 if len(seen) < 14 else {way}\n"
    )
    run = trainer(
        folder, tmp_path / "run", "stage=warmup", "trainer.critic_warmup=1", f"critic.model.path={folder}/base",
        "trainer.total_training_steps=4", f"custom_reward_function.path={reward}", "algorithm.task_reward_weight=1",
    )  # fmt: skip
    try:
        assert run.end() == 1
        assert run.left_behind(10) == []
    finally:
        run.stop()
    last = run.log.read_text().strip().splitlines()[-1]
    assert "mine.py:compute_score, data row" in last and "answer 1: raised RuntimeError: it tried to end" in last


def test_a_file_that_ends_the_process_when_it_is_run(folder, tmp_path):
    """And whose message has what a terminal would obey."""
    (tmp_path / "mine.py").write_text("print('it runs')\nexit('\\x1b]0;title\\x07')\n")
    run = trainer(folder, tmp_path / "run", "stage=seqkd", f"custom_reward_function.path={tmp_path}/mine.py")
    assert run.end() == 1
    assert "mine.py tried to end the process by SystemExit(\ufffd]0;title\ufffd)" in run.log.read_text()
