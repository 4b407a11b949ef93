"""What huggingface_hub logs, without secrets: its warnings name the addresses of files, whose queries open them."""

from __future__ import annotations

import logging

from loratool.hub.errors import without_secrets


class WithoutSecrets(logging.Filter):
    """Takes tokens and the queries of addresses out of every message."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = without_secrets(record.getMessage()), ()
        return True


def keep_logs_clean() -> None:
    """Have huggingface_hub's own log handler show no secrets. Twice is once."""
    for handler in logging.getLogger("huggingface_hub").handlers:
        if not any(isinstance(each, WithoutSecrets) for each in handler.filters):
            handler.addFilter(WithoutSecrets())
