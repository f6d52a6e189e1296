"""Tests of verl.protocol: row and column operations, refusals, serialisation, futures; numbers worked out by hand."""

import copy
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from tensordict import TensorDict

from tests.ranks import leave
from verl.protocol import (
    DataProto,
    DataProtoConfig,
    DataProtoFuture,
    DataProtoItem,
    all_gather_data_proto,
    collate_fn,
    deserialize_single_tensor,
    deserialize_tensordict,
    fold_batch_dim,
    list_of_dict_to_dict_of_list,
    pad_dataproto_to_divisor,
    serialize_single_tensor,
    serialize_tensordict,
    unfold_batch_dim,
    union_numpy_dict,
    union_tensor_dict,
    unpad_dataproto,
)


def make(rows: int, **meta_info) -> DataProto:
    """x = 0, 1, ...; y = (0, 0), (1, 10), ...; uid = "a", "b", ..."""
    index = torch.arange(rows)
    return DataProto.from_dict(
        tensors={"x": index, "y": torch.stack([index, index * 10], dim=1)},
        non_tensors={"uid": list("abcdefgh"[:rows])},
        meta_info=meta_info,
    )


def xs(data: DataProto) -> list[int]:
    return data.batch["x"].tolist()


def uids(data: DataProto) -> list[str]:
    return data.non_tensor_batch["uid"].tolist()


# ---------------------------------------------------------------- construction


def test_lists_become_one_dimensional_object_arrays():
    data = DataProto.from_dict(non_tensors={"ids": [[1, 2], [3, 4]], "n": np.array([1.5, 2.5])})
    assert len(data) == 2
    assert data.non_tensor_batch["ids"].shape == (2,)
    assert data.non_tensor_batch["ids"].dtype == object
    assert data.non_tensor_batch["ids"][1] == [3, 4]
    assert data.non_tensor_batch["n"].dtype == object


def test_refuses_columns_that_do_not_agree():
    with pytest.raises(ValueError, match=r"tensor 'b': expected 1 batch dims \(3,\), got \(2,\)"):
        DataProto.from_dict({"a": torch.zeros(3), "b": torch.zeros(2)})
    with pytest.raises(ValueError, match="'uid': expected 3 rows, got 2"):
        DataProto.from_dict({"a": torch.zeros(3)}, {"uid": ["a", "b"]})
    with pytest.raises(ValueError, match="'v': expected 2 rows, got 1"):
        DataProto.from_dict(non_tensors={"u": [1, 2], "v": [1]})
    with pytest.raises(ValueError, match="tensor 'a'"):
        DataProto.from_dict({"a": torch.tensor(1.0)})
    with pytest.raises(ValueError, match=r"batch size \[\]"):
        DataProto(batch=TensorDict({"a": torch.zeros(3)}, batch_size=[]))
    with pytest.raises(TypeError, match=r"'uid'.*str"):
        DataProto.from_dict(non_tensors={"uid": "ab"})


def test_check_consistency_finds_a_column_spoilt_later():
    data = make(3)
    data.non_tensor_batch["uid"] = ["a"]
    with pytest.raises(ValueError, match="'uid': expected 3 rows, got 1"):
        data.check_consistency()


def test_high_rank_tensors_and_two_batch_dims():
    tensors = {"a": torch.zeros(4, 3, 7), "b": torch.zeros(4, 3)}
    assert DataProto.from_dict(tensors).batch.batch_size == (4,)
    data = DataProto.from_dict(tensors, num_batch_dims=2)
    assert data.batch.batch_size == (4, 3)
    assert len(data) == 4
    with pytest.raises(ValueError, match=r"'c': expected 2 batch dims \(4, 3\), got \(4,\)"):
        DataProto.from_dict(tensors | {"c": torch.zeros(4)}, num_batch_dims=2)


def test_from_single_dict_sorts_by_kind():
    data = DataProto.from_single_dict({"x": torch.zeros(2), "uid": np.array(["a", "b"]), "l": [1, 2]}, {"step": 1})
    assert list(data.batch.keys()) == ["x"]
    assert set(data.non_tensor_batch) == {"uid", "l"}
    assert data.meta_info == {"step": 1}
    with pytest.raises(TypeError, match=r"'bad'.*int"):
        DataProto.from_single_dict({"bad": 3})


def test_tensordict_round_trip():
    data = DataProto.from_dict(
        {"x": torch.arange(2)}, {"ids": [[1, 2], [3, 4]], "same": ["s", "s"]}, {"step": 3, "none": None}
    )
    flat = data.to_tensordict()
    assert flat.batch_size == (2,)
    back = DataProto.from_tensordict(flat)
    assert list(back.batch.keys()) == ["x"]
    assert xs(back) == [0, 1]
    assert back.non_tensor_batch["ids"].tolist() == [[1, 2], [3, 4]]
    assert back.non_tensor_batch["same"].tolist() == ["s", "s"]
    assert back.meta_info == {"step": 3, "none": None}
    assert list(data.batch.keys()) == ["x"]
    with pytest.raises(ValueError, match="distinct keys"):
        DataProto.from_dict({"x": torch.zeros(1)}, meta_info={"x": 1}).to_tensordict()


def test_empty_batches():
    empty = DataProto(meta_info={"step": 1})
    assert len(empty) == 0
    assert [len(part) for part in empty.chunk(3)] == [0, 0, 0]
    assert empty.chunk(3)[2].meta_info == {"step": 1}
    assert len(DataProto.concat(empty.chunk(3))) == 0
    assert pad_dataproto_to_divisor(empty, 4) == (empty, 0)
    assert pickle.loads(pickle.dumps(empty)).meta_info == {"step": 1}
    assert DataProto.from_tensordict(empty.to_tensordict()).meta_info == {"step": 1}
    assert uids(DataProto.from_dict(non_tensors={"uid": ["a", "b"]}).repeat(2)) == ["a", "a", "b", "b"]
    none_left = make(3)[[]]
    assert len(none_left) == 0
    assert none_left.batch["y"].shape == (0, 2)
    assert pickle.loads(pickle.dumps(none_left)).batch["y"].shape == (0, 2)


# ---------------------------------------------------------------- rows


def test_int_index_gives_an_item():
    item = make(3, step=5)[-1]
    assert isinstance(item, DataProtoItem)
    assert item.batch["y"].tolist() == [2, 20]
    assert item.non_tensor_batch == {"uid": "c"}
    assert item.meta_info == {"step": 5}
    assert [row.non_tensor_batch["uid"] for row in make(3)] == ["a", "b", "c"]
    for row in (3, -4):
        with pytest.raises(IndexError, match="out of range for 3 rows"):
            make(3)[row]


@pytest.mark.parametrize(
    "index",
    [
        [2, 0],
        [-1, 0],
        np.array([2, 0]),
        torch.tensor([2, 0]),
        (2, 0),
    ],
)
def test_index_by_integers(index):
    picked = make(3, step=5)[index]
    assert xs(picked) == [2, 0]
    assert uids(picked) == ["c", "a"]
    assert picked.meta_info == {"step": 5}


@pytest.mark.parametrize("mask", [[True, False, True], np.array([1, 0, 1], bool), torch.tensor([1, 0, 1]).bool()])
def test_index_by_mask(mask):
    picked = make(3)[mask]
    assert xs(picked) == [0, 2]
    assert uids(picked) == ["a", "c"]


def test_refuses_wrong_indices():
    with pytest.raises(IndexError, match="out of range for 3 rows"):
        make(3).select_idxs([0, 3])
    with pytest.raises(ValueError, match="expected length 3, got 2"):
        make(3)[[True, False]]
    with pytest.raises(TypeError, match="float"):
        make(3)[[0.5]]
    with pytest.raises(ValueError, match="1-D"):
        make(3)[[[0], [1]]]


def test_slice_is_a_view_and_select_a_copy():
    data = make(4)
    view = data.slice(1, 4, 2)
    assert xs(view) == [1, 3]
    assert uids(view) == ["b", "d"]
    view.batch["x"][0] = 100
    assert xs(data) == [0, 100, 2, 3]
    picked = data[[0, 1]]
    picked.batch["x"][0] = -1
    picked.meta_info["new"] = 1
    assert xs(data) == [0, 100, 2, 3]
    assert data.meta_info == {}


def test_repeat():
    assert xs(make(2).repeat(3)) == [0, 0, 0, 1, 1, 1]
    tiled = make(2).repeat(3, interleave=False)
    assert xs(tiled) == [0, 1, 0, 1, 0, 1]
    assert uids(tiled) == ["a", "b", "a", "b", "a", "b"]


def test_sample_level_repeat():
    repeated = make(3).sample_level_repeat(torch.tensor([2, 0, 1]))
    assert xs(repeated) == [0, 0, 2]
    assert uids(repeated) == ["a", "a", "c"]
    with pytest.raises(ValueError, match="expected 3 counts"):
        make(3).sample_level_repeat([1, 2])


def test_reorder_in_place():
    data = make(3)
    data.reorder(torch.tensor([2, 0, 1]))
    assert xs(data) == [2, 0, 1]
    assert uids(data) == ["c", "a", "b"]
    for indices in ([0, 0, 1], [0, 1]):
        with pytest.raises(ValueError, match="permutation of 3 rows"):
            data.reorder(indices)


def test_chunk_and_concat():
    data = make(4, step=1)
    parts = data.chunk(2)
    assert [xs(part) for part in parts] == [[0, 1], [2, 3]]
    joined = DataProto.concat(parts)
    assert xs(joined) == [0, 1, 2, 3]
    assert uids(joined) == ["a", "b", "c", "d"]
    assert joined.meta_info == {"step": 1}
    with pytest.raises(ValueError, match="divisible by 3, got 4"):
        data.chunk(3)


def test_chunk_of_an_uneven_size_when_padding_is_enabled(monkeypatch):
    data = DataProto.from_dict({"x": torch.arange(6)}, auto_padding=True)
    assert data.is_padding_enabled()
    assert [xs(part) for part in data.chunk(4)] == [[0, 1], [2, 3], [4], [5]]
    assert pickle.loads(pickle.dumps(data[:5])).is_padding_enabled()
    assert not make(3).is_padding_enabled()
    monkeypatch.setenv("VERL_AUTO_PADDING", "TRUE")
    assert [xs(part) for part in make(3).chunk(2)] == [[0, 1], [2]]
    try:
        DataProtoConfig.auto_padding = False
        assert not make(3).is_padding_enabled()
        monkeypatch.delenv("VERL_AUTO_PADDING")
        DataProtoConfig.auto_padding = True
        assert make(3).is_padding_enabled()
    finally:
        DataProtoConfig.auto_padding = None
    assert not make(3).is_padding_enabled()


def test_split():
    assert [xs(part) for part in make(5).split(2)] == [[0, 1], [2, 3], [4]]
    with pytest.raises(ValueError, match="split_size >= 1"):
        make(5).split(0)


def test_concat_meta_info():
    joined = DataProto.concat([make(1, metrics={"loss": 1.0}, t=0.5), make(1, metrics={"loss": 3.0}, only=1)])
    assert joined.meta_info == {"metrics": [{"loss": 1.0}, {"loss": 3.0}], "t": 0.5, "only": 1}
    joined = DataProto.concat([make(1, metrics=[{"a": 1}, {"a": 2}]), make(1, metrics=[{"a": 3}])])
    assert joined.meta_info["metrics"] == [{"a": 1}, {"a": 2}, {"a": 3}]
    with pytest.raises(ValueError, match=r"'temperature' differs.*0\.5, 1\.0"):
        DataProto.concat([make(1, temperature=0.5), make(1, temperature=1.0)])


def test_concat_does_not_extend_the_parts_metrics():
    parts = [make(1, metrics=[{"a": 1}]), make(1, metrics=[{"a": 2}])]
    DataProto.concat(parts)
    assert parts[0].meta_info["metrics"] == [{"a": 1}]


def test_concat_refuses_different_keys():
    with pytest.raises(ValueError, match="expected the keys"):
        DataProto.concat([make(1), make(1).select(["x"])])
    with pytest.raises(ValueError, match="at least one"):
        DataProto.concat([])


def test_concat_keeps_one_dimensional_object_columns():
    joined = DataProto.concat([DataProto.from_dict(non_tensors={"ids": [[1, 2]]}) for _ in range(2)])
    assert joined.non_tensor_batch["ids"].shape == (2,)
    assert joined.non_tensor_batch["ids"][1] == [1, 2]


@pytest.mark.parametrize(("rows", "divisor", "expected"), [(3, 4, [0, 1, 2, 0]), (2, 7, [0, 1, 0, 1, 0, 1, 0])])
def test_pad_and_unpad(rows, divisor, expected):
    padded, pad_size = pad_dataproto_to_divisor(make(rows, step=1), divisor)
    assert pad_size == divisor - rows
    assert xs(padded) == expected
    assert uids(padded) == ["abc"[row] for row in expected]
    assert padded.meta_info == {"step": 1}
    assert xs(unpad_dataproto(padded, pad_size)) == list(range(rows))


def test_pad_size_zero_and_wrong_pad_size():
    padded, pad_size = pad_dataproto_to_divisor(make(4), 2)
    assert (xs(padded), pad_size) == ([0, 1, 2, 3], 0)
    assert xs(unpad_dataproto(padded, 0)) == [0, 1, 2, 3]
    for wrong in (-1, 5):
        with pytest.raises(ValueError, match=f"between 0 and 4, got {wrong}"):
            unpad_dataproto(padded, wrong)


def test_padding_in_place():
    data = make(3)
    data.padding(2)
    data.padding(1, "last")
    assert xs(data) == [0, 1, 2, 0, 0, 0]
    data = make(3)
    data.padding(2, "last")
    assert uids(data) == ["a", "b", "c", "c", "c"]
    with pytest.raises(ValueError, match="got 'middle'"):
        data.padding(1, "middle")
    with pytest.raises(ValueError, match="at least one row"):
        DataProto().padding(1)


def test_make_iterator():
    data = make(6, step=1)
    plain = list(data.make_iterator(mini_batch_size=2, epochs=2))
    assert [xs(part) for part in plain] == [[0, 1], [2, 3], [4, 5]] * 2
    assert plain[0].meta_info == {"step": 1}

    def shuffled(seed: int) -> list[list[int]]:
        return [xs(part) for part in data.make_iterator(2, 2, seed, {"shuffle": True})]

    first = shuffled(7)
    torch.rand(3)  # the global generator must not matter
    assert shuffled(7) == first
    assert shuffled(8) != first
    for epoch in (first[:3], first[3:]):
        assert sorted(row for part in epoch for row in part) == [0, 1, 2, 3, 4, 5]
    assert first[:3] != first[3:]
    with pytest.raises(ValueError, match="divide 6, got 4"):
        data.make_iterator(4, 1)


def test_unfold_column_chunks():
    data = DataProto.from_dict(
        {"x": torch.arange(2), "ids": torch.arange(8).reshape(2, 4), "z": torch.arange(12).reshape(2, 2, 3)},
        {"uid": ["a", "b"]},
    )
    out = data.unfold_column_chunks(2)
    assert xs(out) == [0, 0, 1, 1]
    assert uids(out) == ["a", "a", "b", "b"]
    assert out.batch["ids"].tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert out.batch["z"].tolist() == [[[0, 1, 2]], [[3, 4, 5]], [[6, 7, 8]], [[9, 10, 11]]]
    out = data.unfold_column_chunks(2, split_keys=["ids"])
    assert out.batch["z"].shape == (4, 2, 3)
    with pytest.raises(ValueError, match=r"'z'.*divisible by 4, got shape \(2, 2, 3\)"):
        data.unfold_column_chunks(4)
    with pytest.raises(KeyError, match="uid"):
        data.unfold_column_chunks(2, split_keys=["uid"])


def test_fold_and_unfold_batch_dim():
    folded = fold_batch_dim(make(6, step=1), 2)
    assert len(folded) == 2
    assert folded.batch["x"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert folded.batch["y"].shape == (2, 3, 2)
    assert folded.non_tensor_batch["uid"].tolist() == [["a", "b", "c"], ["d", "e", "f"]]
    assert uids(folded[[1]]) == [["d", "e", "f"]]
    flat = unfold_batch_dim(folded)
    assert xs(flat) == [0, 1, 2, 3, 4, 5]
    assert flat.batch["y"].tolist()[5] == [5, 50]
    assert uids(flat) == list("abcdef")
    assert flat.meta_info == {"step": 1}
    with pytest.raises(ValueError, match="4 to divide the row count, got 6"):
        fold_batch_dim(make(6), 4)


# ---------------------------------------------------------------- columns


def test_select():
    data = make(2, step=1, t=2)
    picked = data.select(["x"], [], ["t"])
    assert (list(picked.batch.keys()), picked.non_tensor_batch, picked.meta_info) == (["x"], {}, {"t": 2})
    assert set(data.select().batch.keys()) == {"x", "y"}
    assert len(data.select(batch_keys=[], non_tensor_batch_keys=[])) == 2
    for wrong in ({"batch_keys": ["no"]}, {"non_tensor_batch_keys": ["no"]}, {"meta_info_keys": ["no"]}):
        with pytest.raises(KeyError, match="no"):
            data.select(**wrong)


def test_select_shares_tensors_unless_deepcopy():
    data = DataProto.from_dict({"x": torch.arange(2)}, {"ids": [[1], [2]]})
    deep, shallow = data.select(deepcopy=True), data.select()
    data.batch["x"][0] = 9
    data.non_tensor_batch["ids"][0].append(9)
    assert (xs(shallow), shallow.non_tensor_batch["ids"][0]) == ([9, 1], [1, 9])
    assert (xs(deep), deep.non_tensor_batch["ids"][0]) == ([0, 1], [1])


def test_pop():
    data = make(3, step=1, t=2)
    popped = data.pop(["x"], ["uid"], ["t"])
    assert (xs(popped), uids(popped), popped.meta_info) == ([0, 1, 2], ["a", "b", "c"], {"t": 2})
    assert (list(data.batch.keys()), data.non_tensor_batch, data.meta_info) == (["y"], {}, {"step": 1})
    with pytest.raises(KeyError, match="no"):
        data.pop(["y"], ["no"])
    assert list(data.batch.keys()) == ["y"]
    assert data.pop(meta_info_keys=["step"]).batch is None
    data.pop(["y"])
    assert len(data) == 3


def test_rename():
    data = make(2)
    data.rename("x", "z")
    assert data.batch["z"].tolist() == [0, 1]
    data.rename(["z", "y"], ["y", "z"])
    assert data.batch["y"].tolist() == [0, 1]
    assert data.batch["z"].tolist() == [[0, 0], [1, 10]]
    with pytest.raises(ValueError, match="distinct"):
        data.rename("y", "z")
    with pytest.raises(ValueError, match="expected 1 new keys, got 2"):
        data.rename("y", ["a", "b"])
    with pytest.raises(KeyError, match="no"):
        data.rename("no", "z")


def test_union_adds_and_returns_self():
    data = make(2, step=1)
    other = DataProto.from_dict({"w": torch.ones(2), "x": torch.arange(2)}, {"v": [1, 2]}, {"t": 2, "step": 1})
    assert data.union(other) is data
    assert set(data.batch.keys()) == {"x", "y", "w"}
    assert set(data.non_tensor_batch) == {"uid", "v"}
    assert data.meta_info == {"step": 1, "t": 2}
    assert set(other.batch.keys()) == {"w", "x"}


def test_union_treats_nan_as_equal():
    nan = float("nan")

    def table() -> DataProto:
        return DataProto.from_dict(
            {"x": torch.tensor([nan, 1.0])},
            {"o": [{"s": nan}, [np.float32("nan"), np.array([nan])]]},
            {"m": (nan, torch.tensor(nan))},
        )

    merged = table().union(table())
    assert merged.batch["x"].isnan().tolist() == [True, False]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (DataProto.from_dict({"new": torch.zeros(2), "x": torch.tensor([0, 2])}), "tensor key 'x'"),
        (DataProto.from_dict({"new": torch.zeros(2), "x": torch.tensor([0.0, 1.0])}), "tensor key 'x'"),
        (DataProto.from_dict({"new": torch.zeros(2)}, {"uid": ["a", "c"]}), "non-tensor key 'uid'"),
        (DataProto.from_dict({"new": torch.zeros(2)}, {"uid": ["a", ["b"]]}), "non-tensor key 'uid'"),
        (DataProto.from_dict({"new": torch.zeros(2)}, meta_info={"step": 2}), "meta_info key 'step'"),
        (DataProto.from_dict({"new": torch.zeros(3)}), "expected 2 rows, got 3"),
    ],
)
def test_union_refuses_conflicts_and_leaves_self(other, message):
    data = make(2, step=1)
    with pytest.raises(ValueError, match=message):
        data.union(other)
    assert set(data.batch.keys()) == {"x", "y"}
    assert data.meta_info == {"step": 1}


def test_union_with_meta_info_only():
    assert len(make(2).union(DataProto(meta_info={"a": 1}))) == 2
    empty = DataProto(meta_info={"a": 1}).union(make(2))
    assert (xs(empty), empty.meta_info) == ([0, 1], {"a": 1})


def test_union_functions():
    a = TensorDict({"x": torch.ones(2)}, batch_size=[2])
    assert set(union_tensor_dict(a, TensorDict({"y": torch.ones(2)}, batch_size=[2])).keys()) == {"x", "y"}
    with pytest.raises(ValueError, match=r"expected batch size \(2,\), got \(3,\)"):
        union_tensor_dict(a, TensorDict({}, batch_size=[3]))
    nan = np.array([float("nan"), None, "a"], dtype=object)
    assert set(union_numpy_dict({"k": nan}, {"k": nan.copy(), "l": nan})) == {"k", "l"}
    with pytest.raises(ValueError, match="'k'"):
        union_numpy_dict({"k": nan}, {"k": np.array([float("nan"), None, "b"], dtype=object)})


def test_list_of_dict_to_dict_of_list():
    assert list_of_dict_to_dict_of_list([{"a": 1, "b": 2}, {"a": 3, "b": 4}]) == {"a": [1, 3], "b": [2, 4]}
    assert list_of_dict_to_dict_of_list([]) == {}
    with pytest.raises(ValueError, match=r"dict 1: expected keys \['a'\], got \['b'\]"):
        list_of_dict_to_dict_of_list([{"a": 1}, {"b": 1}])


def test_collate_fn_undoes_indexing():
    data = make(3, step=1)
    back = collate_fn([data[2], data[0]])
    assert isinstance(back.batch, TensorDict)
    assert back.batch["y"].tolist() == [[2, 20], [0, 0]]
    assert uids(back) == ["c", "a"]
    assert back.meta_info == {"step": 1}


def test_info_and_size(capsys):
    data = make(2, step=1)
    assert data.get_data_info().splitlines() == [
        "batch/x: torch.int64 (2,) cpu",
        "batch/y: torch.int64 (2, 2) cpu",
        "non_tensor_batch/uid: (2,) of str",
        "meta_info/step: int",
    ]
    DataProto.from_dict({"x": torch.zeros(2, 2**17)}).print_size("rollout:")
    assert capsys.readouterr().out.startswith("rollout: 2 rows: tensors 1.000 MiB, objects 0.000 MiB")


def test_to_moves_in_place():
    data = make(2)
    assert data.to("meta") is data
    assert data.batch["x"].device.type == "meta"


# ---------------------------------------------------------------- serialisation


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
        torch.tensor([[True, False]]),
        torch.arange(6).reshape(2, 3).T,
        torch.tensor(7, dtype=torch.int32),
        torch.empty(0, 4, dtype=torch.float16),
        torch.tensor([1.0], requires_grad=True),
    ],
)
def test_single_tensor_round_trip(tensor):
    dtype, shape, data = serialize_single_tensor(tensor)
    assert len(data) == tensor.numel() * tensor.element_size()
    back = deserialize_single_tensor((dtype, shape, data))
    assert back.dtype == tensor.dtype
    assert torch.equal(back, tensor.detach())
    back.zero_()  # writable


def test_serialized_bytes():
    assert serialize_single_tensor(torch.tensor([1.0], dtype=torch.bfloat16)) == ("bfloat16", (1,), b"\x80\x3f")
    assert serialize_single_tensor(torch.tensor([[1, 258]], dtype=torch.int16)) == ("int16", (1, 2), b"\x01\0\x02\x01")


def test_tensordict_serialisation_round_trip():
    td = TensorDict({"a": torch.arange(6).reshape(2, 3), "b": torch.ones(2, 3, 1).bfloat16()}, batch_size=[2, 3])
    back = deserialize_tensordict(serialize_tensordict(td))
    assert back.batch_size == (2, 3)
    assert torch.equal(back["a"], td["a"])
    assert back["b"].dtype == torch.bfloat16


def test_pickle_round_trip():
    data = DataProto.from_dict({"x": torch.arange(2).bfloat16()}, {"ids": [[1, 2], [3, 4]]}, {"step": 1})
    back = pickle.loads(pickle.dumps(data))
    assert back.batch["x"].dtype == torch.bfloat16
    assert xs(back) == [0.0, 1.0]
    assert back.non_tensor_batch["ids"].tolist() == [[1, 2], [3, 4]]
    assert back.meta_info == {"step": 1}


def test_pickled_view_leaves_its_parent_behind():
    data = DataProto.from_dict({"x": torch.zeros(1000, 1000)}, {"s": ["x" * 1000 + str(i) for i in range(1000)]})
    assert len(pickle.dumps(data)) > 4_000_000 + 1_000_000
    size = len(pickle.dumps(data[:2]))
    assert 2 * (4000 + 1001) < size < 2 * (4000 + 1001) + 2000


def test_deepcopy_keeps_the_device():
    copied = copy.deepcopy(make(2).to("meta"))
    assert copied.batch["x"].device.type == "meta"


def test_save_and_load(tmp_path):
    path = tmp_path / "data.pt"
    data = DataProto.from_dict(
        {"x": torch.arange(4).bfloat16()},
        {
            "ids": [[1, 2], [3, 4], [5], []],
            "np": [np.float32(0.5), np.array([1, 2], dtype=np.int32), {"k": (1, None)}, torch.ones(1)],
        },
        {"step": np.int64(3), "names": ["a"]},
        auto_padding=True,
    )
    data.save_to_disk(path)
    back = DataProto.load_from_disk(path)
    assert torch.equal(back.batch["x"], data.batch["x"])
    assert back.non_tensor_batch["ids"].tolist() == [[1, 2], [3, 4], [5], []]
    number, array, record, tensor = back.non_tensor_batch["np"]
    assert (number, record) == (0.5, {"k": (1, None)})
    assert (array.tolist(), array.dtype) == ([1, 2], np.int32)
    assert torch.equal(tensor, torch.ones(1))
    assert back.meta_info == {"step": 3, "names": ["a"]}
    assert back.is_padding_enabled()


def test_save_keeps_the_shape_of_folded_objects(tmp_path):
    fold_batch_dim(make(4), 2).save_to_disk(tmp_path / "data.pt")
    back = DataProto.load_from_disk(tmp_path / "data.pt")
    assert back.non_tensor_batch["uid"].shape == (2, 2)
    assert uids(unfold_batch_dim(back)) == ["a", "b", "c", "d"]


def test_saved_view_is_small(tmp_path):
    DataProto.from_dict({"x": torch.zeros(1000, 1000)})[:2].save_to_disk(tmp_path / "data.pt")
    assert (tmp_path / "data.pt").stat().st_size < 8000 + 4000


def test_save_refuses_what_cannot_be_loaded_safely(tmp_path):
    with pytest.raises(TypeError, match=r"meta_info\.fn: cannot save a type"):
        DataProto(meta_info={"fn": DataProto}).save_to_disk(tmp_path / "data.pt")


def test_load_runs_no_pickled_code(tmp_path):
    torch.save({"batch_size": None, "meta_info": DataProto(meta_info={"a": 1})}, tmp_path / "data.pt")
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        DataProto.load_from_disk(tmp_path / "data.pt")


# ---------------------------------------------------------------- several processes


def test_import_needs_no_ray():
    code = "import sys; sys.modules['ray'] = None; import verl.protocol"
    subprocess.run([sys.executable, "-c", code], check=True)


def _gather(rank: int, init_file: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{init_file}", rank=rank, world_size=2)
    data = make(4, rank=rank)[2 * rank : 2 * rank + 2]
    all_gather_data_proto(data, None)
    assert xs(data) == [0, 1, 2, 3]
    assert uids(data) == ["a", "b", "c", "d"]
    assert data.meta_info == {"rank": rank}
    leave()


@pytest.mark.distributed
def test_all_gather(tmp_path):
    torch.multiprocessing.spawn(_gather, args=(str(tmp_path / "init"),), nprocs=2)


@pytest.mark.distributed
def test_future():
    import ray

    ray.init(address="local", num_cpus=1, include_dashboard=False)
    try:
        future = DataProtoFuture.concat([ray.put(make(4)[:2]), ray.put(make(4)[2:])])
        assert xs(future.get()) == [0, 1, 2, 3]
        halves = future.chunk(2)
        assert [xs(half.get()) for half in halves] == [[0, 1], [2, 3]]
        assert [xs(quarter.get()) for quarter in halves[1].chunk(2)] == [[2], [3]]
        # A future is itself sent to workers, which resolve it there.
        remote = ray.remote(lambda part: part.get().batch["x"].tolist())
        assert ray.get(remote.remote(halves[1])) == [2, 3]
    finally:
        ray.shutdown()
