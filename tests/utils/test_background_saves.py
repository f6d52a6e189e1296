"""A checkpoint that is written in the background is that of the moment at which it was begun."""

import filecmp
import os
import threading

import pytest
import torch

from tests.tiny import byte_tokenizer, causal_lm
from tests.utils import saves_on_two_ranks
from verl.utils.background import Background
from verl.utils.checkpoint.fsdp_checkpoint_manager import FSDPCheckpointManager
from verl.utils.checkpoint.sharded import HostShards, Shard, read_full_tensors


@pytest.mark.parametrize(("ranks", "offload"), [(1, False), (2, True)])
def test_training_goes_on_and_does_not_change_what_is_written(tmp_path, ranks, offload):
    torch.multiprocessing.spawn(saves_on_two_ranks.run, args=(ranks, tmp_path, offload), nprocs=ranks)
    kept = []
    for save in range(2):
        foreground, background = tmp_path / f"foreground{save}", tmp_path / f"background{save}"
        files = sorted(str(file.relative_to(foreground)) for file in foreground.rglob("*") if file.is_file())
        assert files == sorted(str(f.relative_to(background)) for f in background.rglob("*") if f.is_file())
        assert len([name for name in files if "shard-" in name]) == 2 * ranks
        for part in ("model", "optim"):
            expected, actual = read_full_tensors(foreground / part), read_full_tensors(background / part)
            assert actual.keys() == expected.keys()
            assert [name for name in expected if not torch.equal(actual[name], expected[name])] == []
        shardless = [name for name in files if "shard-" not in name]
        assert filecmp.cmpfiles(foreground, background, shardless, shallow=False)[1:] == ([], [])
        kept.append(read_full_tensors(background / "model"))
    assert any(not torch.equal(kept[0][name], kept[1][name]) for name in kept[0]), "the second is another"


@pytest.fixture
def manager():
    model = causal_lm(seed=5)
    optimizer = torch.optim.AdamW(model.parameters())
    model(input_ids=torch.ones(1, 4, dtype=torch.long)).logits.sum().backward()
    optimizer.step()
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    return FSDPCheckpointManager(model, optimizer, schedule, byte_tokenizer(), torch.float32)


def test_what_is_not_finite_is_refused_before_anything_is_copied(manager, tmp_path):
    with torch.no_grad():
        next(manager.model.parameters()).view(-1)[3] = torch.nan
    with pytest.raises(FloatingPointError, match="1 tensors of the actor are not finite"):
        manager.begin_checkpoint(tmp_path / "actor")
    assert not (tmp_path / "actor").exists()
    assert manager.is_written()


def test_the_next_one_waits_and_an_error_is_told_once(manager, tmp_path, monkeypatch):
    goes_on, write = threading.Event(), Shard.write
    monkeypatch.setattr(Shard, "write", lambda shard, folder: goes_on.wait(60) and write(shard, folder))
    manager.begin_checkpoint(tmp_path / "a")
    assert not manager.is_written()
    (tmp_path / "a" / "optim").rmdir()
    goes_on.set()
    with pytest.raises(Exception, match="optim"):
        while not manager.is_written():
            pass
    assert manager.is_written()
    manager.begin_checkpoint(tmp_path / "b")
    manager.begin_checkpoint(tmp_path / "c")
    assert len(list((tmp_path / "b").rglob("*.safetensors"))) == 2


def test_shards_have_the_mode_of_other_files(manager, tmp_path):
    manager.save_checkpoint(tmp_path / "actor")
    (tmp_path / "other").touch()
    shards = list((tmp_path / "actor").rglob("*.safetensors"))
    assert len(shards) == 2
    assert {os.stat(file).st_mode for file in shards} == {os.stat(tmp_path / "other").st_mode}


def test_the_host_memory_is_taken_once():
    host = HostShards()
    chunks = {"a": torch.arange(5.0), "b": torch.ones(2, 3, dtype=torch.bfloat16), "c": torch.tensor(7.0)}
    first = host.copy({"model": Shard("x", chunks, {})})["model"]
    assert all(torch.equal(first.chunks[name], chunk) for name, chunk in chunks.items())
    # Each chunk begins at a multiple of 512 bytes.
    place = first.chunks["a"].data_ptr()
    assert [chunk.data_ptr() - place for chunk in first.chunks.values()] == [0, 512, 1024]
    chunks["a"] += 1
    assert first.chunks["a"][0] == 0
    assert host.copy({"model": Shard("x", chunks, {})})["model"].chunks["a"].data_ptr() == place
    assert first.chunks["a"][0] == 1


def test_background_work_raises_where_it_is_waited_for():
    def fail() -> None:
        raise KeyError("x")

    work = Background(fail, "failing")
    work.join()
    assert not work.at_work
    with pytest.raises(KeyError):
        work.wait()
