"""Which split an example belongs to: by its text alone, and never apart from what it shares."""

import hashlib
from collections.abc import Hashable, Iterable, Sequence


def bucket(text: str, buckets: int) -> int:
    """A number in 0..buckets-1 that depends on the text alone: its sha256 modulo buckets."""
    return int(hashlib.sha256(text.encode()).hexdigest(), 16) % buckets


def connected(keys: Sequence[Iterable[Hashable]]) -> list[list[int]]:
    """The items in groups: those that share a key, directly or through others, are together.

    Args:
        keys: those of each item.

    Returns:
        Item numbers, rising in each group, groups by their first. No key is in two groups.

    Example:
        >>> connected([{"a"}, {"b"}, {"a", "c"}, {"c"}])
        [[0, 2, 3], [1]]
    """
    parent = list(range(len(keys)))

    def root(item: int) -> int:
        while parent[item] != item:
            parent[item] = parent[parent[item]]
            item = parent[item]
        return item

    first: dict[Hashable, int] = {}
    for item, own in enumerate(keys):
        for key in own:
            one, other = sorted((root(first.setdefault(key, item)), root(item)))
            parent[other] = one
    groups: dict[int, list[int]] = {}
    for item in range(len(keys)):
        groups.setdefault(root(item), []).append(item)
    return list(groups.values())
