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
#: The fractions of its multiples are spread over 0 to 1 as chance would spread them, and are the same in each run.
_GOLDEN = 0.6180339887498949


class Spread(StrEnum):
    """How messages are spread over the keys."""

    EVEN = "even"  #: one after the other
    ZIPF = "zipf"  #: the k-th key has 1/k of what the first has
    HOT = "hot"  #: every other message is of one key


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
            SELECT n::bigint AS n, k, v, {key_of("k")} AS key, {payload_of("n", "k", "v", self.size)} AS payload
            FROM (SELECT n, k, (row_number() OVER (PARTITION BY k ORDER BY n))::integer AS v
                  FROM (SELECT n, {self.key_number("n")} AS k FROM generate_series(1, {self.count}) AS n) AS keyed
                 ) AS numbered
            ORDER BY n;
            ALTER TABLE bench_rows ADD PRIMARY KEY (n)"""

    def key_number(self, n: str) -> str:
        """An expression: which key the n-th message has."""
        even = f"(({n} - 1) % {KEYS} + 1)::integer"
        if self.spread is Spread.EVEN:
            return even
        if self.spread is Spread.HOT:
            return f"CASE WHEN {n} % 2 = 0 THEN 1 ELSE {even} END"
        shares = list(itertools.accumulate(1 / k for k in range(1, KEYS)))
        whole = shares[-1] + 1 / KEYS
        bounds = ", ".join(f"{share / whole:.9f}" for share in shares)
        chance = f"({n} * {_GOLDEN}::float8 - floor({n} * {_GOLDEN}::float8))"
        return f"(width_bucket({chance}, ARRAY[{bounds}]::float8[]) + 1)::integer"


def key_of(k: str) -> str:
    """An expression: the key itself, of twelve bytes."""
    return f"('order-' || lpad({k}::text, 6, '0'))"


def payload_of(n: str, k: str, v: str, size: int) -> str:
    """An expression: a payload of so many bytes."""
    head = f"""'{{"n": ' || {n} || ', "k": ' || {k} || ', "v": ' || {v} || ', "x": "'"""
    hashes = " || ".join(
        f"translate(encode(sha512(convert_to({n} || '/{part}', 'UTF8')), 'base64'), E'\\n=', '')"
        for part in range(size // _HASH_CHARACTERS + 1)
    )
    return f"""rpad({head} || {hashes}, {size - 2}) || '"}}'"""
