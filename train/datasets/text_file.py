"""Reading downloaded text files, with errors that name the line."""

import csv
import io


def decode(name: str, content: bytes) -> str:
    """The text of a UTF-8 file, with or without a byte order mark. Raises ValueError if not."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{name}, line {line}: not UTF-8 text") from None


def read_csv(name: str, content: bytes, header: list[str]) -> list[list[str]]:
    """The rows below the header. Raises ValueError for another header or a row of other length."""
    reader = csv.reader(io.StringIO(decode(name, content), newline=""), strict=True)
    rows = []
    try:
        first = next(reader, [])
        if first != header:
            raise ValueError(f"{name}: columns are {str(first)[:200]}, expected {header}")
        for row in reader:
            if len(row) != len(header) or not all(row):
                raise ValueError(
                    f"{name}, line {reader.line_num}: {len(row)} columns {str(row)[:200]}, "
                    f"expected {len(header)}, none of them empty"
                )
            rows.append(row)
    except csv.Error as error:
        raise ValueError(f"{name}, line {reader.line_num}: {error}") from None
    return rows
