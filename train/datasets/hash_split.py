"""Deciding a split by hash: the same text always falls into the same split."""

import hashlib


def bucket(text: str, buckets: int) -> int:
    """A number in 0..buckets-1 that depends on the text alone: its sha256 modulo buckets."""
    return int(hashlib.sha256(text.encode()).hexdigest(), 16) % buckets
