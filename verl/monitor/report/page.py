"""The page: data, drawing library, script and style in one file.

Every text stands in the data, whose `<` are escaped, and gets into the page as text alone (`textContent`). Should
anything of it ever arrive as HTML, the page's policy lets no other script run than its own, by their digests, and
nothing be loaded.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import yaml

from verl.monitor.report.document import Seen, describe, most_points, panels
from verl.monitor.report.provenance import settings_table
from verl.monitor.rules import Language

HERE = Path(__file__).parent
ASSETS = HERE.parent / "assets"
TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
{styles}
</head>
<body>
<noscript>{verdicts}</noscript>
<div id="page"></div>
<script type="application/json" id="data">{data}</script>
<!-- uPlot:
{licence}-->
{scripts}
</body>
</html>
"""


def write_page(seen: Sequence[Seen], path: Path, language: Language = "en") -> None:
    """Write the report of these runs.

    Raises:
        OSError: the file cannot be written.
    """
    path.write_text(page(document(seen, language)), encoding="utf-8", errors="replace")


def document(seen: Sequence[Seen], language: Language = "en") -> dict[str, Any]:
    """All that the page shows."""
    runs = [describe(one, len(seen)) for one in seen]
    _tell_apart(runs, seen)
    return {
        "language": language,
        "most": most_points(len(seen)),
        "made": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "texts": yaml.safe_load((HERE / "texts.yaml").read_text(encoding="utf-8")),
        "sections": panels(),
        "settings": settings_table([one.run.settings for one in seen], [run["record"] for run in runs]),
        "runs": runs,
    }


def _tell_apart(runs: Sequence[dict[str, Any]], seen: Sequence[Seen]) -> None:
    """Runs of one name get their folder's before it, or a number."""
    names = [run["name"] for run in runs]
    for run, one in zip(runs, seen, strict=True):
        if names.count(run["name"]) > 1:
            run["name"] = f"{one.folder.resolve().parent.name}/{run['name']}"
    names = [run["name"] for run in runs]
    for number, run in enumerate(runs):
        if names.count(names[number]) > 1:
            run["name"] = f"{names[number]} ({names[: number + 1].count(names[number])})"


def page(content: dict[str, Any]) -> str:
    """The file's text."""
    styles = [(ASSETS / "uPlot.min.css").read_text(encoding="utf-8"), (HERE / "report.css").read_text(encoding="utf-8")]
    scripts = [
        (ASSETS / "uPlot.iife.min.js").read_text(encoding="utf-8"),
        (HERE / "report.js").read_text(encoding="utf-8"),
    ]
    policy = (
        "default-src 'none'; img-src data:; "
        f"style-src {' '.join(map(_digest, styles))}; script-src {' '.join(map(_digest, scripts))}"
    )
    verdicts = [f"{run['name']}: {run['verdict'][content['language']]}" for run in content["runs"]]
    return TEMPLATE.format(
        policy=policy,
        title=html.escape(", ".join(run["name"] for run in content["runs"])),
        styles="\n".join(f"<style>{text}</style>" for text in styles),
        verdicts="".join(f"<p>{html.escape(verdict)}</p>" for verdict in verdicts),
        # No "<": neither the element's end nor a comment's begin.
        data=json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"),
        licence=(ASSETS / "uPlot.LICENSE").read_text(encoding="utf-8"),
        scripts="\n".join(f"<script>{text}</script>" for text in scripts),
    )


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
