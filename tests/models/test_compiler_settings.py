"""What torch's compiler keeps, where, and that an engine's settings for it stay the engine's."""

import os

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor import config as inductor
from torch._inductor.runtime.cache_dir_utils import cache_dir, default_cache_dir

from tests.tiny import causal_lm
from verl.models.layers import KEPT_IN, compile_layers, compile_seconds, compiler_as_before, keep_what_is_compiled


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
