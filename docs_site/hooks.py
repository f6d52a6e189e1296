"""What mkdocs calls while it builds: every page gets a link to itself in the other language, where there is one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1] / "docs"
LANGUAGES = {"en": ("English", DOCS), "zh": ("中文", DOCS / "zh")}
# From one language's folder of the site to another's.
WAYS = {("en", "zh"): "zh/", ("zh", "en"): "../"}
# mkdocs' own filter does not find the way out of a site's folder, and leaves alone what begins like this.
AS_IT_IS = "#as-it-is:"


def on_page_context(context: dict[str, Any], *, page: Any, config: Any, nav: Any) -> dict[str, Any]:
    """Set the language switch to this page's own counterparts."""
    here = config.theme["language"]
    top = "../" * page.url.count("/")
    config.extra["alternate"] = [
        {"name": name, "lang": language, "link": AS_IT_IS + top + WAYS.get((here, language), "") + page.url}
        for language, (name, folder) in LANGUAGES.items()
        if (folder / page.file.src_uri).is_file()
    ]
    return context


def on_post_page(output: str, *, page: Any, config: Any) -> str:
    """Take the mark off again."""
    return output.replace(AS_IT_IS, "")
