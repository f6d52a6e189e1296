"""What the judge is asked, and when it is asked again."""

from __future__ import annotations

from types import SimpleNamespace

from tests.tiny import write_data
from verl.models.content import Content
from verl.pipeline.results import Student, judge, judge_arguments, judged_once
from verl.tools.judge.options import build_parser
from verl.trainer.config import compose_config


def made(folder, *settings):
    write_data(folder / "val.jsonl", rows=4)
    files = [f"data.{name}_files={folder}/val.jsonl" for name in ("train", "val")]
    return compose_config([*files, *settings, "actor_rollout_ref.model.path=m", "critic.model.path=m",
                           "trainer.experiment_name=x"])  # fmt: skip


def test_discriminators_are_asked_as_was_said(tmp_path):
    config, students = made(tmp_path), [Student("seqkd", tmp_path, SimpleNamespace(digest="d"))]
    flags = build_parser().parse_args(judge_arguments(config, students, "base", 2, 0.8, tmp_path)[1:])
    assert (flags.judge_model, flags.judge_seeds, flags.temperature) == ("base", 2, 0.8)
    assert "--judge_seeds" not in judge_arguments(config, students, "", 2, 0.8, tmp_path)
    # Whoever does not have layers compiled in training has it nowhere.
    for compiled in (True, False):
        config = made(tmp_path, f"actor_rollout_ref.actor.fsdp_config.use_torch_compile={compiled}")
        flags = build_parser().parse_args(judge_arguments(config, students, "base", 1, 1.0, tmp_path)[1:])
        assert flags.no_compile is not compiled


def test_a_judge_that_failed_is_asked_with_less_memory_and_one_that_did_not_is_not_asked_again(tmp_path):
    config, students = made(tmp_path), [Student("seqkd", tmp_path, SimpleNamespace(digest="d"))]
    asked, codes = [], [1, 0]

    def run(*arguments):
        asked.append(arguments)
        code = codes.pop(0)
        if code == 0:
            (tmp_path / "judge" / "at_1" / "judge.json").write_text('{"students": {}}')
        return code

    shares = (0.8, 0.3, 0.5)
    (tmp_path / "judge" / "at_1").mkdir(parents=True)
    asking = (SimpleNamespace(run=run), tmp_path, config, students, "")
    answers = [judge(*asking, seeds=1, temperature=1.0, memory=share) for share in shares]
    assert answers == [(1, None), (0, {"students": {}}), (0, {"students": {}})]
    assert [arguments[arguments.index("--gpu_memory_utilization") + 1] for arguments in asked] == ["0.8", "0.3"]


def test_a_stage_that_left_the_student_as_it_was_has_none_of_its_own_to_judge(tmp_path):
    digests = {"seqkd": 1, "warmup": 1, "gad": 2, "soda": 1}
    seqkd, warmup, gad, soda = (Student(name, tmp_path, Content(name, digest)) for name, digest in digests.items())
    assert judged_once([seqkd, warmup, gad]) == ([seqkd, gad], {"warmup": "seqkd"})
    assert judged_once([seqkd, warmup, soda]) == ([seqkd], {"warmup": "seqkd", "soda": "seqkd"})
    assert judged_once([warmup, gad]) == ([warmup, gad], {})
