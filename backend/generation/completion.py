"""Completion: a sequence's tokens on their way to becoming a caller's text. It does not know what runs next."""

from __future__ import annotations

from dataclasses import dataclass

from backend.errors import ServingError
from backend.generation.sequence import Sequence
from backend.generation.stream import Delta, News, Stream
from backend.generation.text import Text


@dataclass(eq=False, slots=True)
class Completion:
    """One sequence, the stream that gets its text, and its place there.

    Its text belongs to the engine's thread where stop strings must be found at once, else to the reader's.
    """

    seq: Sequence
    stream: Stream
    index: int
    text: Text
    logprob: float = 0.0
    begun: float = 0.0
    """When it first had a step, time.monotonic(); 0: not yet."""
    first: float = 0.0
    """When its first token came."""

    def seen(self, token: int) -> str | None:
        """Engine's thread: the text that an accepted token adds, if stop strings must be looked for.

        `text.stopped` once it completes one.
        """
        if token < 0:
            raise ServingError("the model's logits are not finite")
        return self._text([token]) if self.seq.params.stop else None

    def news(self, token: int, text: str | None, logprob: float | None) -> News:
        """Engine's thread: what its reader will be told of the token."""
        return News(self, token, self.seq.finish_reason, logprob, text)

    def delta(self, news: list[News]) -> Delta:
        """Reader's thread: the gain of these tokens, the rest of the text with it if they were the last."""
        tokens, reason = [each.token_id for each in news], news[-1].finish_reason
        text = "".join([each.text for each in news if each.text]) if self.seq.params.stop else self._text(tokens)
        if reason:
            text += self.text.finish()
        logprobs = None
        if self.seq.params.logprobs:
            logprobs = [each.logprob for each in news if each.logprob is not None]
            self.logprob += sum(logprobs)
        return Delta(self.index, text, tokens, reason, self.logprob, logprobs)

    def _text(self, tokens: list[int]) -> str:
        """Tokens that end the sequence say nothing."""
        ends = self.seq.params.stop_token_ids
        return self.text.push([token for token in tokens if token not in ends])
