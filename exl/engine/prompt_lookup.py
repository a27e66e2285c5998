"""Drafts without a model: what followed the last tokens where they stood before, in the prompt or the answer.

Prompt lookup (Saxena, "Prompt Lookup Decoding", 2023) pays where an answer repeats its prompt: summaries, edits, code.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from exl.engine.speculation import SequenceView
from exl.errors import ConfigError

_MOST_LENGTHS = 8
_LONGEST = 64
# A prompt's tokens are indexed this many a call, a few milliseconds, so that a long prompt holds up no other sequence.
_INDEXED_A_CALL = 1024


class PromptLookup:
    """See ``Drafter``. The longest suffix of a sequence that occurred earlier, and there its most recent occurrence."""

    def __init__(self, lengths: Sequence[int] = (8, 4, 3, 2)) -> None:
        """``lengths``: of the suffixes that are looked up. Each takes up to 200 bytes a token.

        Raises ``ConfigError``.
        """
        if not 1 <= len(lengths) <= _MOST_LENGTHS or any(not 1 <= n <= _LONGEST for n in lengths):
            raise ConfigError(
                f"prompt lookup: found suffix lengths {list(lengths)}, expected 1 to {_MOST_LENGTHS} of them,"
                f" each from 1 to {_LONGEST} tokens"
            )
        self._lengths = tuple(sorted(set(lengths), reverse=True))
        self._indices: dict[SequenceView, _SuffixIndex] = {}

    def propose(self, want: Sequence[tuple[SequenceView, int]]) -> list[tuple[int, ...]]:
        """Nothing for a sequence whose long prompt is not yet indexed to its end."""
        room = _INDEXED_A_CALL
        drafts: list[tuple[int, ...]] = []
        for sequence, most in want:
            index = self._indices.get(sequence)
            if index is None:
                index = self._indices[sequence] = _SuffixIndex(self._lengths)
            index.truncate(len(sequence.ids))
            known = len(index.ids)
            index.extend(sequence.ids[known : known + max(room, 1)])
            room -= len(index.ids) - known
            drafts.append(index.continuation(most) if len(index.ids) == len(sequence.ids) else ())
        return drafts

    def commit(self, sequence: SequenceView, num_accepted: int) -> None:
        """Nothing to do: the tokens are read when the next are proposed."""

    def truncate(self, sequence: SequenceView, num_tokens: int) -> None:
        if sequence in self._indices:
            self._indices[sequence].truncate(num_tokens)

    def release(self, sequence: SequenceView) -> None:
        self._indices.pop(sequence, None)


class _SuffixIndex:
    """For each length n and each position: where the n tokens that end there ended before.

    So the suffix's own earlier occurrence is looked up when its last token comes, and can be taken back when it goes.
    """

    def __init__(self, lengths: tuple[int, ...]) -> None:
        """``lengths``: descending."""
        self.ids: list[int] = []
        self._lengths = lengths
        self._latest: list[dict[tuple[int, ...], int]] = [{} for _ in lengths]  # n tokens -> where they last ended
        self._earlier = [array("q") for _ in lengths]  # by position; -1: nowhere

    def extend(self, ids: Sequence[int]) -> None:
        start = len(self.ids)
        self.ids += ids
        for n, latest, earlier in zip(self._lengths, self._latest, self._earlier, strict=True):
            first = max(start, n - 1)  # where the first n tokens end
            earlier.extend([-1] * (min(first, len(self.ids)) - start))
            if first >= len(self.ids):
                continue
            shifted = (self.ids[first - n + 1 + j : len(self.ids) - n + 1 + j] for j in range(n))
            for end, tokens in enumerate(zip(*shifted, strict=True), start=first):
                earlier.append(latest.get(tokens, -1))
                latest[tokens] = end

    def truncate(self, num_tokens: int) -> None:
        """Exact: afterwards it is as if the others had never come."""
        if num_tokens >= len(self.ids):
            return
        for n, latest, earlier in zip(self._lengths, self._latest, self._earlier, strict=True):
            for end in range(len(self.ids) - 1, num_tokens - 1, -1):
                before = earlier.pop()
                if end + 1 < n:
                    continue
                tokens = tuple(self.ids[end + 1 - n : end + 1])
                if before < 0:
                    del latest[tokens]
                else:
                    latest[tokens] = before
        del self.ids[num_tokens:]

    def continuation(self, most: int) -> tuple[int, ...]:
        """The ``most`` tokens after the suffix's earlier occurrence. Where they come to the end of what there is, they
        go on with themselves: text that repeats with a period is drafted at full length."""
        for earlier in self._earlier:
            if len(earlier) and earlier[-1] >= 0:
                found = self.ids[earlier[-1] + 1 : earlier[-1] + 1 + most]
                period = len(self.ids) - 1 - earlier[-1]
                while len(found) < most:
                    found.append(found[-period])
                return tuple(found)
        return ()
