"""Write the pages that are made from the code, docs/reference and docs/zh/reference, and docs/zh/models.md.

python -m docs_site.generate            # after a change of settings, their comments, metrics or docs/models.md
python -m docs_site.generate --check    # writes nothing; exit code 1 where a page is not up to date
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from docs_site import metrics, models, settings

ROOT = Path(__file__).parents[1]
FOLDERS = {"en": ROOT / "docs" / "reference", "zh": ROOT / "docs" / "zh" / "reference"}
PAGES = {"settings": settings, "metrics": metrics}


def pages() -> dict[Path, str]:
    """Every page's text by its file."""
    found = {
        folder / f"{name}.md": source.page(language)
        for language, folder in FOLDERS.items()
        for name, source in PAGES.items()
    }
    return {**found, FOLDERS["zh"].parent / "models.md": models.page()}


def stale() -> list[str]:
    """The pages that are not as they would be written."""
    made = pages().items()
    there = [file for file, text in made if file.is_file() and file.read_text(encoding="utf-8") == text]
    return [str(file.relative_to(ROOT)) for file, _ in made if file not in there]


def problems() -> list[str]:
    """What keeps the pages from being made."""
    return [problem for source in (*PAGES.values(), models) for problem in source.problems()]


def main(arguments: list[str] | None = None) -> int:
    """Write the pages, or check them; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m docs_site.generate", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit code 1 where a page is not up to date"
    )
    check = parser.parse_args(arguments).check
    found = problems()
    if not found and check:
        found = [f"{name} is not up to date: python -m docs_site.generate" for name in stale()]
    if found:
        print("\n".join(found), file=sys.stderr)
        return 1
    if not check:
        for file, text in pages().items():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
            print(file.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
