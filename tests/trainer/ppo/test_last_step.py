"""A run that is killed between a step's end and its checkpoint loses no line of its log."""

import pytest

from tests.trainer.ppo.test_best import VALUES, Crash, Trainer, latest, saved
from verl.trainer.ppo.checkpointing import Checkpoints


@pytest.mark.parametrize("published", [False, True])
def test_a_step_is_logged_before_its_checkpoint_counts(tmp_path, monkeypatch, published):
    """Killed at the checkpoint of step 5, before or after it has its name."""
    trainer = Trainer(tmp_path, VALUES, best_metric=None, test_freq=-1)

    def crash(checkpoints, state):
        if published:
            publish(checkpoints, state)
        raise Crash

    publish = Checkpoints.publish
    monkeypatch.setattr(Checkpoints, "publish", crash)
    with pytest.raises(Crash):
        trainer.fit()
    monkeypatch.undo()
    assert sorted(trainer.logged) == [0, 1, 2, 3, 4]
    again = Trainer(tmp_path, VALUES, best_metric=None, test_freq=-1)
    again.fit()
    assert sorted(again.logged) == list(range(5 if published else 0, 10))
    assert saved(tmp_path) == ("5 10", None) and latest(tmp_path) == 10
