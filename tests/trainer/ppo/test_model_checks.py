"""What is said of a run's models before any process starts."""

import json
import os

import pytest
from transformers import GenerationConfig, Qwen2Config

from tests.tiny import byte_tokenizer, scorer, write_model
from verl.models.loading import load_config, load_model
from verl.models.tokenizer import all_eos_token_ids, load_tokenizer
from verl.trainer import first_look
from verl.trainer.config import compose_config
from verl.trainer.config.paths import with_absolute_paths
from verl.trainer.ppo.model_checks import check_models
from verl.utils.checkpoint.best_link import point_best


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    path = tmp_path_factory.mktemp("models")
    write_model(path / "student")
    scorer().save_pretrained(path / "critic")
    byte_tokenizer().save_pretrained(path / "critic")
    scorer().save_pretrained(path / "foreign")
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["another"])
    tokenizer.save_pretrained(path / "foreign")
    return path


def config(models, critic, *overrides):
    return compose_config(
        [
            "data.train_files=x",
            f"actor_rollout_ref.model.path={models}/student",
            f"critic.model.path={models}/{critic}",
            "trainer.experiment_name=x",
            "data.max_prompt_length=64",
            "data.max_response_length=64",
            *overrides,
        ]
    )


def test_a_pair_that_belongs_together_passes(models):
    assert check_models(config(models, "critic", "stage=gad")).eos_token_id == 1


def test_a_critic_with_tokens_that_it_has_no_embedding_for_is_refused(models):
    """Its tokenizer is another than the student's, and which of its tokens answers will have is not known."""
    with pytest.raises(ValueError, match=r"critic\.model\.path=.*foreign: token .* has 260 rows"):
        check_models(config(models, "foreign", "stage=gad"))


def test_gad_wants_a_warmed_up_critic_and_warmup_does_not(models):
    with pytest.raises(ValueError, match="untrained discriminator"):
        check_models(config(models, "student", "stage=gad"))
    check_models(config(models, "student", "stage=warmup"))


def test_a_missing_critic_is_found_at_once(models):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        check_models(config(models, "nowhere", "stage=gad"))


def test_seqkd_never_looks_at_a_critic(models):
    check_models(config(models, "nowhere", "stage=seqkd"))


def test_paths_become_absolute(models, monkeypatch):
    monkeypatch.chdir(models)
    made = with_absolute_paths(
        compose_config(["data.train_files=x", "actor_rollout_ref.model.path=student", "trainer.experiment_name=x"])
    )
    assert made.actor_rollout_ref.model.path == made.critic.model.path == os.path.join(models, "student")
    assert made.actor_rollout_ref.model.tokenizer_path is None


def test_a_tokenizer_without_eos_is_refused(models, tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    load_config(models / "student", "policy").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no eos_token"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_may_lie_in_a_folder_of_its_own(models, tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = "<bot>"
    tokenizer.save_pretrained(tmp_path / "chat")
    model = f"actor_rollout_ref.model.tokenizer_path={tmp_path}/chat"
    assert check_models(config(models, "student", "stage=warmup", model)).eos_token_id == 3
    with pytest.raises(FileNotFoundError, match="holds no model"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_that_makes_other_ids_than_its_file_is_refused(models, tmp_path):
    write_model(tmp_path / "m")
    file = tmp_path / "m" / "tokenizer.json"
    saved = json.loads(file.read_text())
    saved["normalizer"] = {"type": "Lowercase"}
    file.write_text(json.dumps(saved))
    # transformers takes the class of the model's type, which builds its pieces itself.
    paths = f"actor_rollout_ref.model.path={tmp_path}/m"
    with pytest.raises(ValueError, match=r"Qwen2Tokenizer\) is not the one in its tokenizer\.json.*config\.json, into"):
        check_models(config(models, "critic", "stage=seqkd", paths))
    # The way out that the message names.
    alone = tmp_path / "alone"
    alone.mkdir()
    for name in ("tokenizer.json", "chat_template.jinja"):
        (alone / name).write_text((tmp_path / "m" / name).read_text())
    settings = json.loads((tmp_path / "m" / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (alone / "tokenizer_config.json").write_text(json.dumps(settings))
    with_folder = (paths, f"actor_rollout_ref.model.tokenizer_path={alone}")
    tokenizer = check_models(config(models, "critic", "stage=seqkd", *with_folder))
    assert tokenizer("AB")["input_ids"] == byte_tokenizer()("ab")["input_ids"]


def test_dropout_is_switched_off(models, tmp_path):
    settings = load_config(models / "student", "policy")
    settings.attention_dropout = 0.3
    settings.save_pretrained(tmp_path)
    assert load_config(tmp_path, "policy").attention_dropout == 0.0
    assert load_config(models / "student", "score").classifier_dropout == 0.0


def test_an_override_that_the_model_does_not_have_is_refused(models):
    assert load_config(models / "student", "policy", {"rms_norm_eps": 1e-3}).rms_norm_eps == 1e-3
    with pytest.raises(ValueError, match="no such entry"):
        load_config(models / "student", "policy", {"layer_norm": 1})


def test_missing_weights_are_refused(models, tmp_path):
    load_model(models / "student", "policy").save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text()) | {"num_hidden_layers": 3}
    settings["layer_types"] = ["full_attention"] * 3
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"lacks .* weights"):
        load_model(tmp_path, "policy")


def test_generation_settings_come_along(models, tmp_path):
    write_model(tmp_path / "m")
    GenerationConfig(eos_token_id=[1, 5], pad_token_id=0).save_pretrained(tmp_path / "m")
    assert load_model(tmp_path / "m", "policy").generation_config.eos_token_id == [1, 5]


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [5, 1]}, {"eos_token_id": 9}, (1, 5)),
        ({"eos_token_id": 7}, {}, (1, 7)),
        ({}, {"eos_token_id": [8, 9]}, (1, 8, 9)),
        (None, {"eos_token_id": 8}, (1, 8)),
        (None, {"text_config": {"eos_token_id": 6}}, (1, 6)),
        (None, {}, (1,)),
        ({"eos_token_id": None}, {"eos_token_id": None}, (1,)),
    ],
)
def test_what_ends_an_answer(tmp_path, generation, config, expected):
    """The tokenizer's EOS (1) first; then generation_config.json's, and config.json's where that names none."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"} | config))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert all_eos_token_ids(byte_tokenizer(), tmp_path) == expected
    assert set(expected) <= set(all_eos_token_ids(byte_tokenizer(), load_config(tmp_path, "policy")))


def test_what_ends_an_answer_of_a_config_without_a_folder(models):
    assert all_eos_token_ids(byte_tokenizer(), Qwen2Config(eos_token_id=[4, 1])) == (1, 4)
    assert all_eos_token_ids(byte_tokenizer(), Qwen2Config(eos_token_id=None)) == (1,)


def test_an_engine_that_is_not_installed_is_said_before_anything_starts(models, monkeypatch):
    monkeypatch.setattr(first_look, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"rollout\.name=vllm.*pip install -e '\.\[gpu\]'"):
        first_look.check_engine(config(models, "critic", "actor_rollout_ref.rollout.name=vllm"))
    first_look.check_engine(config(models, "critic", "actor_rollout_ref.rollout.name=hf"))


def test_the_best_of_a_run_is_what_it_names_at_the_start(models, tmp_path):
    """Ranks read the model one after the other, and the run it comes from may find a better one meanwhile."""
    point_best(tmp_path, 4)
    checked = with_absolute_paths(config(models, "critic", f"actor_rollout_ref.model.path={tmp_path}/best/actor"))
    point_best(tmp_path, 8)
    assert checked.actor_rollout_ref.model.path == f"{tmp_path}/global_step_4/actor"
    assert checked.critic.model.path == f"{models}/critic"
