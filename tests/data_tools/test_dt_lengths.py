"""Lengths against counts made one by one, limits against numbers worked out by hand, and lines against the trainer."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tests.tiny import byte_tokenizer, write_data, write_model
from verl.config.run import DataConfig
from verl.data_tools.lengths.advice import advise, in_one_command
from verl.data_tools.lengths.command import main, parse
from verl.data_tools.lengths.limits import Limits, fit, histogram, limit_for, rounded_up, summarise
from verl.data_tools.lengths.measure import measure, workers_for
from verl.data_tools.lengths.room import Machine, find_room
from verl.data_tools.rows import Columns
from verl.memory.check import run_settings
from verl.memory.estimate import GIB, estimate_memory
from verl.models.shape import ModelShape
from verl.pipeline.options import parse_options
from verl.pipeline.settings import user_settings
from verl.trainer.config import compose_config
from verl.trainer.config.loading import composed_preset
from verl.utils.dataset.rl_dataset import RLHFDataset
from verl.utils.dataset.texts import Tokenization

REPOSITORY = Path(__file__).parents[2]
REQUIRED = ["data.train_files=x", "actor_rollout_ref.model.path=x", "trainer.experiment_name=x"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


def write_rows(path: Path, rows: list[tuple[str, str]]) -> Path:
    lines = [{"content": [{"role": "user", "content": q}], "teacher_response": a} for q, a in rows]
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return path


def settings_of(stdout: str, script: str) -> list[str]:
    """The overrides of the line for a stage script, as a shell would split them."""
    line = next(line for line in stdout.splitlines() if script in line)
    return line.split("--nnodes 1 ")[1].split()


# --- counting ---


def test_lengths_are_those_of_the_dataset(model, tmp_path):
    """Prompts through the template, answers with EOS: <user>, a byte each, <bot>; a byte each, <eos>."""
    file = write_data(tmp_path / "x.jsonl", rows=24)
    lengths = measure([file], Tokenization(byte_tokenizer()), Columns())
    records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert lengths.prompts.tolist() == [2 + len(r["content"][0]["content"].encode()) for r in records]
    assert lengths.answers.tolist() == [1 + len(r["teacher_response"].encode()) for r in records]
    config = compose_config([*REQUIRED, "data.max_prompt_length=64", "data.max_response_length=64"]).data
    assert isinstance(config, DataConfig)
    dataset = RLHFDataset(str(file), byte_tokenizer(), config)
    assert lengths.prompts.tolist() == [len(row["raw_prompt_ids"]) for row in dataset]
    masks = [row["teacher_attention_mask"].sum().item() for row in dataset]
    assert lengths.whole.tolist() == masks


def test_batches_give_what_single_rows_give(tmp_path, monkeypatch):
    file = write_data(tmp_path / "x.jsonl", rows=50)
    at_once = measure([file, file], Tokenization(byte_tokenizer()), Columns())
    monkeypatch.setattr("verl.data_tools.lengths.measure.BATCH_CHARACTERS", 30)
    in_parts = measure([file, file], Tokenization(byte_tokenizer()), Columns())
    assert in_parts.prompts.tolist() == at_once.prompts.tolist() and len(at_once.prompts) == 100
    assert in_parts.answers.tolist() == at_once.answers.tolist()


@pytest.mark.distributed
def test_processes_give_what_one_gives(tmp_path, monkeypatch):
    """In the order of the files, faults included."""
    file = write_rows(tmp_path / "x.jsonl", [("q" * n, "a" * (n % 7)) for n in range(1, 60)])
    monkeypatch.setattr("verl.data_tools.lengths.measure.BATCH_ROWS", 9)
    tokenization, columns = Tokenization(byte_tokenizer()), Columns(on_bad_row="skip")
    one, two = (measure([file], tokenization, columns, workers=workers) for workers in (1, 2))
    assert one.prompts.tolist() == two.prompts.tolist() == [n + 2 for n in range(1, 60) if n % 7]
    assert one.answers.tolist() == two.answers.tolist() and one.left_out == two.left_out
    assert (workers_for(30_000), workers_for(10**9) >= 1, two.looked_at) == (1, True, 59)


def test_a_sample_is_drawn_by_the_seed(tmp_path):
    rows = [("q" * number, "a") for number in range(1, 101)]
    file = write_rows(tmp_path / "x.jsonl", rows)
    first, again = (measure([file], Tokenization(byte_tokenizer()), Columns(), 10, seed=3) for _ in range(2))
    other = measure([file], Tokenization(byte_tokenizer()), Columns(), 10, seed=4)
    assert first.prompts.tolist() == again.prompts.tolist() != other.prompts.tolist()
    assert (first.looked_at, first.total, len(set(first.prompts.tolist()))) == (10, 100, 10)


def test_rows_that_training_refuses_are_refused_or_counted(tmp_path):
    file = tmp_path / "x.jsonl"
    write_rows(file, [("q", "a"), ("q", " ")])
    with file.open("a") as out:
        out.write('{"content": "text", "teacher_response": "a"}\nnot json\n')
    with pytest.raises(ValueError, match=r"(?s)3 of 4 rows.*row 1: the answer.*empty.*row 2.*line 4.*on_bad_row"):
        measure([file], Tokenization(byte_tokenizer()), Columns())
    lengths = measure([file], Tokenization(byte_tokenizer()), Columns(on_bad_row="skip"))
    assert (len(lengths.prompts), lengths.looked_at, sum(lengths.left_out.values())) == (1, 4, 3)


# --- numbers ---


def test_percentiles_by_hand():
    """Of 1..200: the 100th, 180th, 190th, 198th and, as 0.999 x 200 = 199.8, the 200th."""
    values = np.random.default_rng(0).permutation(np.arange(1, 201))
    summary = summarise(values)
    assert list(summary.percentiles.values()) == [100, 180, 190, 198, 200]
    assert (summary.count, summary.mean, summary.longest) == (200, 100.5, 200)


def test_round_limits_by_hand():
    assert [rounded_up(n) for n in (1, 16, 17, 89, 224, 257, 1000, 5000)] == [16, 16, 32, 96, 224, 288, 1024, 5120]


def test_limits_keep_all_where_that_is_cheap():
    mild = np.array([100] * 99 + [140])
    wild = np.array([100] * 99 + [1000])
    # 100 becomes 112, times 1.5 is 168; 140 becomes 144.
    assert limit_for(mild, 0.99) == 144 and limit_for(wild, 0.99) == 112 and limit_for(wild, 0.995) == 1024
    assert limit_for(np.array([100] * 99 + [400]), 0.99, free=512) == 416


def test_shares_of_limits_by_hand():
    """100 rows; one prompt of 1000 goes, and of the 99 others two answers of 500 are cut."""
    prompts, answers = np.full(100, 50), np.full(100, 30)
    prompts[0], answers[1:3] = 1000, 500
    limits = fit(prompts, answers, keep=0.98)
    assert (limits.prompt, limits.answer, limits.together) == (64, 32, 96)
    assert limits.too_long_prompts == pytest.approx(0.01) and limits.cut_answers == pytest.approx(2 / 99)
    assert limits.whole == pytest.approx(0.97) and not limits.by_context


def test_a_short_context_is_cut_where_most_rows_stay_whole():
    prompts, answers = np.array([10] * 6 + [80] * 4), np.array([80] * 6 + [10] * 4)
    limits = fit(prompts, answers, keep=0.99, context=100)
    assert (limits.prompt, limits.answer, limits.whole, limits.by_context) == (10, 90, 0.6, True)
    with pytest.raises(ValueError, match="context of 50 tokens, got 90 in the shortest"):
        fit(prompts, answers, keep=0.99, context=50)


def test_histogram_counts_every_row():
    values = np.array([*range(100), 5000])
    bins = histogram(values)
    assert sum(count for *_, count in bins) == 101
    for low, high, count in bins:
        assert count == int(((values >= low) & (values <= high)).sum())
    assert bins[-1][1] == 5000 and histogram(np.array([1, 1, 1])) == [(0, 0, 0), (1, 1, 3)]


# --- advice ---

SHORT = Limits(128, 240, 0.0, 0.0, 1.0)
LONG = Limits(20_000, 16_000, 0.01, 0.02, 0.97)


def test_batches_and_epochs_by_hand():
    # 5,652 rows: 22.1 steps of 256; 705: 22.0 steps of 32; over 6 GPUs 252 is the most below 256.
    assert advise("seqkd", SHORT, 5652, 0.99, "x", 1, None).settings["data.train_batch_size"] == 256
    small = advise("seqkd", SHORT, 705, 0.99, "x", 8, None)
    assert small.settings["data.train_batch_size"] == 32 and small.steps == 705 * 4 // 32
    assert advise("seqkd", SHORT, 5652, 0.99, "x", 6, None).settings["data.train_batch_size"] == 252
    # 100 rows in batches of 16, the smallest: 7 epochs make 43 steps, 6 would make 37.
    tiny = advise("warmup", SHORT, 100, 0.99, "x", 4, None)
    assert (tiny.settings["data.train_batch_size"], tiny.settings["trainer.total_epochs"], tiny.steps) == (16, 7, 43)
    # 20 rows: 8 epochs are the most.
    few = advise("seqkd", SHORT, 20, 0.99, "x", 8, None)
    assert (few.settings["trainer.total_epochs"], few.steps) == (8, 10)
    assert any("little" in reason for _, reason in few.reasons)
    with pytest.raises(ValueError, match="3 rows times 8 epochs do not fill one batch of 64"):
        advise("seqkd", SHORT, 3, 0.99, "x", 64, None)


@pytest.mark.parametrize("limits", [SHORT, LONG])
@pytest.mark.parametrize("stage", ["seqkd", "warmup", "gad", "soda"])
def test_every_line_is_taken_by_the_trainer(stage, limits):
    """Composed as the stage script hands it over; what it sets arrives."""
    advice = advise(stage, limits, 5000, 0.99, "x", 8, None)
    given = [*REQUIRED, f"stage={stage}", "trainer.n_gpus_per_node=8", *advice.line.split()]
    config = compose_config(given)
    assert (config.data.max_prompt_length, config.data.max_response_length) == (limits.prompt, limits.answer)
    assert config.actor_rollout_ref.rollout.max_model_len == limits.together
    assert config.data.filter_overlong_prompts == (limits is LONG)
    assert 5000 * config.trainer.total_epochs // config.data.train_batch_size == advice.steps
    # No other preset, for short answers either: none was shown to bring a student closer.
    assert "stage" not in advice.settings


def test_only_names_that_stand_in_a_command_are_to_be_filled_in(model, tmp_path, capsys):
    train = write_rows(tmp_path / "train.jsonl", [("q" * 10, "a" * 20)] * 40)
    said = {"seqkd": "MODEL, TRAIN, VAL and NAME are", "gad": "MODEL, CRITIC and NAME are"}
    for stage, names in said.items():
        main(["--data", str(train), "--model", str(model), "--stage", stage])
        assert f"\n{names} yours to fill in" in capsys.readouterr().out


def test_one_command_gives_each_stage_what_its_script_gets():
    """The pipeline reads it: shared settings once, others for their stage alone; of SODA and GAD, GAD."""
    by_stage = {stage: advise(stage, LONG, 700, 0.99, "x", 8, None) for stage in ("gad", "seqkd", "soda", "warmup")}
    line = in_one_command(list(by_stage.values()))
    assert line.startswith("python -m verl.pipeline --model MODEL ") and line.count("data.max_prompt_length=") == 1
    options = parse_options(line.split()[3:])
    assert options.stages == ("seqkd", "warmup", "gad")
    for stage, settings in user_settings(options).items():
        if stage in options.stages:
            assert sorted(settings) == sorted(by_stage[stage].line.split())
    assert in_one_command([by_stage["gad"]]) is None
    assert "--stages seqkd,soda " in in_one_command([by_stage["seqkd"], by_stage["soda"]])


def qwen_7b() -> Machine:
    """Sizes of a model of 7.6 billion parameters, on cards of 80 GiB."""
    shape = ModelShape(
        parameters=7_615_616_512, layer_parameters=233_057_792, layers=28, width=3584, intermediate=18944, heads=28,
        kv_heads=4, head_dim=128, vocabulary=152064, normed_heads=False,
    )  # fmt: skip
    return Machine(shape, shape, 80 * GIB)


def test_settings_are_found_that_fit_the_memory():
    """7.6B with a discriminator on 8 cards of 80 GiB does not fit as the preset is; with what is advised it does."""
    machine, limits = qwen_7b(), Limits(1024, 1024, 0.0, 0.0, 1.0)
    base = compose_config([*REQUIRED, "stage=gad", "trainer.n_gpus_per_node=8", "trainer.device=cuda",
                           "data.max_prompt_length=1024", "data.max_response_length=1024"])  # fmt: skip
    before = estimate_memory(run_settings(base), machine.actor, machine.critic, machine.gpu_bytes)
    assert before.need(before.largest) > machine.gpu_bytes
    advice = advise("gad", limits, 10_000, 0.99, "x", 8, machine)
    config = compose_config([*REQUIRED, "stage=gad", "trainer.n_gpus_per_node=8", "trainer.device=cuda",
                             *advice.line.split()])  # fmt: skip
    after = estimate_memory(run_settings(config), machine.actor, machine.critic, machine.gpu_bytes)
    assert after.need(after.largest) <= machine.gpu_bytes
    assert len(advice.settings) > 5 and "by the trainer's estimate" in advice.reasons[-1][1]


def test_what_never_fits_is_said():
    machine = qwen_7b()
    small = Machine(machine.actor, machine.critic, 4 * GIB)
    room = find_room(lambda more: compose_config([*REQUIRED, "stage=gad", "trainer.device=cuda",
                                                  *(f"{k}={v}" for k, v in more.items())]), small)  # fmt: skip
    assert "does not fit" in room.sentence(small.gpu_bytes)


# --- the command ---


def test_the_command_on_files(model, tmp_path, capsys):
    """What it prints behind the stage script's name goes through that script and the trainer's configuration, and its
    limits keep what it says, counted by the trainer's dataset."""
    rows = [("q" * 10, "a" * 20)] * 95 + [("q" * 60, "a" * 100)] * 5
    train = write_rows(tmp_path / "train.jsonl", rows)
    val = write_rows(tmp_path / "val.jsonl", [("q" * 70, "a")])
    out, chart = tmp_path / "x.json", tmp_path / "x.png"
    flags = ["--data", str(train), "--val_files", str(val), "--model", str(model), "--keep", "0.94"]
    main([*flags, "--json", str(out), "--chart", str(chart)])
    printed = capsys.readouterr().out
    settings = settings_of(printed, "gpt5-8b-SeqKD-gspo.sh")
    assert "\nMODEL, CRITIC, TRAIN, VAL and NAME are yours to fill in; " in printed
    script = ["bash", "scripts/train/gpt5-8b-SeqKD-gspo.sh", "--model", str(model), "--exp_name", "x", *settings]
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": "echo", "N_GPUS_PER_NODE": "1", "DATA_DIR": str(tmp_path)}
    handed = subprocess.run(script, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True)
    # Its first line is what it asks Python for.
    config = compose_config(
        [*handed.stdout.splitlines()[-1].split()[2:], f"data.train_files={train}", f"data.val_files={val}"]
    )
    # 72 tokens of the longest prompt, and 21 of an answer.
    assert (config.data.max_prompt_length, config.data.max_response_length) == (80, 32)
    assert len(RLHFDataset(config.data.train_files, byte_tokenizer(), config.data)) == 100
    found = json.loads(out.read_text())
    assert found["limits"]["cut_answers"] == pytest.approx(5 / 101)
    assert found["stages"]["seqkd"]["line"].split() == settings
    assert found["tokens"]["answer"]["percentiles"]["50.0"] == 21
    assert chart.read_bytes().startswith(b"\x89PNG") and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--data", "no.parquet"], "no such data file"),
        (["--data", "{bad}"], "not a readable parquet file"),
        (["--data", "{csv}"], "ends in .parquet or .jsonl"),
        (["--data", "{empty}"], "empty.jsonl has no rows"),
        (["--data", "{good}", "--teacher_key", "x"], "x"),
        (["--data", "{good}", "--json", "{good}"], "expected a file that ends in .json"),
        (["--data", "{good}", "--chart", "{png}"], "is there already"),
        (["--data", "{good}", "--model", "{folder}"], "holds no model"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(model, tmp_path, capsys, flags, said):
    names = {"good": write_data(tmp_path / "good.jsonl"), "folder": tmp_path}
    for name, file in (("bad", "bad.parquet"), ("csv", "x.csv"), ("empty", "empty.jsonl"), ("png", "x.png")):
        names[name] = tmp_path / file
        names[name].write_bytes(b"" if name == "empty" else b"x\n")
    assert main(["--model", str(model), *(flag.format(**names) for flag in flags)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and "Traceback" not in error


def test_defaults_come_from_the_presets():
    assert parse(["--data", "x", "--model", "y"]).stage == ["seqkd", "warmup", "gad"]
    for stage in ("seqkd", "warmup", "gad", "gad_short", "soda"):
        assert composed_preset(stage)["data"]["train_batch_size"] % 8 == 0
