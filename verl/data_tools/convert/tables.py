"""Rows of tables: CSV files as spreadsheets write them, and Excel's own."""

from __future__ import annotations

import csv
import datetime
import io
import re
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from verl.data_tools.convert.json_files import Record
from verl.utils.dataset.arrow_rows import Unreadable

DELIMITERS = (",", "\t", ";", "|")
# What Excel itself keeps of a number.
_DIGITS = 15
_PERCENT = re.compile(r"0(?:\.(0+))?%")
_FIXED = re.compile(r"0(?:\.(0+))?")
_QUOTED = re.compile(r'"[^"]*"|\\.|\[[^\]]*\]')


# ---------------------------------------------------------------------------------------------------------------------
# CSV


def read_csv_text(text: str, name: str, delimiter: str | None) -> tuple[str, list[Record]]:
    """The delimiter of a CSV text, and its rows, all values text; the first row names the columns.

    Raises:
        ValueError: a quote is not closed, or stands within a field; or two columns have one name.
    """
    # Fields may be as long as texts are; the limit is the module's and not the reader's.
    csv.field_size_limit(2**31 - 1)
    said = re.match(r"sep=(.)\r?\n", text)
    if said:
        # Excel's own way to say it, in a first line that is no row.
        text, delimiter = text[said.end() :], delimiter or said[1]
    delimiter = delimiter or _delimiter(text)
    return delimiter, list(_table(_csv_rows(text, name, delimiter), name))


def _delimiter(text: str) -> str:
    """The one that splits the first row into most columns."""

    def columns(delimiter: str) -> int:
        try:
            return len(next(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter), ()))
        except csv.Error:
            return 0

    return max(DELIMITERS, key=columns)


def _csv_rows(text: str, name: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Rows with the line, from 1, that each begins in; without blank ones."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    number, line = -1, 1  # The header is no row.
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            place = f"row {number}" if number >= 0 else "header"
            why = "a quote that opens there is not closed" if "end of data" in str(error) else str(error)
            raise ValueError(f"{name}, {place}, which begins in line {line} (from 1): is not CSV: {why}") from error
        if row:
            yield line, row
            number += 1
        line = reader.line_num + 1


def _table(rows: Iterator[tuple[int, Sequence[Any] | Unreadable]], name: str) -> Iterator[Record]:
    """Records of rows of which the first has the columns' names; columns without one are left out (pandas' index)."""
    first = next(rows, None)
    if first is None:
        raise ValueError(f"{name} has no rows")
    header = [] if isinstance(first[1], Unreadable) else first[1]
    header = [str(value).strip() if value is not None else "" for value in header]
    twice = next((column for column in header if column and header.count(column) > 1), None)
    if twice is not None:
        raise ValueError(f"{name} has two columns of the name {twice!r}: rename one")
    for line, row in rows:
        if isinstance(row, Unreadable):
            yield row
        elif len(row) != len(header):
            yield Unreadable(line, f"has {len(row)} fields, but the header {len(header)}")
        else:
            yield {column: value for column, value in zip(header, row, strict=True) if column}


# ---------------------------------------------------------------------------------------------------------------------
# Excel


def read_xlsx(path: Path, sheet: str | None) -> tuple[str, list[Record]]:
    """The name of a sheet, and its rows; the first row names the columns. Numbers and dates are text, as typed.

    Args:
        sheet: None is the only one that has something in it.

    Raises:
        ValueError: it is no such file, or it has several sheets and none is named.
    """
    try:
        import openpyxl
    except ImportError as error:
        raise ValueError(f"{path}: Excel files need openpyxl: pip install -e '.[data]', or save it as CSV") from error
    try:
        book = openpyxl.load_workbook(path, read_only=True, data_only=True)
    except (zipfile.BadZipFile, KeyError, OSError, ValueError) as error:
        raise ValueError(f"{path} is not a readable Excel file (.xlsx): {error}") from error
    try:
        chosen = _sheet(book, path, sheet)
        rows = list(_table(_sheet_rows(chosen), f"{path}, sheet {chosen.title!r}"))
        rows = _without_computed(path, chosen.title, rows)
        return chosen.title, rows
    finally:
        book.close()


def _sheet(book: Any, path: Path, name: str | None) -> Any:
    for sheet in book.worksheets:
        # Some programs write a size that is not the sheet's.
        sheet.reset_dimensions()
    filled = [sheet for sheet in book.worksheets if any(_filled(row) for row in sheet.iter_rows(values_only=True))]
    names = ", ".join(repr(sheet.title) for sheet in filled)
    if name is not None:
        found = next((sheet for sheet in filled if sheet.title == name), None)
        if found is None:
            raise ValueError(f"{path}: expected rows in a sheet {name!r}, got the sheets {names or 'all empty'}")
        return found
    if not filled:
        raise ValueError(f"{path} has no rows")
    if len(filled) > 1:
        raise ValueError(f"{path}: expected one sheet with rows, got {names}; name one with --sheet")
    return filled[0]


def _filled(row: Sequence[Any]) -> bool:
    return any(value is not None for value in row)


def _sheet_rows(sheet: Any) -> Iterator[tuple[int, list[Any] | Unreadable]]:
    """Rows of text with their number in the sheet, from 1; without blank ones and blank columns at the right."""
    width = 0
    for number, cells in enumerate(sheet.iter_rows(), start=1):
        values = [as_typed(cell.value, getattr(cell, "number_format", "General")) for cell in cells]
        if not _filled(values):
            continue
        wrong = next((cell for cell in cells if getattr(cell, "data_type", "") == "e"), None)
        if wrong is not None:
            yield number, Unreadable(None, f"has an Excel error in a cell ({wrong.value})")
            continue
        if not width:
            width = max(place for place, value in enumerate(values, start=1) if value is not None)
        beyond = values[width:]
        values = values[:width] + [None] * (width - len(values))
        yield number, values + ([value for value in beyond if value is not None])


def as_typed(value: Any, number_format: str) -> str | None:
    """A cell's value as the text that was typed into it; fonts, colours and thousands separators are no part of it."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool):
        return str(value).upper()
    if isinstance(value, datetime.datetime) and value.time() == datetime.time():
        return value.date().isoformat()
    if isinstance(value, datetime.datetime | datetime.date | datetime.time):
        return value.isoformat(sep=" ") if isinstance(value, datetime.datetime) else value.isoformat()
    if not isinstance(value, int | float):
        return str(value)
    plain = _QUOTED.sub("", number_format.split(";")[0]).strip()
    percent, fixed = _PERCENT.fullmatch(plain), _FIXED.fullmatch(plain)
    if percent:
        shown = f"{value * 100:.{_DIGITS}g}"
        return f"{_with_places(shown, len(percent[1] or ''))}%"
    text = str(value) if isinstance(value, int) else f"{value:.{_DIGITS}g}"
    return _with_places(text, len(fixed[1] or "")) if fixed else text


def _with_places(number: str, places: int) -> str:
    """With zeros at its end up to so many decimal places; none is ever cut."""
    if "e" in number or not places:
        return number
    whole, _, part = number.partition(".")
    return f"{whole}.{part.ljust(places, '0')}"


def _without_computed(path: Path, title: str, rows: list[Record]) -> list[Record]:
    """The rows; those with a formula whose value is not in the file, as programs write them, say so instead of null."""
    if not any(isinstance(row, dict) and None in row.values() for row in rows):
        return rows
    import openpyxl

    book = openpyxl.load_workbook(path, read_only=True)
    try:
        book[title].reset_dimensions()
        formulas = list(_table(_sheet_rows(book[title]), str(path)))
    finally:
        book.close()
    if len(formulas) != len(rows):
        return rows
    return [_computed(row, formula) for row, formula in zip(rows, formulas, strict=True)]


def _computed(row: Record, formula: Record) -> Record:
    if isinstance(row, dict) and isinstance(formula, dict):
        for column, value in row.items():
            if value is None and str(formula.get(column) or "").startswith("="):
                return Unreadable(None, f"has a formula in {column!r} without its value: open and save it in Excel")
    return row
