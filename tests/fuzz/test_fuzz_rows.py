"""Any rows give tables of the promised shapes whose texts are the file's, or a sentence."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.fuzz.fuzzing import refused_or, tries
from tests.tiny import byte_tokenizer
from verl.utils.dataset.rl_dataset import RLHFDataset, collate_fn
from verl.utils.dataset.texts import without_eos_text

TOKENIZER = byte_tokenizer()
PROMPT, ANSWER = 28, 10

texts = st.one_of(
    st.text(max_size=12),
    st.text(st.characters(exclude_categories=()), max_size=8),
    st.sampled_from(
        ["", " ", "\r\n", "\x00", "\ud800", "<eos>", "a<eos> ", "<user>", "{{ 7*7 }}", "{% for %}", "a" * 5000,
         "红" * 3000, "\u202e", "\x1b]0;t\x07", "\ufdd0", "\ufeff"]
    ),
)  # fmt: skip
leaves = st.one_of(st.none(), st.booleans(), st.integers(), st.integers(2**63, 2**80), st.floats(), texts)
anything = st.recursive(
    leaves,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=3)),
    max_leaves=8,
)
sound = st.fixed_dictionaries(
    {
        "content": st.lists(st.fixed_dictionaries({"role": st.just("user"), "content": texts}), min_size=1, max_size=2),
        "teacher_response": texts,
    },
    optional={"extra_info": anything, "other": anything},
)
messages = st.fixed_dictionaries(
    {
        "role": st.one_of(st.sampled_from(["user", "assistant", "system"]), anything),
        "content": st.one_of(texts, anything),
    },
    optional={"more": anything},
)
odd = st.fixed_dictionaries(
    {"content": st.lists(messages, max_size=3), "teacher_response": texts},
    optional={"extra_info": anything, "index": anything, "uid": anything},
)
records = st.one_of(
    sound, sound, odd, st.fixed_dictionaries({"content": anything, "teacher_response": anything}), anything
)
configs = st.builds(
    SimpleNamespace,
    prompt_key=st.just("content"),
    response_key=st.just("teacher_response"),
    max_prompt_length=st.just(PROMPT),
    max_response_length=st.just(ANSWER),
    truncation=st.sampled_from(["error", "left", "right", "middle"]),
    filter_overlong_prompts=st.booleans(),
    filter_overlong_prompts_workers=st.none(),
    on_bad_row=st.sampled_from(["error", "skip", "skip"]),
    return_raw_chat=st.booleans(),
    apply_chat_template_kwargs=st.just({}),
)


def read(path, config):
    """The dataset, and all of its rows as a batch."""
    dataset = RLHFDataset(path, TOKENIZER, config)
    return dataset, collate_fn([dataset[number] for number in range(len(dataset))])


def look_at(path, config, rows):
    found = refused_or(lambda: read(path, config))
    if found is None:
        return
    dataset, batch = found
    count = len(dataset)
    assert batch["input_ids"].shape == (count, PROMPT)
    assert batch["teacher_response"].shape == (count, ANSWER)
    for index, text in zip(batch["index"], batch["teacher_text"], strict=True):
        assert text == without_eos_text(rows[index]["teacher_response"], "<eos>")


@tries(200)
@given(st.lists(records, max_size=4), configs, st.booleans())
def test_lines(rows, config, ascii_only):
    lines = [json.dumps(row, ensure_ascii=ascii_only).encode(errors="surrogatepass") for row in rows]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.write_bytes(b"\n".join(lines))
        look_at(path, config, rows)


@tries(100)
@given(st.lists(st.one_of(sound, odd), max_size=4), configs)
def test_parquet(rows, config):
    try:
        table = pyarrow.Table.from_pylist(rows)
    except (pyarrow.ArrowException, OverflowError, UnicodeError, ValueError, TypeError):
        # No file of this format could hold them.
        assume(False)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.parquet"
        try:
            pyarrow.parquet.write_table(table, path)
        except pyarrow.ArrowException:
            assume(False)
        look_at(path, config, rows)


@tries(100)
@given(st.binary(max_size=200), st.sampled_from(["jsonl", "parquet"]), st.booleans(), configs)
def test_bytes(content, kind, as_a_row, config):
    """Anything for a file, alone or behind a sound row."""
    row = {"content": [{"role": "user", "content": "q"}], "teacher_response": "a"}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"rows.{kind}"
        path.write_bytes((json.dumps(row).encode() + b"\n" if as_a_row else b"PAR1") + content)
        found = refused_or(lambda: read(path, config))
        assert found is None or set(found[1]["teacher_text"]) == {"a"}
