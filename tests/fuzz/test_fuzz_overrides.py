"""Any command line gives settings of the right types, or a sentence."""

from __future__ import annotations

import dataclasses
import math

from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz.fuzzing import refused_or, tries
from verl.trainer.config import compose_config
from verl.trainer.config.loading import known_keys

GIVEN = [
    "stage=gad", "data.train_files=x", "actor_rollout_ref.model.path=x", "trainer.experiment_name=x",
    "trainer.device=cpu",
]  # fmt: skip
KEYS = known_keys()
WORDS = sorted({word for key in KEYS for word in key.split(".")})

known = st.sampled_from(KEYS)
keys = st.one_of(
    known,
    st.lists(st.sampled_from(WORDS), min_size=1, max_size=4).map(".".join),
    st.builds("{}.{}".format, known, st.sampled_from(WORDS)),
    st.text(max_size=12),
)
scalars = st.one_of(
    st.integers(-3, 3).map(str),
    st.integers().map(str),
    st.floats().map(str),
    st.sampled_from(
        ["nan", "inf", "-inf", "1e400", "1e308", "1e38", "-0", "9" * 400, "9" * 5000, "null", "true", "???", "''", "[]",
         "{}", "a,b", "${x}", "${trainer.device}", "${oc.env:NO_SUCH}", "${", "glob(*)", "range(1,3)", "choice(1,2)",
         "\x00", "\ud800", "红色", " ", "1_000", "0x10", "2026-01-01", "{a:{b:[1]}}", "[[[]]]"]
    ),
    st.text(max_size=20),
)  # fmt: skip
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(lambda items: f"[{','.join(items)}]"),
        st.dictionaries(st.text("ab红.", min_size=1, max_size=2), inner, max_size=2).map(
            lambda items: f"{{{','.join(f'{key}:{value}' for key, value in items.items())}}}"
        ),
    ),
    max_leaves=5,
)
arguments = st.one_of(
    st.builds("{}={}".format, known, scalars),
    st.builds("{}={}".format, known, values),
    st.builds("{}{}={}".format, st.sampled_from(["", "+", "++", "~"]), keys, values),
    keys.map("~{}".format),
    st.text(max_size=20),
)


def numbers_in(settings) -> list[float]:
    found = []
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        found += numbers_in(value) if dataclasses.is_dataclass(value) else [value]
    return [value for value in found if isinstance(value, float)]


@tries(60)
@given(st.lists(arguments, min_size=1, max_size=2))
def test_settings_or_a_sentence(typed):
    config = refused_or(lambda: compose_config([*GIVEN, *typed]))
    assert config is None or all(map(math.isfinite, numbers_in(config)))
