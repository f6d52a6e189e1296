"""What torch's compiler keeps, where, and that an engine's settings for it stay the engine's."""

import os
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor import config as inductor
from torch._inductor.runtime.cache_dir_utils import cache_dir, default_cache_dir, triton_cache_dir

from tests.tiny import answer_rows, causal_lm, write_model
from tests.workers.updates_setup import settings
from verl.models.layers import (
    KEPT_IN,
    compile_layers,
    compile_seconds,
    compiler_as_before,
    keep_what_is_compiled,
    kinds_of_layers,
)
from verl.models.sharding import build_sharded_model


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    monkeypatch.setenv("VERL_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv(KEPT_IN, raising=False)


def test_it_is_kept_in_this_packages_cache(tmp_path):
    cache_dir()  # From here on torch's own default is in the environment.
    keep_what_is_compiled()
    assert cache_dir() == str(tmp_path / "cache" / "compiled")


def test_a_folder_that_the_environment_names_stays(monkeypatch, tmp_path):
    monkeypatch.setenv(KEPT_IN, str(tmp_path / "mine"))
    keep_what_is_compiled()
    assert cache_dir() == str(tmp_path / "mine")


def test_a_folder_that_cannot_be_made_is_left_to_torch(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VERL_CACHE_DIR", str(tmp_path / "file"))
    keep_what_is_compiled()
    assert cache_dir() == default_cache_dir()


def test_an_engine_changes_the_compiler_for_itself_alone(monkeypatch):
    """As vLLM does when it is imported and when it compiles its model."""
    monkeypatch.setenv("TRITON_CACHE_DIR", "/before")
    monkeypatch.delenv("TORCHINDUCTOR_COMPILE_THREADS", raising=False)
    with inductor.patch(compile_threads=7):
        with pytest.raises(RuntimeError), compiler_as_before():
            inductor.compile_threads = 1
            os.environ |= {"TORCHINDUCTOR_COMPILE_THREADS": "1", KEPT_IN: "/engine", "TRITON_CACHE_DIR": "/engine"}
            raise RuntimeError
        assert inductor.compile_threads == 7
    assert os.environ["TRITON_CACHE_DIR"] == "/before"
    assert not {"TORCHINDUCTOR_COMPILE_THREADS", KEPT_IN} & os.environ.keys()


def test_engines_share_the_kernels_that_are_theirs(monkeypatch, tmp_path):
    """vLLM's are Triton's, and the same whatever the engine; by itself each engine has them in a folder of its own."""
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    with compiler_as_before():
        assert triton_cache_dir(0) == str(tmp_path / "cache" / "kernels")
    assert "TRITON_CACHE_DIR" not in os.environ
    (tmp_path / "file").write_text("")
    for name, expected in (("VERL_CACHE_DIR", None), ("TRITON_CACHE_DIR", str(tmp_path / "file"))):
        monkeypatch.setenv(name, str(tmp_path / "file"))
        with compiler_as_before():
            assert os.environ.get("TRITON_CACHE_DIR") == expected


def test_a_graph_is_traced_once_and_found_again():
    """Layers share their graphs; after a restart, for which the compiler has to forget, these come from the cache."""
    ids = torch.arange(2, 9).unsqueeze(0)
    plain = causal_lm("llama")(ids).logits
    for again in (False, True):
        torch._dynamo.reset()
        counters.clear()
        model, before = causal_lm("llama"), compile_seconds()
        compile_layers(model)
        logits = model(ids).logits
        logits.sum().backward()
        torch.testing.assert_close(logits, plain, rtol=1e-4, atol=1e-4)
        assert compile_seconds() > before
        graphs, made = counters["stats"]["unique_graphs"], counters["aot_autograd"]
        assert graphs > 0
        assert (made["total"], made["autograd_cache_miss"], made["autograd_cache_hit"]) == (
            (graphs, 0, graphs) if again else (graphs, graphs, 0)
        )


@pytest.fixture
def built(one_rank, tmp_path):
    """Builds the student, or its reference, with layers to be compiled."""
    torch._dynamo.reset()
    counters.clear()
    group = settings("gspo").actor_rollout_ref
    model = replace(group.model, path=str(write_model(tmp_path / "model")))
    fsdp = replace(group.actor.fsdp_config, use_torch_compile=True)
    return partial(build_sharded_model, model, "policy", fsdp, "cpu")


ROWS = answer_rows([5, 5, 3], [4, 2, 3])


def test_a_reference_takes_no_graphs_of_its_own(built, monkeypatch):
    """Its passes have no gradients, and neither have the student's that came before."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    found, graphs = [], []
    for frozen in (False, True):
        with torch.no_grad():
            found.append(built(frozen=frozen).values(ROWS))
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1] > 0
    assert torch.equal(*found)


def test_the_integers_of_sharded_layers_are_constants(built, monkeypatch):
    taken = set()

    def backend(graph, inputs):
        taken.update(node.name for node in graph.graph.find_nodes(op="placeholder"))
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    built().values(ROWS).sum().backward()
    assert any("kwargs_place" in name for name in taken), taken
    assert [name for name in taken if "head_dim" in name] == []


def test_layers_with_numbers_of_their_own_are_told_from_layers_of_a_few_kinds():
    layers = [torch.nn.Sequential(torch.nn.Linear(4, 4)) for _ in range(6)]
    for number, layer in enumerate(layers):
        layer.layer_idx = layer[0].layer_idx = number
        layer.name = f"layer {number}"
        if number % 2:
            layer[0].window = 8
    assert kinds_of_layers(layers) == 1
    for number, layer in enumerate(layers):
        layer[0].heads = 2 + number % 3
    assert kinds_of_layers(layers) == 3
    for number, layer in enumerate(layers):
        layer.place = 2 * number
    assert kinds_of_layers(layers) == 6 and kinds_of_layers([]) == 1
