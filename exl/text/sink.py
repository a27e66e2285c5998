"""The text of one generated sequence, token by token: whole characters, stop strings, strings that must not occur."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from exl.sampling_params import checked_stop, checked_texts
from exl.text.token_bytes import DecoderState
from exl.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Rewind:
    """A banned string is complete: its tokens are taken back, and another one is drawn for the first of them."""

    num_tokens: int  # the last ones, the token just pushed among them
    blocked: int  # the first of them: it must not be drawn again at its position


@dataclass(frozen=True)
class Verdict:
    text: str = ""  # what is final now
    stopped: str | None = None  # the stop string that ended the text
    rewind: Rewind | None = None


_NOTHING = Verdict()


@dataclass(frozen=True)
class _Pushed:
    token_id: int
    data: bytes  # what it added
    num_chars: int  # characters that were complete before it
    num_safe: int  # characters that no stop string could cut off before it
    state: DecoderState  # before it


def first_stop(text: str, stops: Sequence[str]) -> tuple[int, int, str | None]:
    """End, start and string of the first stop string in a text; the end is beyond the text if there is none."""
    found = [(start + len(stop), start, stop) for stop in stops if (start := text.find(stop)) >= 0]
    return min(found) if found else (len(text) + 1, 0, None)


def num_open(text: str, strings: Sequence[str]) -> int:
    """Length of the longest end of a text that is a beginning of one of the strings, and not all of it."""
    longest = max(map(len, strings), default=1) - 1
    for start in range(max(len(text) - longest, 0), len(text)):
        if any(string.startswith(text[start:]) for string in strings):
            return len(text) - start
    return 0


class TextSink:
    """Takes the tokens that continue a prompt; gives out their text as soon as nothing can change it any more.

    The pieces join to the decoded text of prompt + continuation, without the prompt's text, up to the first stop
    string. So a space between prompt and continuation is kept if the tokens have one, and without a prompt the text
    is decoded as the start of a text. A character that the prompt left incomplete belongs to the continuation.

    The first stop string is the one that is complete first; of several that end at the same place, the longest. So the
    result does not depend on how the text is cut into tokens. The stop string itself is not part of the text.

    A banned string that is complete before any stop string, or with it, takes tokens back: those from the one that
    holds its first byte on; of several that end at the same place, the shortest. The sink has then taken them back
    itself, and ``Verdict.rewind`` tells everyone else. Where another token, drawn in the place of one taken back, makes
    a banned string of text that is already given out, only the tokens behind that are taken back. So no banned string
    is ever given out. Both kinds of strings are compared as they are written, case and all, with the text of the
    continuation alone.

    The cost per token does not grow with the length of the text. Held back are at most three bytes of an incomplete
    character, the longest end of the text that may still become a stop string, and where a banned string may have
    begun, all from the token on that would be taken back, and the end of what is before that token which may still
    become a stop string.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int] = (),
        stop: str | Sequence[str] | None = (),
        banned: str | Sequence[str] | None = (),
        *,
        skip_special_tokens: bool = True,
    ) -> None:
        """``prompt_ids``: tokens before the continuation; empty if there is no prompt.

        Raises ``ConfigError`` for strings that ``SamplingParams`` also refuses.
        """
        self.stopped: str | None = None  # the stop string that ended the text
        self.num_tokens = 0  # that were pushed and not taken back
        self._stop = checked_stop(stop)
        self._banned = checked_texts("banned_strings", banned or ())
        self._cuts_nothing = not self._stop and not self._banned
        self._held = ""  # complete characters that are not given out
        self._num_given = 0  # characters
        self._last_given = ""  # the last of them, as many as a banned string may have there
        self._num_safe = 0  # characters that no stop string can cut off
        self._recent: list[_Pushed] = []  # the tokens from the first on whose text is not all given out
        self._finished = False
        self._decoder = tokenizer.text_decoder(skip_special_tokens=skip_special_tokens)
        self._decoder.skip(prompt_ids)
        self._num_final = 0  # tokens that no banned string takes back any more

    @property
    def num_final_tokens(self) -> int:
        """How many tokens no banned string can take back any more."""
        return self.num_tokens if self._ended or not self._banned else self._num_final

    def push(self, token_id: int) -> Verdict:
        """What this token makes of the text. Nothing comes after a stop string."""
        if self._ended:
            return _NOTHING
        state = self._decoder.state()
        data = self._decoder.bytes_of(token_id)
        text = self._decoder.text_of(data)
        self.num_tokens += 1
        if self._cuts_nothing and not self._recent and not self._decoder.pending:  # as with most requests
            self._num_given += len(text)
            return Verdict(text)
        self._recent.append(_Pushed(token_id, data, self._num_given + len(self._held), self._num_safe, state))
        self._held += text
        stop_end, stop_start, stopped = first_stop(self._held, self._stop)
        for ban_end, ban_start in self._first_ban():
            if ban_end <= stop_end:
                return Verdict(rewind=self._rewind(ban_start))
        return Verdict(self._give()) if stopped is None else self._stop_at(stop_start, stopped)

    def finish(self) -> str:
        """The rest: what was held back, with U+FFFD for the bytes of an incomplete character. Ends the text.

        A stop string may be complete only now. A banned one may not take anything back any more: of those that are not
        complete before, only one with U+FFFD can be.
        """
        if self._ended:
            return ""
        self._held += self._decoder.finish()
        self._finished = True
        _, start, stopped = first_stop(self._held, self._stop)
        if stopped is not None:
            return self._stop_at(start, stopped).text
        return self._given(len(self._held))

    def truncate(self, num_tokens: int) -> None:
        """Keeps the first ``num_tokens`` tokens; the others were never pushed.

        Raises ``ValueError`` if their text has been given out in part, and after the end.
        """
        kept = num_tokens - (self.num_tokens - len(self._recent))
        if kept == len(self._recent):
            return
        if self._ended or not 0 <= kept < len(self._recent) or self._recent[kept].num_chars < self._num_given:
            raise ValueError(f"truncate: found {num_tokens}, expected a number of tokens whose text is not given out")
        first = self._recent[kept]
        self._decoder.restore(first.state)
        self._held = self._held[: first.num_chars - self._num_given]
        del self._recent[kept:]
        self.num_tokens = num_tokens
        self._num_safe = first.num_safe
        self._num_final = min(self._num_final, num_tokens)

    @property
    def _ended(self) -> bool:
        return self._finished or self.stopped is not None

    def _first_ban(self) -> list[tuple[int, int]]:
        """End and start, in the text that is held, of the first banned string, if there is one."""
        text, offset = self._last_given + self._held, len(self._last_given)
        found = [(start + len(ban), -start) for ban in self._banned if (start := text.find(ban)) >= 0]
        return [(end - offset, -start - offset) for end, start in sorted(found)[:1]]

    def _rewind(self, start: int) -> Rewind:
        first = self._first_revocable(start)
        rewind = Rewind(len(self._recent) - first, self._recent[first].token_id)
        self.truncate(self.num_tokens - rewind.num_tokens)
        return rewind

    def _stop_at(self, start: int, stopped: str) -> Verdict:
        self.stopped = stopped
        return Verdict(self._given(start), stopped)

    def _give(self) -> str:
        """Gives out what no stop string can cut off and no banned one take back; forgets its tokens."""
        num = len(self._held) - num_open(self._held, self._stop)
        self._num_safe = self._num_given + num
        is_incomplete = bool(self._decoder.pending)
        open_ban = num_open(self._last_given + self._held, self._banned)
        first = len(self._recent)  # the first that may be taken back
        if open_ban or (is_incomplete and self._banned):
            first = self._first_revocable(len(self._held) - open_ban)
        self._num_final = self.num_tokens - len(self._recent) + first
        if first < len(self._recent):  # then the text may go on otherwise from what was before it
            num = min(num, self._recent[first].num_safe - self._num_given)
        forgotten = min(first, self._owner(num)) if num < len(self._held) or is_incomplete else first
        text = self._given(num)
        del self._recent[:forgotten]
        return text

    def _first_revocable(self, char: int) -> int:
        """The first of the recent tokens to take back if a banned string begins at this place of the held text."""
        num_final = self._num_final - (self.num_tokens - len(self._recent))
        return max(num_final, self._owner(char))

    def _given(self, num: int) -> str:
        text, self._held = self._held[:num], self._held[num:]
        self._num_given += num
        longest = max(map(len, self._banned), default=1) - 1
        self._last_given = (self._last_given + text)[-longest:] if longest else ""
        return text

    def _owner(self, char: int) -> int:
        """Which of the recent tokens holds the first byte of a character that is held, or of what is incomplete; 0 for
        characters before those of these tokens."""
        first = self._recent[0]
        starts = self._decoder.char_starts(first.state, b"".join(token.data for token in self._recent))
        byte = starts[max(self._num_given + char - first.num_chars, 0)]
        sizes = (len(token.data) for token in self._recent[:-1])
        return max(bisect_right(list(accumulate(sizes, initial=len(first.state.pending))), byte) - 1, 0)
