"""Read a JSONL, CSV or Parquet file into Python objects, one a row.

Whatever may be wrong with a file becomes a `DataError` of one line.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import reprlib
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from helpers import CourseError

Lines = Iterator[tuple[int, Any]]


class DataError(CourseError):
    """A row, or a file of rows, that cannot be used. Names the file and the line."""


def read_rows(path: Path) -> Lines:
    """The rows of a file, each with its line (of Parquet: its number), counted from 1.

    Raises:
        DataError: the file cannot be read, or is not what its name says.
    """
    readers = {".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}
    _require_file(path)
    reader = readers.get(path.suffix.lower())
    if reader is None:
        advice = " Unpack it first." if path.suffix.lower() in (".gz", ".zip", ".zst") else ""
        raise DataError(f"{path}: the name must end in {', '.join(readers)}.{advice}")
    return reader(path)


def show(value: Any, length: int = 40) -> str:
    """A value for an error message: short, and on one line."""
    if isinstance(value, (dict, list)):  # whatever they hold, however deep
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    short = reprlib.Repr()
    short.maxstring = short.maxother = length
    return short.repr(value)


def _require_file(path: Path) -> None:
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(f"{path}: there is no such file. Check the name.") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(
            f"{path}: cannot be read ({reason}). Check name and permissions."
        ) from error
    if not stat.S_ISREG(mode):  # to read a pipe could wait for ever
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe or device"
        raise DataError(f"{path}: is {kind}, not a file. Name a file of rows.")


def _read_bytes(path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"{path}: cannot be read ({reason}). Check the permissions.") from error
    if content.startswith(b"\x1f\x8b"):
        raise DataError(f"{path}: is compressed with gzip. Unpack it first (gunzip).")
    if content.startswith(b"PK\x03\x04"):
        raise DataError(
            f"{path}: is a ZIP archive or an Excel file. Save it as plain {path.suffix}."
        )
    if content.startswith(b"PAR1"):
        raise DataError(f"{path}: is a Parquet file. Let its name end in .parquet.")
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{path}:1: not UTF-8 but UTF-16. Save the file as UTF-8.")
    if (zero := content.find(b"\0")) >= 0:
        line = content.count(b"\n", 0, zero) + 1
        raise DataError(
            f"{path}:{line}: holds a byte of value 0, which text does not: the file is damaged, or "
            f"not UTF-8. Save it as UTF-8."
        )
    return content


# -- JSONL -------------------------------------------------------------------------------------


class _BadJson(ValueError):
    """JSON that Python would read, but that does not say what it seems to."""


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
    if twice:
        raise _BadJson(f"the key {show(twice[0])} is in one object twice")
    return dict(pairs)


def _refuse_constant(name: str) -> None:
    raise _BadJson(f"{name} is not a JSON value")


def _read_int(digits: str) -> int:
    if len(digits) > 1000:
        raise _BadJson(f"a number of {len(digits)} digits is too long")
    return int(digits)


def _read_jsonl(path: Path) -> Lines:
    begun = False
    for number, line in enumerate(_read_bytes(path).splitlines(), start=1):
        where = f"{path}:{number}"
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{where}: not UTF-8 (byte {error.start + 1} of the line). Save the file as UTF-8."
            ) from error
        if not text.strip():
            continue
        if not begun and re.match(r"\s*\[\s*(\{|$)", text):
            raise DataError(
                f"{where}: looks like a JSON array. A row must be an object on a line of its own: "
                f"write one per line, without brackets around them and commas between them."
            )
        begun = True
        try:
            row = json.loads(
                text,
                object_pairs_hook=_unique_keys,
                parse_constant=_refuse_constant,
                parse_int=_read_int,
            )
        except _BadJson as error:
            raise DataError(f"{where}: {error}. Correct the row.") from error
        except json.JSONDecodeError as error:
            raise DataError(
                f"{where}: not JSON ({error.msg}, column {error.colno}). "
                f"Each line must be one JSON object."
            ) from error
        except (ValueError, RecursionError, MemoryError) as error:
            raise DataError(
                f"{where}: nested too deeply, or too large, to be read. Correct the row."
            ) from error
        yield number, row


# -- CSV ---------------------------------------------------------------------------------------


def _read_csv(path: Path) -> Lines:
    content = _read_bytes(path)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1  # both without the BOM
        raise DataError(f"{path}:{line}: not UTF-8. Save the file as UTF-8.") from error
    # strict: a quote that is never closed would otherwise swallow the rest of the file.
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    before = csv.field_size_limit()
    csv.field_size_limit(max(before, min(len(text), 2**31 - 1)))  # no cell is longer than the file
    try:
        rows = [(reader.line_num, cells) for cells in reader if cells]
    except csv.Error as error:
        raise DataError(
            f"{path}:{reader.line_num}: not CSV ({error}). Check the double quotes."
        ) from error
    finally:
        csv.field_size_limit(before)
    if not rows:
        return
    (line, header), *rows = rows
    _require_header(f"{path}:{line}", header)
    for line, cells in rows:
        if len(cells) != len(header):
            more = len(cells) > len(header)
            raise DataError(
                f"{path}:{line}: {'more' if more else 'fewer'} cells than the header has columns. "
                + (
                    "Put text that holds a comma in double quotes."
                    if more
                    else "Leave no cell out: an empty one is written as a comma alone."
                )
            )
        yield line, dict(zip(header, cells, strict=True))


def _require_header(where: str, header: list[str]) -> None:
    if len(header) == 1:
        for separator, name in ((";", "semicolons"), ("\t", "tabs"), ("|", "vertical bars")):
            if separator in header[0]:
                raise DataError(
                    f"{where}: looks as if {name} separate the columns. Save the file as CSV with "
                    f"commas."
                )
    for number, name in enumerate(header, start=1):
        if not name.strip():
            raise DataError(f"{where}: column {number} has no name. Name it, or remove it.")
        if name in header[: number - 1]:
            raise DataError(
                f"{where}: two columns have the name {show(name)}. Rename or remove one of them."
            )


# -- Parquet -----------------------------------------------------------------------------------


def _read_parquet(path: Path) -> Lines:
    import pyarrow
    import pyarrow.parquet

    try:
        # Opened here, so that a name such as part=1 is not read as a column.
        with path.open("rb") as file:
            parquet = pyarrow.parquet.ParquetFile(file)
            names = parquet.schema_arrow.names
            rows = [] if len(set(names)) < len(names) else parquet.read().to_pylist()
        if twice := [name for name in names if names.count(name) > 1]:
            raise DataError(
                f"{path}: two columns have the name {show(twice[0])}. Rename or remove one."
            )
        yield from enumerate(rows, start=1)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: a text in it is not UTF-8. Write it again as UTF-8.") from error
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:120]
        raise DataError(f"{path}: not a Parquet file ({reason}). Write it again.") from error
