"""The judge as a command: what it reads, what it refuses, and that it sees what is there and nothing else."""

import dataclasses
import json
import shutil
import threading
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from tests.tiny import byte_tokenizer, causal_lm, scorer, write_model
from tests.tools.chat_server import Server, part
from verl.tools.judge import generate, run
from verl.tools.judge.__main__ import main
from verl.tools.judge.answers import (
    Answer,
    answer_ids,
    cut_flags,
    parse_source,
    prompt_ids,
    read_answers,
    read_prompts,
)
from verl.tools.judge.generate import Drawing, choose_engine, keep, kept_answers, prepare
from verl.tools.judge.two_sample import JudgeSettings
from verl.tools.prompts import Limits
from verl.utils.checkpoint.fsdp_checkpoint_manager import FSDPCheckpointManager
from verl.utils.dataset.texts import Tokenization
from verl.utils.dump import write_jsonl
from verl.workers.rollout import get_rollout_class

EOS = 1
PROMPTS = 40
QUICK = ["--folds", "2", "--judge_seeds", "2", "--judge_lr", "3e-3", "--max_response_length", "12"]


def rows(count: int = PROMPTS) -> list[dict]:
    """English and Chinese prompts with the teacher's answers."""
    return [
        {
            "content": [{"role": "user", "content": f"What is {n}?" if n % 2 else f"{n}是什么?"}],
            "teacher_response": f"It is {n}." if n % 2 else f"是{n}。",
        }
        for n in range(count)
    ]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """data.jsonl, bad.jsonl (answers unlike the teacher's), and a language model, whose answers may end."""
    inputs = tmp_path_factory.mktemp("judge")
    write_jsonl(inputs / "data.jsonl", rows())
    bad = [{"content": row["content"], "answers": ["???" + "!" * (n % 3)]} for n, row in enumerate(rows())]
    write_jsonl(inputs / "bad.jsonl", reversed(bad))
    write_model(inputs / "model")
    return inputs


def judge(inputs, out, *flags: str) -> dict:
    main(["--data", str(inputs / "data.jsonl"), "--out", str(out), "--device", "cpu", *flags])
    return json.loads((out / "judge.json").read_text())


def refusal(capsys, inputs, *flags: str) -> str:
    """The sentence that the command ends with, and nothing written."""
    out = inputs / "refused"
    with pytest.raises(SystemExit) as stopped:
        main(["--data", str(inputs / "data.jsonl"), "--out", str(out), "--device", "cpu", *flags])
    captured = capsys.readouterr()
    assert captured.out == "" and not out.exists()
    return captured.err if isinstance(stopped.value.code, int) else stopped.value.code


# ---- end to end


def test_sees_what_is_there_and_nothing_else(inputs, tmp_path, capsys):
    """Two students with one model are one distribution; a third writes something else."""
    model = f"{inputs / 'model'}"
    students = ["--student", f"a={model}", "--student", f"b={model}", "--student", f"bad={inputs / 'bad.jsonl'}"]
    flags = [*students, "--against", "a", "--judge_model", model, *QUICK, "--plot"]
    report = judge(inputs, tmp_path, *flags)
    first = capsys.readouterr()
    text = first.out
    same, other = (report["students"][name]["two_sample"]["accuracy"] for name in ("b", "bad"))
    assert same["low"] <= 0.5 <= same["high"] and same["high"] - same["low"] < 0.5
    assert other["value"] > 0.9 and other["clusters"] == PROMPTS
    assert "two_sample" not in report["students"]["a"]
    assert "bad is further from a than b" in text and (tmp_path / "judge.png").stat().st_size > 10_000
    assert report["students"]["bad"]["numbers"]["rouge_l"] == 0 and report["students"]["b"]["numbers"]["answers"] == 80

    # Their draws differ, and are taken again by a run that wants the same, but not with another temperature.
    a, b = (tmp_path / "answers" / f"{name}.jsonl" for name in "ab")
    assert a.read_text() != b.read_text()
    before = a.stat().st_mtime_ns
    # So are the discriminators', of 2 folds and 2 seeds each.
    assert "taken from" not in first.err
    again = judge(inputs, tmp_path, *flags)
    assert again["students"] == report["students"] and a.stat().st_mtime_ns == before
    taken = f"4 of 4 are taken from {tmp_path / 'discriminators.jsonl'}"
    assert capsys.readouterr().err.count(taken) == 2
    judge(inputs, tmp_path, *flags, "--judge_lr", "1e-3")
    assert taken not in capsys.readouterr().err
    judge(inputs, tmp_path, *students, "--tokenizer", model, "--max_response_length", "12", "--temperature", "1.0")
    assert a.stat().st_mtime_ns != before


def test_the_teacher_itself_cannot_be_told(inputs, tmp_path):
    """Equal answers tie: exactly one half, with no doubt about it."""
    student = f"copy={inputs / 'data.jsonl'}:teacher_response"
    report = judge(inputs, tmp_path, "--student", student, "--judge_model", str(inputs / "model"), *QUICK)
    found = report["students"]["copy"]
    assert [found["two_sample"]["accuracy"][key] for key in ("value", "low", "high")] == [0.5] * 3
    assert found["numbers"] == report["teacher"]["numbers"] and found["numbers"]["rouge_l"] == 1
    assert found["two_sample"]["lengths_within_0.1"]["count"] == PROMPTS


def test_pairwise_beside_numbers(inputs, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    server = Server()
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    server.verdict = lambda text: f"VERDICT: {'B' if '?' in part(text, 'answer A') else 'A'}"
    students = [
        "--student",
        f"bad={inputs / 'bad.jsonl'}",
        "--student",
        f"good={inputs / 'data.jsonl'}:teacher_response",
    ]
    flags = ["--endpoint", server.url, "--endpoint_model", "m", "--tokenizer", str(inputs / "model")]
    found = judge(inputs, tmp_path, *students, *flags, "--pairwise_prompts", "10", "--max_prompts", "20")["students"]
    server.shutdown()
    server.server_close()
    assert (found["bad"]["pairwise"]["win_rate"]["value"], found["bad"]["pairwise"]["losses"]) == (0, 10)
    assert (found["good"]["pairwise"]["win_rate"]["value"], found["good"]["pairwise"]["identical"]) == (0.5, 10)
    assert found["good"]["numbers"]["answers"] == 20 and len(server.asked) == 20
    assert "judged better than teacher's" in capsys.readouterr().out
    assert all("sk-secret" not in file.read_text() for file in tmp_path.rglob("*.json*"))


# ---- answers


def test_an_answer_that_was_cut_has_no_eos():
    tokenizer = byte_tokenizer()
    ids = answer_ids(
        [[Answer("ab"), Answer("ab", cut=True), Answer("abcd"), Answer(""), Answer("", True)]],
        Tokenization(tokenizer),
        4,
    )
    a, b, c, d = tokenizer("abcd")["input_ids"]
    assert ids == [[(a, b, EOS), (a, b), (a, b, c, d), (EOS,), (EOS,)]]
    assert cut_flags(ids, EOS) == [[False, True, True, False, False]]


def test_a_student_may_end_its_answers_in_another_eos(inputs, tmp_path):
    """A model that writes "a" and then <bot> for ever, which its generation config counts as an end."""
    (a,) = byte_tokenizer()("a")["input_ids"]
    model, bot = causal_lm(tied=False), 3
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_(), layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.fill_(1.0)
        model.model.embed_tokens.weight[a] = -1.0
        model.lm_head.weight.zero_()
        model.lm_head.weight[a], model.lm_head.weight[bot] = 1.0, -1.0
    model.generation_config.eos_token_id = [EOS, bot]
    model.save_pretrained(tmp_path / "student")
    byte_tokenizer().save_pretrained(tmp_path / "student")
    greedy = ("--temperature", "0", "--samples", "1", "--max_response_length", "9", "--max_prompts", "4")
    report = judge(inputs, tmp_path, "--student", f"s={tmp_path / 'student'}", *greedy)
    rows = [json.loads(line) for line in (tmp_path / "answers" / "s.jsonl").read_text().splitlines()]
    assert [(row["answers"], row["cut"]) for row in rows] == [(["a"], [False])] * 4
    assert report["students"]["s"]["numbers"]["mean_tokens"] == 2 and report["students"]["s"]["numbers"]["cut"] == 0


def test_students_of_one_architecture_share_an_engine(inputs, tmp_path, monkeypatch):
    """Each answers as it does alone, and ends as its own folder says."""
    other = tmp_path / "other"
    shutil.copytree(inputs / "model", other)
    for file in (other / "config.json", other / "generation_config.json"):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": [EOS, *range(60, 120)]}))
    students = [f"a={inputs / 'model'}", f"b={other}"]
    built = []
    monkeypatch.setattr(generate, "get_rollout_class", lambda name: built.append(name) or get_rollout_class(name))
    flags = ["--tokenizer", str(inputs / "model"), "--max_response_length", "12"]
    judge(inputs, tmp_path / "both", "--student", students[0], "--student", students[1], *flags)
    assert built == ["hf"]
    lengths = {}
    for name, student in zip("ab", students, strict=True):
        judge(inputs, tmp_path / name, "--student", student, *flags)
        answers = [(tmp_path / run / "answers" / f"{name}.jsonl").read_text() for run in ("both", name)]
        assert answers[0] == answers[1]
        lengths[name] = len(answers[0])
    assert lengths["b"] < lengths["a"]


def test_answers_of_a_file_may_end_in_the_text_of_an_eos(inputs):
    tokenizer = byte_tokenizer()
    (a,) = tokenizer("a")["input_ids"]
    tokenization = Tokenization(tokenizer, ends=("<eos>", "<bot>"))
    for text in ("a", "a<eos>", "a<bot>\n"):
        assert answer_ids([[Answer(text)]], tokenization, 9) == [[(a, EOS)]]


def test_names_of_special_tokens_are_text_or_tokens(inputs, tmp_path):
    """a<eos>b is 7 letters or 3 tokens; <user> before a prompt, <bot> behind it, EOS behind an answer."""
    write_jsonl(tmp_path / "data.jsonl", [{"content": "a<eos>b", "teacher_response": "a<eos>b"}])
    prompts, _ = read_prompts([str(tmp_path / "data.jsonl")], "content", "teacher_response")
    drawing = Drawing(1.0, 2, 4, None, "error", {}, 0, "hf", "cpu", "float32", 8, 0.5, False)
    for mode, letters in (("text", 7), ("token", 3)):
        job = prepare("m", inputs / "model", prompts, dataclasses.replace(drawing, special_text=mode))
        assert [len(ids) for ids in job.prompts] == [letters + 2]
        flags = ("--tokenizer", str(inputs / "model"), "--special_token_text", mode)
        student = f"s={tmp_path / 'data.jsonl'}:teacher_response"
        main(["--data", str(tmp_path / "data.jsonl"), "--out", str(tmp_path), "--student", student, *flags])
        report = json.loads((tmp_path / "judge.json").read_text())
        assert report["teacher"]["numbers"]["mean_tokens"] == letters + 1


def test_prompts_that_the_template_does_not_take_are_named(inputs, tmp_path):
    prompts = [{"content": [{"role": role, "content": "q"}], "teacher_response": "y"} for role in ("user", "human")]
    write_jsonl(tmp_path / "data.jsonl", prompts)
    read, _ = read_prompts([str(tmp_path / "data.jsonl")], "content", "teacher_response")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}<bot>"
    )
    with pytest.raises(ValueError, match=r"1 of 2 prompts cannot be put.*\n.*data\.jsonl, row 1: .*the role 'human'"):
        prompt_ids(read, Tokenization(tokenizer), Limits())


def test_answers_find_their_prompts(inputs, tmp_path):
    prompts, repeated = read_prompts([str(inputs / "data.jsonl")] * 2, "content", "teacher_response")
    assert (len(prompts), repeated) == (PROMPTS, PROMPTS)
    shuffled = [
        {
            "content": [{"role": "system", "content": "Be brief."}, *row["content"]],
            "mine": f"{n}",
            "finish_reason": reason,
        }
        for n, row in enumerate(rows())
        for reason in ("stop", "length")
    ][::-1]
    pd.DataFrame(shuffled).to_parquet(tmp_path / "s.parquet")
    found = read_answers(parse_source(f"s={tmp_path / 's.parquet'}:mine"), prompts, "content")
    assert found[7] == [Answer("7", True), Answer("7", False)]
    write_jsonl(tmp_path / "plain.jsonl", [{"response": [f"{n}", "x"], "cut": [True, False]} for n in range(PROMPTS)])
    found = read_answers(parse_source(f"s={tmp_path / 'plain.jsonl'}"), prompts, "content")
    assert found[7] == [Answer("7", True), Answer("x", False)]


def test_a_checkpoints_actor_folder_answers(inputs, tmp_path, capsys):
    model = causal_lm(seed=3)
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    manager = FSDPCheckpointManager(model, optimizer, schedule, byte_tokenizer(), compute_dtype=torch.float32)
    manager.save_checkpoint(tmp_path / "actor")
    write_model(tmp_path / "hf", seed=3)
    flags = ["--temperature", "0", "--samples", "1", "--max_response_length", "6", "--max_prompts", "5"]
    judge(inputs, tmp_path, *flags, "--student", f"x={tmp_path / 'actor'}", "--student", f"y={tmp_path / 'hf'}")
    x, y = ((tmp_path / "answers" / f"{name}.jsonl").read_text() for name in "xy")
    assert x == y and len(x.splitlines()) == 5
    assert "was not checked (--train_files)" in capsys.readouterr().out


def test_kept_answers_are_of_the_same_model(inputs, tmp_path):
    prompts, _ = read_prompts([str(inputs / "data.jsonl")], "content", "teacher_response")
    drawing = Drawing(1.0, 1, 4, None, "error", {}, 0, "hf", "cpu", "float32", 8, 0.5, False)
    write_model(tmp_path / "m")
    judge(inputs, tmp_path / "out", "--student", f"m={tmp_path / 'm'}", "--max_response_length", "4", "--samples", "1",
          "--temperature", "1.0")  # fmt: skip
    places = tmp_path / "out" / "answers"
    kept, _ = kept_answers(places, prepare("m", tmp_path / "m", prompts, drawing), drawing)
    assert len(kept) == PROMPTS
    write_model(tmp_path / "m", seed=1)
    kept, says = kept_answers(places, prepare("m", tmp_path / "m", prompts, drawing), drawing)
    assert kept is None and "is of another model and is written anew" in says


def test_any_answer_can_be_kept(inputs, tmp_path):
    prompts, _ = read_prompts([str(inputs / "data.jsonl")], "content", "teacher_response")
    drawing = Drawing(1.0, 2, 4, None, "error", {}, 0, "hf", "cpu", "float32", 8, 0.5, False)
    job = prepare("m", inputs / "model", prompts, drawing)
    answers = [[Answer("one\u2028two\x85three\r\n四", True), Answer("")] for _ in prompts]
    keep(tmp_path, job, drawing, prompts, answers)
    assert kept_answers(tmp_path, job, drawing)[0] == answers


@pytest.mark.parametrize(
    ("device", "no_compile", "compiled"), [("cuda:0", False, 1), ("cuda", True, 0), ("cpu", False, 0)]
)
def test_layers_are_compiled_on_a_gpu_alone(monkeypatch, device, no_compile, compiled):
    """Where there is none: what the judge is made with."""
    asked = []
    monkeypatch.setattr(run, "Judge", lambda *_: SimpleNamespace(model=SimpleNamespace(hf="its model")))
    monkeypatch.setattr(run, "compile_layers", asked.append)
    options = SimpleNamespace(
        judge_model="m", device=device, dtype="bfloat16", trust_remote_code=False, no_compile=no_compile
    )
    run._judge(options, JudgeSettings())
    assert asked == ["its model"] * compiled


# ---- errors


def test_prompts_that_were_trained_on_are_refused(inputs, tmp_path, capsys):
    train = tmp_path / "train.jsonl"
    trained = {**rows()[6], "content": [{"role": "system", "content": "x"}, {"role": "user", "content": " 6是什么? "}]}
    write_jsonl(train, [{"content": "another", "teacher_response": "x"}, trained])
    flags = ["--student", f"m={inputs / 'model'}", "--train_files", str(train)]
    message = refusal(capsys, inputs, *flags)
    assert "got 1 of 40 that are in --train_files" in message
    assert f"data.jsonl, row 6 is {train}, row 1" in message and "Leave these rows out of --data" in message


@pytest.mark.parametrize(
    ("student", "expected"),
    [
        ("model", "expected NAME=FOLDER or NAME=FILE[:COLUMN]"),
        ("teacher={inputs}/model", "not 'teacher'"),
        ("a={inputs}/nowhere", "which is neither; correct the path"),
        ("a={inputs}/nowhere.jsonl", "no such data file"),
        ("a={inputs}/bad.jsonl:mine", "expected answers in column 'mine'"),
        ("a={inputs}", "holds no model"),
        ("a={inputs}/critic", "got a discriminator in"),
        ("a={inputs}/few.jsonl", "got none to 39, the first being {inputs}/data.jsonl, row 0"),
        ("a={inputs}/odd.jsonl", "row 1: expected a text or texts in 'answers', got [3]"),
        ("a={inputs}/flags.jsonl", "expected 1 times true or false in 'cut' or a finish_reason, got ['no']"),
    ],
)
def test_students_that_cannot_be(inputs, capsys, student, expected):
    scorer().save_pretrained(inputs / "critic")
    byte_tokenizer().save_pretrained(inputs / "critic")
    write_jsonl(inputs / "few.jsonl", [{"content": rows()[3]["content"], "answers": ["x"]}])
    write_jsonl(inputs / "odd.jsonl", [{"answers": ["x"]}, {"answers": [3]}])
    write_jsonl(inputs / "flags.jsonl", [{"answers": ["x"], "cut": "no"}] * PROMPTS)
    flags = ["--student", student.format(inputs=inputs), "--tokenizer", str(inputs / "model")]
    assert expected.format(inputs=inputs) in refusal(capsys, inputs, *flags)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--against", "b"], "expected teacher or one of a, got b"),
        (["--against", "a"], "expected another student beside a"),
        (["--student", "a={inputs}/bad.jsonl"], "got a several times"),
        (["--temperature", "0"], "--samples: expected 1 with --temperature 0"),
        (["--endpoint", "http://x/v1"], "expected both or neither"),
        (["--ask", "closer"], "pass --against STUDENT"),
        (["--endpoint", "http://127.0.0.1:9/v1", "--endpoint_model", "m"], "expected an OpenAI-compatible endpoint at"),
        (["--judge_model", "{inputs}/critic"], "got a discriminator in"),
        (
            ["--judge_model", "{inputs}/model", "--folds", "21"],
            "expected at least two prompts in each of 21 folds, got 40",
        ),
        (["--judge_model", "{inputs}/short"], "got 34 of a; lower --max_response_length"),
        (["--max_response_length", "250"], "250 more are beyond the model's max_position_embeddings=256"),
        (["--max_prompt_length", "3"], "more than --max_prompt_length=3"),
        (["--device", "tpu"], "--device: expected cpu, cuda or cuda:N"),
        (["--samples", "0"], "expected a whole number from 1, got '0'"),
        (["--judge_lr", "-1"], "expected a number from"),
        (["--endpoint_options", "[1]"], "expected a JSON object"),
        (["--teacher_key", "mine"], "40 of 40 rows cannot be judged on"),
        (["--train_files", "{inputs}/odd.jsonl"], "name the column with --prompt_key"),
    ],
)
def test_flags_that_cannot_be(inputs, capsys, flags, expected):
    short = causal_lm()
    short.config.max_position_embeddings = 30
    short.save_pretrained(inputs / "short")
    byte_tokenizer().save_pretrained(inputs / "short")
    scorer().save_pretrained(inputs / "critic")
    byte_tokenizer().save_pretrained(inputs / "critic")
    write_jsonl(inputs / "odd.jsonl", [{"answers": ["x"]}])
    flags = [flag.format(inputs=inputs) for flag in flags]
    flags = ["--student", f"a={inputs / 'model'}", "--max_response_length", "20", *flags]
    assert expected in refusal(capsys, inputs, *flags)


def test_vllm_has_to_be_installed(monkeypatch):
    monkeypatch.setattr("verl.tools.judge.generate.find_spec", lambda name: None)
    assert choose_engine("auto", "cuda:0") == choose_engine("auto", "cpu") == "hf"
    with pytest.raises(ValueError, match="--engine: expected vllm to be installed"):
        choose_engine("vllm", "cuda")
    monkeypatch.setattr("verl.tools.judge.generate.find_spec", lambda name: name)
    assert (choose_engine("auto", "cuda:0"), choose_engine("auto", "cpu")) == ("vllm", "hf")


def test_files_alone_need_a_tokenizer(inputs, capsys):
    message = refusal(capsys, inputs, "--student", f"a={inputs / 'bad.jsonl'}")
    assert "pass --tokenizer FOLDER" in message
