"""A file of JSON lines that is valid after a kill at any moment: a row is one write, and a torn last line is no row."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

Row = dict[str, Any]
MOST_OF_A_TEXT = 4000  # characters of a traceback: its end tells most


def add(path: Path, row: Row) -> None:
    """Append a row; the line that a killed writer left half done is closed first."""
    text = json.dumps(row, ensure_ascii=False, default=float) + "\n"
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        size = os.fstat(file).st_size
        if size and os.pread(file, 1, size - 1) != b"\n":
            text = "\n" + text
        os.write(file, text.encode())
    finally:
        os.close(file)


def read(path: Path) -> list[Row]:
    """All whole rows; none where there is no file."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def end_of(text: str) -> str:
    """As much of a text as a row holds."""
    return text[-MOST_OF_A_TEXT:]
