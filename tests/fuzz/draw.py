"""Draw: values out of bytes, always the same for the same bytes, so that whoever changes bytes changes values.

Where the bytes run out there are zeros, and so the first of every choice: short inputs make simple values.
"""

import math
import struct
from copy import deepcopy

WORDS = ["", "a", "auto", "true", "[MASK]", "{}", "\0", "\ud800", "é", "../x", "/", "nan", "9" * 5000, "x\ny", "1e999"]
NUMBERS = [0, 1, -1, 2, 7, 64, 2**31 - 1, -(2**31), 2**63, 2**64, 10**30, 0.5, -0.0, 1e308, math.inf, math.nan]


class Draw:
    def __init__(self, data):
        self._data, self._at = data, 0

    def take(self, size):
        found = self._data[self._at : self._at + size]
        self._at += size
        return found.ljust(size, b"\0")

    def rest(self):
        found, self._at = self._data[self._at :], len(self._data)
        return found

    def below(self, count):
        return int.from_bytes(self.take(1 if count <= 256 else 2), "big") % count

    def one(self, choices):
        return choices[self.below(len(choices))]

    def yes(self):
        return self.below(2) == 1

    def text(self):
        """A known word (one a lone surrogate, which JSON can write), or any text."""
        if self.yes():
            return self.one(WORDS)
        return self.take(self.below(24)).decode("utf-8", "replace") or "b"

    def string(self):
        """Bytes, as Triton hands them on."""
        return self.take(self.below(48)) if self.yes() else self.one(WORDS).encode("utf-8", "surrogatepass")

    def integer(self, size):
        """Of so many bytes, signed; small ones as often."""
        return int.from_bytes(self.take(size), "big", signed=True) if self.yes() else self.below(64) - 2

    def real(self):
        return struct.unpack(">f", self.take(4))[0] if self.yes() else self.below(256) / 128

    def json(self, depth=3):
        kind = self.below(8 if depth else 5)
        if kind < 5:
            return [None, True, self.one(NUMBERS), self.integer(4), self.text()][kind]
        count = self.below(4)
        if kind == 5:
            return [self.json(depth - 1) for _ in range(count)]
        return {self.text(): self.json(depth - 1) for _ in range(count)}

    def fields(self, names, value=None):
        """An object with some of these names."""
        return {self.one(names): (value or self.json)() for _ in range(self.below(6))}

    def changed(self, base, names):
        """A document with some of its values replaced, taken out or put in, anywhere in it."""
        found = deepcopy(base)
        for _ in range(self.below(5)):
            place = found
            while isinstance(place, dict | list) and place and self.yes():
                inner = self.one([*place.values()] if isinstance(place, dict) else place)
                place = inner if isinstance(inner, dict | list) else place
            self._change(place, names)
        return self.json() if self.below(32) == 31 else found

    def _change(self, place, names):
        if isinstance(place, list):
            at = self.below(len(place) + 1)
            place[at : at + self.below(2)] = [self.json() for _ in range(self.below(2))]
        elif place and self.below(4) == 3:
            del place[self.one([*place])]
        else:
            place[self.one([*place, *names, "x"])] = self.json()
