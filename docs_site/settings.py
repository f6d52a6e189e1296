"""docs/reference/settings.md: every setting, from the YAML files of `verl/trainer/config`, in English and in Chinese.

The English sentences are the YAML's comments. The Chinese ones are in `settings.zh.yaml`, each beside the English
sentence that it translates: where that has changed, the translation has to be looked at before the page can be made.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import yaml

from docs_site.yaml_comments import entries, heading
from verl.config.run import Config
from verl.trainer.config.overrides import CONFIG_DIR

TRANSLATIONS = Path(__file__).with_name("settings.zh.yaml")
# The page's sections in order: where the settings stand, and the file that they come from.
SECTIONS = (
    ("data", "data/legacy_data.yaml"),
    ("actor_rollout_ref.model", "model/hf_model.yaml"),
    ("actor_rollout_ref.actor", "actor/dp_actor.yaml"),
    ("actor_rollout_ref.rollout", "rollout/rollout.yaml"),
    ("actor_rollout_ref.ref", "ref/dp_ref.yaml"),
    ("critic", "critic/dp_critic.yaml"),
    ("algorithm", "ppo_trainer.yaml"),
    ("soda", "ppo_trainer.yaml"),
    ("trainer", "ppo_trainer.yaml"),
    ("custom_reward_function", "ppo_trainer.yaml"),
    ("reward_model", "ppo_trainer.yaml"),
    ("ray_kwargs", "ppo_trainer.yaml"),
    ("actor_rollout_ref", "ppo_trainer.yaml"),
)
MAIN = "ppo_trainer.yaml"
STAGES = ("seqkd", "warmup", "gad", "gad_short", "soda")
# Keys that say nothing of themselves mean what their like elsewhere means.
ALIKE = (
    ("critic.model.fsdp_config.", "actor_rollout_ref.actor.fsdp_config."),
    ("actor_rollout_ref.ref.fsdp_config.", "actor_rollout_ref.actor.fsdp_config."),
    ("critic.model.", "actor_rollout_ref.model."),
    ("critic.discriminator.two_sided_hinge.", "critic.discriminator.hinge."),
    ("critic.discriminator.ranking.", "critic.discriminator.hinge."),
    ("actor_rollout_ref.rollout.val_kwargs.", "actor_rollout_ref.rollout."),
    ("critic.", "actor_rollout_ref.actor."),
)
TEXTS = {
    "en": {
        "title": "Settings",
        "intro": (
            "Every setting of `python -m verl.trainer.main_ppo`, which the stage scripts and `verl train` take as "
            "`KEY=VALUE`. A stage (`stage=seqkd`, `warmup`, `gad`, `gad_short` or `soda`; without one, `gad`) sets "
            "what is named behind *Stages* here, and the command line wins over both. `python -m verl.trainer.main_ppo "
            "stage=gad --cfg job` prints what a command would run with. Keys are those of upstream verl's classic "
            "trainer; [Settings of upstream verl](../settings_from_verl.md) has those that are answered differently."
        ),
        "default": "Default",
        "required": "none, it must be given",
        "as": "that of {key}",
        "by_device": "`{0}` on GPUs, `{1}` on CPU",
        "stages": "Stages",
        "sep": ", ",
        "colon": ": ",
        "or": " or ",
        "made": "Made from the comments in `verl/trainer/config` by `python -m docs_site.generate`: change them there.",
        "types": {int: "integer", float: "number", str: "text", bool: "`true` or `false`"},
        "list": "list of {0}",
        "dict": "a mapping",
        "tuple": "{0} numbers",
    },
    "zh": {
        "title": "配置项",
        "intro": (
            "这里列出 `python -m verl.trainer.main_ppo` 的全部配置项；"
            "各阶段脚本和 `verl train` 以 `KEY=VALUE` 的形式接收它们。"
            "阶段（`stage=seqkd`、`warmup`、`gad`、`gad_short` 或 `soda`，不写即 `gad`）会改动的取值列在“各阶段”之后，"
            "命令行上给出的值优先于二者。"
            "`python -m verl.trainer.main_ppo stage=gad --cfg job` 可打印一条命令实际使用的配置。"
            "键名与上游 verl 的经典训练器一致；处理方式不同的键见[上游 verl 的配置项](../settings_from_verl.md)。"
        ),
        "default": "默认值",
        "required": "无，必须给出",
        "as": "与 {key} 相同",
        "by_device": "GPU 上为 `{0}`，CPU 上为 `{1}`",
        "stages": "各阶段",
        "sep": "，",
        "colon": "：",
        "or": " 或 ",
        "made": "本页由 `python -m docs_site.generate` 根据 `verl/trainer/config` 中的注释生成，请在那里修改。",
        "types": {int: "整数", float: "数值", str: "文本", bool: "`true` 或 `false`"},
        "list": "{0}列表",
        "dict": "映射",
        "tuple": "{0} 个数值",
    },
}
SIGNS = {"gt": "> {}", "ge": "≥ {}", "lt": "< {}", "le": "≤ {}"}


class Setting(NamedTuple):
    """A setting: its key, the YAML of its default (None: a group), what is said of it, and the key that says it."""

    key: str
    default: str | None
    says: str
    said_at: str


@cache
def settings() -> dict[str, Setting]:
    """All settings and groups by key, in the page's order."""
    found: dict[str, tuple[str | None, str]] = {}
    for section, name in SECTIONS:
        for entry in entries(CONFIG_DIR / name):
            key = ".".join(entry.path if name == MAIN else (section, *entry.path))
            if (key.startswith(f"{section}.") and key not in found) or key == section:
                # An empty group is written as a value.
                found[key] = (entry.value if key in types() else None, entry.comment)
    return {key: _said(key, default, found) for key, (default, _) in found.items()}


def _said(key: str, default: str | None, found: dict[str, tuple[str | None, str]]) -> Setting:
    at = key
    while not found[at][1]:
        other = next((to + at.removeprefix(own) for own, to in ALIKE if at.startswith(own)), None)
        if other not in found:
            break
        at = other
    return Setting(key, default, found[at][1], at)


@cache
def of_stages() -> dict[str, dict[str, str]]:
    """By key, what stages set: the YAML by stage, where it is not the default."""
    found: dict[str, dict[str, str]] = {}
    for stage in STAGES:
        for key, value in _of_stage(stage).items():
            default = settings()[key].default
            if yaml.safe_load(value) != yaml.safe_load(default):
                found.setdefault(key, {})[stage] = value
    return found


def _of_stage(stage: str) -> dict[str, str]:
    file = CONFIG_DIR / "stage" / f"{stage}.yaml"
    bases = yaml.safe_load(file.read_text(encoding="utf-8")).get("defaults", [])
    values = {key: value for base in bases for key, value in _of_stage(base).items()}
    own = {".".join(entry.path): entry.value for entry in entries(file) if entry.path[0] != "defaults"}
    return values | {key: value for key, value in own.items() if value is not None}


@cache
def types(part: type = Config, prefix: str = "") -> dict[str, Any]:
    """The type of every setting by key."""
    found = {}
    for name, hint in get_type_hints(part, include_extras=True).items():
        if dataclasses.is_dataclass(hint):
            found |= types(hint, f"{prefix}{name}.")
        else:
            found[prefix + name] = hint
    return found


def type_text(hint: Any, language: str) -> str:
    """A type in words."""
    texts = TEXTS[language]
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        limits = [
            sign.format(getattr(limit, name))
            for field in arguments[1:]
            for limit in field.metadata
            for name, sign in SIGNS.items()
            if hasattr(limit, name)
        ]
        return " ".join([type_text(arguments[0], language), *limits])
    if origin in (Union, UnionType):
        return texts["or"].join(dict.fromkeys(type_text(argument, language) for argument in arguments))
    if origin is Literal:
        return texts["or"].join(f"`{argument}`" for argument in arguments)
    if hint is NoneType:
        return "`null`"
    if origin is list:
        return texts["list"].format(type_text(arguments[0], language))
    if origin is tuple:
        return texts["tuple"].format(len(arguments))
    return texts["dict"] if origin is dict else texts["types"][hint]


@cache
def translations() -> dict[str, dict[str, str]]:
    """By key, or by a file's name for what its head says: `en`, and `zh`, which says the same."""
    return yaml.safe_load(TRANSLATIONS.read_text(encoding="utf-8"))


def sentences() -> dict[str, str]:
    """All English sentences by the key that says them, and by the name of the file whose head does."""
    heads = {name: heading(CONFIG_DIR / name) for _, name in SECTIONS if name != MAIN}
    said = {setting.said_at: setting.says for setting in settings().values() if setting.says}
    return heads | said


def problems() -> list[str]:
    """What keeps the pages from being made: settings of which nothing is said, and translations that are not there,
    belong to nothing, or are of another sentence."""
    found = [
        f"{key}: nothing is said of it in verl/trainer/config: add a comment there"
        for key, setting in settings().items()
        if setting.default is not None and not setting.says
    ]
    there, said = translations(), sentences()
    for key, english in said.items():
        if key not in there or not there[key].get("zh"):
            found.append(f"{key}: {TRANSLATIONS.name} has no Chinese for: {english}")
        elif there[key]["en"] != english:
            found.append(
                f"{key}: its comment has changed. It was: {there[key]['en']} It is: {english} Revise the Chinese in "
                f"{TRANSLATIONS.name}, then set `en` to the new sentence"
            )
    found += [f"{key}: {TRANSLATIONS.name} has it, and no setting says anything there" for key in there.keys() - said]
    typed = {key for key, setting in settings().items() if setting.default is not None}
    found += [f"{key}: the page has it, and no run" for key in typed - types().keys()]
    found += [f"{key}: a run has it, and the page does not" for key in types().keys() - typed]
    return found


def page(language: str) -> str:
    """The whole page."""
    texts = TEXTS[language]
    lines = [f"<!-- {texts['made'].replace('`', '')} -->", "", f"# {texts['title']}", "", texts["intro"]]
    for section, name in SECTIONS:
        own = [setting for setting in settings().values() if _section(setting.key) == section]
        lines += ["", f"## `{section}`"]
        if name != MAIN:
            lines += ["", _text(name, heading(CONFIG_DIR / name), language)]
        for setting in own:
            if setting.key == section and setting.says:
                lines += ["", _text(setting.said_at, setting.says, language)]
            elif setting.key != section and (setting.default is not None or setting.says):
                lines += _entry(setting, language)
    return "\n".join([*lines, "", texts["made"], ""])


def _section(key: str) -> str:
    return max((name for name, _ in SECTIONS if key == name or key.startswith(f"{name}.")), key=len)


def _entry(setting: Setting, language: str) -> Iterator[str]:
    texts = TEXTS[language]
    yield from ("", f"### `{setting.key}`")
    if setting.default is not None:
        kind = type_text(types()[setting.key], language)
        yield from ("", f"{texts['default']}{texts['colon']}{_value(setting.default, language)}  ·  {kind}")
    stages = of_stages().get(setting.key)
    if stages:
        by_value: dict[str, list[str]] = {}
        for stage, value in stages.items():
            by_value.setdefault(value, []).append(stage)
        shown = [f"{texts['sep'].join(names)} {_value(value, language)}" for value, names in by_value.items()]
        yield from ("", f"{texts['stages']}{texts['colon']}{'; '.join(shown)}")
    yield from ("", _text(setting.said_at, setting.says, language))


def _value(value: str, language: str) -> str:
    """A default as it is shown: what it follows from, rather than OmegaConf's words for it."""
    texts = TEXTS[language]
    if value == "???":
        return texts["required"]
    by_device = re.fullmatch(r"\$\{by_device:([^,}]+),([^,}]+)\}", value)
    if by_device:
        return texts["by_device"].format(*by_device.groups())
    follows = re.fullmatch(r"\$\{([\w.]+)\}", value)
    if follows and follows[1] in settings():
        return texts["as"].format(key=f"[`{follows[1]}`](#{anchor(follows[1])})")
    return f"`{value}`"


def anchor(key: str) -> str:
    """Of a key's heading, as GitHub and the site make it."""
    return key.replace(".", "")


def _text(key: str, english: str, language: str) -> str:
    """A sentence as Markdown, with a full stop."""
    said = english if language == "en" else translations()[key]["zh"]
    code = said.split("`")
    said = "`".join(part if number % 2 else _marked(part, language) for number, part in enumerate(code))
    if language == "en":
        # A sentence that begins with a value begins as the value does.
        begins = re.match(r"[a-z]+(?![:\w])(?! [|=+])", said) and said.split()[0] not in _values()
        said = said[0].upper() + said[1:] if begins else said
        return said if said.endswith((".", "?")) else f"{said}."
    return said if said.endswith(("。", "？")) else f"{said}。"


@cache
def _values() -> set[str]:
    """The words that a setting's value can be."""
    return {word for hint in types().values() for word in re.findall(r"'(\w+)'", str(hint))} - {"mean"} | {"gspo", "kl"}


def _marked(text: str, language: str) -> str:
    """Plain text as Markdown: names of settings and files in code, nothing else as markup."""
    if language == "en":
        parts = re.split(r"((?<![\w/@:.<-])[\w./]*\w_\w[\w./]*\w(?:=\w+)?(?![\w/@:>-]))", text)
        return "".join(f"`{part}`" if number % 2 else _escaped(part) for number, part in enumerate(parts))
    return _escaped(text)


def _escaped(text: str) -> str:
    return re.sub(r"(?<! )\*|\*(?! )", r"\\*", text.replace("<", "&lt;"))
