"""Completion: a sequence's tokens on their way to becoming a caller's text. It does not know what runs next."""

from __future__ import annotations

from dataclasses import dataclass

from backend.errors import ServingError
from backend.generation.sequence import Sequence
from backend.generation.stream import Delta, Stream
from backend.generation.text import Text


@dataclass(eq=False)
class Completion:
    """One sequence, the stream that gets its text, and its place there."""

    seq: Sequence
    stream: Stream
    index: int
    text: Text
    logprob: float = 0.0

    def push(self, token: int) -> str:
        """The text that an accepted token adds; `text.stopped` once it completes a stop string."""
        if token < 0:
            raise ServingError("the model's logits are not finite")
        return self.text.push([token]) if token not in self.seq.params.stop_token_ids else ""

    def delta(self, token: int, text: str, logprob: float | None) -> Delta:
        """The news of one more token, the rest of the text with it if it was the last."""
        if self.seq.finish_reason:
            text += self.text.finish()
        logprobs = None
        if self.seq.params.logprobs and logprob is not None:
            self.logprob += logprob
            logprobs = [logprob]
        return Delta(self.index, text, [token], self.seq.finish_reason, self.logprob, logprobs)
