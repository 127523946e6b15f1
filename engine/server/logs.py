"""How the log is written: lines for people, or a JSON object a line for machines. Neither ever has texts of requests."""

import logging
from datetime import UTC, datetime

import msgspec

_TEXT = "%(asctime)s %(levelname)s %(name)s %(message)s"


class JsonFormatter(logging.Formatter):
    """One JSON object a record; the fields that a record brings as `extra={"fields": ...}` are in it."""

    def format(self, record: logging.LogRecord) -> str:
        """The record on one line."""
        entry: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode(entry).decode()


def formatter(kind: str) -> logging.Formatter:
    """For `log_format`."""
    return JsonFormatter() if kind == "json" else logging.Formatter(_TEXT)
