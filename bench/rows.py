"""What is relayed: payloads that hardly compress, under 1,000 keys.

A payload is JSON of an exact size whose first members say which message it is, so that any arm's records can be checked
whatever it puts around them: ``{"n": 17, "k": 17, "v": 1, "x": "…"}``. The filler is what SHA-512 makes of the number.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from enum import StrEnum

#: The sizes that are measured, in bytes.
SIZES = (300, 1024)
KEYS = 1_000

#: Characters of base64 that one hash gives, its line break and padding left out.
_HASH_CHARACTERS = 86
#: How a payload ends, and how long it may be before the filler where that is one for all.
_END = '"}'
_HEAD_CHARACTERS = 80
#: The fractions of its multiples are spread over 0 to 1 as chance would spread them, and are the same in each run.
_GOLDEN = 0.6180339887498949


class Spread(StrEnum):
    """How messages are spread over the keys."""

    EVEN = "even"  #: one after the other
    ZIPF = "zipf"  #: the k-th key has 1/k of what the first has
    HOT = "hot"  #: every other message is of one key
    ONE = "one"  #: all are of one key


@dataclass(frozen=True)
class Rows:
    """A backlog, or the messages of writers."""

    count: int
    size: int
    spread: Spread = Spread.EVEN

    def fill(self) -> str:
        """SQL that makes ``bench_rows (n, k, v, key, payload)``, from which all arms take their rows."""
        return f"""
            CREATE UNLOGGED TABLE bench_rows AS
            SELECT n, k, v, {key_of("k")} AS key, {payload_of("n", "k", "v", self.size)} AS payload
            FROM {self.numbered()}
            ORDER BY n;
            ALTER TABLE bench_rows ADD PRIMARY KEY (n)"""

    def numbered(self) -> str:
        """A table expression: ``n``, ``k`` and ``v`` of each."""
        return f"""
            (SELECT n::bigint AS n, k, (row_number() OVER (PARTITION BY k ORDER BY n))::integer AS v
             FROM (SELECT n, {self.key_number("n")} AS k FROM generate_series(1, {self.count}) AS n) AS keyed
            ) AS numbered"""

    def key_number(self, n: str) -> str:
        """An expression: which key the n-th message has."""
        even = f"(({n} - 1) % {KEYS} + 1)::integer"
        if self.spread is Spread.EVEN:
            return even
        if self.spread is Spread.HOT:
            return f"CASE WHEN {n} % 2 = 0 THEN 1 ELSE {even} END"
        if self.spread is Spread.ONE:
            return "1"
        shares = list(itertools.accumulate(1 / k for k in range(1, KEYS)))
        whole = shares[-1] + 1 / KEYS
        bounds = ", ".join(f"{share / whole:.9f}" for share in shares)
        chance = f"({n} * {_GOLDEN}::float8 - floor({n} * {_GOLDEN}::float8))"
        return f"(width_bucket({chance}, ARRAY[{bounds}]::float8[]) + 1)::integer"


@dataclass(frozen=True)
class LargeRows(Rows):
    """The same, with one filler for all, of which ``bench_rows`` is made as it is read: gigabytes take no room twice.

    A payload compresses as little as others do, but two of them together do.
    """

    def fill(self) -> str:
        parts = self.size // _HASH_CHARACTERS + 1
        return f"""
            CREATE UNLOGGED TABLE bench_numbers AS SELECT * FROM {self.numbered()} ORDER BY n;
            ALTER TABLE bench_numbers ADD PRIMARY KEY (n);
            CREATE UNLOGGED TABLE bench_filler AS
            SELECT left(string_agg({_hashed("part")}, ''), {self.size - _HEAD_CHARACTERS - len(_END)}) AS filler
            FROM generate_series(1, {parts}) AS part;
            CREATE VIEW bench_rows AS
            SELECT n, k, v, {key_of("k")} AS key,
                   rpad({_head("n", "k", "v")}, {_HEAD_CHARACTERS}, '.') || filler || '{_END}' AS payload
            FROM bench_numbers, bench_filler"""


def key_of(k: str) -> str:
    """An expression: the key itself, of twelve bytes."""
    return f"('order-' || lpad({k}::text, 6, '0'))"


def payload_of(n: str, k: str, v: str, size: int) -> str:
    """An expression: a payload of so many bytes."""
    hashes = " || ".join(_hashed(f"{n} || '/{part}'") for part in range(size // _HASH_CHARACTERS + 1))
    return f"rpad({_head(n, k, v)} || {hashes}, {size - len(_END)}) || '{_END}'"


def _head(n: str, k: str, v: str) -> str:
    """An expression: how a payload begins."""
    return f"""'{{"n": ' || {n} || ', "k": ' || {k} || ', "v": ' || {v} || ', "x": "'"""


def _hashed(what: str) -> str:
    """An expression: so many characters that don't compress."""
    return f"translate(encode(sha512(convert_to(({what})::text, 'UTF8')), 'base64'), E'\\n=', '')"
