"""The documents as a site: it builds without a warning and without network, and both languages have the same pages."""

from __future__ import annotations

import logging
import re
import socket
from collections import Counter
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from mkdocs.commands.build import build
from mkdocs.config import load_config

from tests.docs.doc_blocks import blocks
from tests.docs.doc_commands import commands

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
FOLDERS = {"en": DOCS, "zh": DOCS / "zh"}
CONFIGS = {"en": "mkdocs.yml", "zh": "mkdocs.zh.yml"}
# The site is written with its first page: until then there are pages in its table of contents that are still to come.
WRITTEN = [language for language, folder in FOLDERS.items() if (folder / "index.md").is_file()]
in_both_languages = pytest.mark.skipif("zh" not in WRITTEN, reason="docs/zh is not written yet")


def pages(language: str) -> set[str]:
    """The pages of a language, as paths below its folder."""
    found = {str(file.relative_to(FOLDERS[language])) for file in FOLDERS[language].rglob("*.md")}
    return {name for name in found if language == "zh" or not name.startswith("zh/")}


def in_nav(nav) -> list[str]:
    """The pages of a table of contents, in their order."""
    if isinstance(nav, str):
        return [nav]
    return [page for part in (nav.values() if isinstance(nav, dict) else nav) for page in in_nav(part)]


def there(nav, folder: Path):
    """A table of contents without the pages that do not exist."""
    if isinstance(nav, str):
        return nav if (folder / nav).is_file() else None
    if isinstance(nav, dict):
        kept = {title: there(part, folder) for title, part in nav.items()}
        return {title: part for title, part in kept.items() if part} or None
    return [part for part in (there(part, folder) for part in nav) if part]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """Both languages' site, built with every connection refused; a warning is an error."""
    folder = tmp_path_factory.mktemp("site")
    warnings = logging.Handler(logging.WARNING)
    warnings.emit = lambda record: said.append(record.getMessage())
    said: list[str] = []
    logger = logging.getLogger("mkdocs")
    logger.addHandler(warnings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", lambda *_: pytest.fail("the site's build asked the network"))
        patch.setenv("NO_MKDOCS_2_WARNING", "1")
        for language, name in CONFIGS.items():
            config = load_config(str(ROOT / name), site_dir=str(folder / ("" if language == "en" else "zh")))
            if language not in WRITTEN:
                config.nav = there(config.nav, FOLDERS[language])
            if language == "zh" and language not in WRITTEN:
                # The generated pages alone, whose links lead to pages to come.
                config.validation.links.not_found = logging.INFO
            build(config)
    logger.removeHandler(warnings)
    assert said == []
    return folder


def test_every_page_is_there_and_nothing_is_fetched_to_read_it(site):
    for language in CONFIGS:
        folder = site if language == "en" else site / "zh"
        for name in pages(language):
            html = (folder / name).with_suffix(".html").read_text(encoding="utf-8")
            fetched = re.findall(r"""<(?:script|img|iframe|link)\b[^>]*(?:src|href)=["']?(https?:)?//[^"'>]*""", html)
            assert fetched == [], name
    styles = [file.read_text(encoding="utf-8") for file in site.rglob("*.css")]
    assert len(styles) > 1 and not any(re.search(r"(url\(|@import )[\"']?https?:", style) for style in styles)
    assert (site / "search" / "search_index.json").is_file()


def test_a_page_offers_itself_in_the_other_language(site):
    english = (site / "reference/settings.html").read_text(encoding="utf-8")
    chinese = (site / "zh/reference/settings.html").read_text(encoding="utf-8")
    assert re.search(r'href="\.\./zh/reference/settings\.html" hreflang="zh"', english)
    assert re.search(r'href="\.\./\.\./reference/settings\.html" hreflang="en"', chinese)
    for html in (english, chinese):
        for link in re.findall(r'href="([^"]+)" hreflang="\w+" class="md-select__link"', html):
            base = site / ("reference" if html is english else "zh/reference")
            assert (base / link).is_file(), link


@pytest.mark.parametrize("name", sorted(pages("en") | {f"zh/{name}" for name in pages("zh")}))
def test_lists_tables_and_code_are_on_the_site_what_they_are_by_commonmark(site, name):
    """GitHub shows files by CommonMark, the site by Python-Markdown, which wants an empty line before a list."""
    tokens = MarkdownIt().enable("table").parse((DOCS / name).read_text(encoding="utf-8"))
    kinds = {
        "bullet_list_open": "ul",
        "ordered_list_open": "ol",
        "table_open": "table",
        "code_block": "pre",
        "fence": "pre",
    }
    expected = Counter(kinds[token.type] for token in tokens if token.type in kinds)
    html = (site / name).with_suffix(".html").read_text(encoding="utf-8")
    article = html.split("<article", 1)[1].split("</article>", 1)[0]
    found = Counter(re.findall(r"<(ul|ol|table|pre)\b", article))
    assert {kind: found[kind] for kind in ("ul", "ol", "table", "pre")} == {
        kind: expected[kind] for kind in ("ul", "ol", "table", "pre")
    }


@pytest.mark.parametrize("language", WRITTEN)
def test_the_table_of_contents_has_every_page(language):
    assert sorted(in_nav(load_config(str(ROOT / CONFIGS[language])).nav)) == sorted(pages(language))


def test_both_tables_of_contents_are_the_same():
    english, chinese = (load_config(str(ROOT / name)).nav for name in CONFIGS.values())
    assert in_nav(english) == in_nav(chinese) and len(english) == len(chinese)


# ---- the same pages in both languages


# Fences that hold a file.
FILES = {"yaml", "json", "python", "toml"}


def shape(file: Path) -> list[tuple[str, object]]:
    """Headings' levels and code, in their order: commands word by word, and files without comments. What a
    program prints, and trees of files, are code too, and their words may be translated."""
    found: list[tuple[str, object]] = []
    for block in blocks(file):
        if block.level:
            found.append(("heading", block.level))
        elif block.language in FILES:
            found.append(("file", without_comments(block.text)))
        else:
            found.append(("code", [command.words for command in commands([block])]))
    return found


def test_translations_may_change_words_and_not_commands(tmp_path):
    english = (
        "# A\n\n    verl chat student --temperature 0   # greedy\n\n```yaml\na: 1  # one\n```\n\n    a/   weights\n"
    )
    made = {
        "same": english.replace("# A", "# 甲")
        .replace("greedy", "贪心")
        .replace("weights", "权重")
        .replace("one", "一"),
        "flag": english.replace("temperature 0", "temperature 1"),
        "level": english.replace("# A", "## A"),
        "value": english.replace("a: 1", "a: 2"),
        "block": english.replace("    a/   weights\n", ""),
    }
    (tmp_path / "english.md").write_text(english)
    for name, text in made.items():
        (tmp_path / f"{name}.md").write_text(text, encoding="utf-8")
        assert (shape(tmp_path / f"{name}.md") == shape(tmp_path / "english.md")) == (name == "same"), name


def without_comments(code: str) -> str:
    """Code without what may be translated: comments, and the spaces before them. What is typed in Chinese stays."""
    return "\n".join(re.sub(r"(^|\s+)#\s.*$", "", line).rstrip() for line in code.splitlines())


@in_both_languages
def test_both_languages_have_the_same_pages():
    assert pages("en") == pages("zh")
    assert (ROOT / "README.zh-CN.md").is_file()


@pytest.mark.parametrize("name", sorted(pages("en") & pages("zh")))
def test_a_page_has_the_same_headings_and_commands_in_both_languages(name):
    english, chinese = (shape(folder / name) for folder in FOLDERS.values())
    assert chinese == english


@in_both_languages
def test_the_readme_has_the_same_headings_and_commands_in_both_languages():
    assert shape(ROOT / "README.zh-CN.md") == shape(ROOT / "README.md")
