"""Continue a text token by token: greedily, or drawn from the likeliest tokens (top-p).

Plain and short, without a cache of keys and values: every token costs a pass over the whole text
before it. Legend of the suffixes: L = tokens so far, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from tokenizers.decoders import DecodeStream

from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.detect import host
from ezpz_moe.hosts.job_files import written_chat
from ezpz_moe.hosts.parts import Tokenizer
from ezpz_moe.tools.trained import Loaded, inference


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token.
        top_p: draw from the fewest tokens that have this probability together.
        seed: of the draws.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


def prompt_tokens(tokenizer: Tokenizer, prompt: str, *, chat: bool) -> list[int]:
    """Return the tokens that the model continues, with the mark of a beginning as in training.

    Args:
        chat: whether the prompt is a user's message, to be put into the tokenizer's chat template.

    Raises:
        EzpzError: the tokenizer has no chat template, or one that fails; or there are no tokens.
    """
    if chat:
        message = {"role": "user", "content": prompt}
        try:
            prompt = written_chat(tokenizer, [message], add_generation_prompt=True)
        except EzpzError as error:
            raise EzpzError(f"--chat: {error}") from error
    tokens = tokenizer.encode(prompt, add_bos=True, add_eos=False)
    # Some tokenizers end every text by themselves, and nothing follows an end.
    tokens = tokens[:-1] if tokens[-1:] == [tokenizer.eos_id] else tokens
    if not tokens:
        raise EzpzError("the tokenizer makes no token of the prompt; there is nothing to continue.")
    return tokens


class Continuation:
    """Tokens that continue a prompt, made one at a time as they are asked for.

    Attributes:
        tokens: those that have been made.
        has_ended: whether the last of them ends the text.

    Args:
        most: make this many tokens at most; the model was loaded for as many.
        end: the token that ends a text; None if there is none.
    """

    def __init__(
        self,
        loaded: Loaded,
        prompt: Sequence[int],
        sampling: Sampling,
        *,
        most: int,
        end: int | None,
    ) -> None:
        self._model, self._prompt = loaded.model, prompt
        self._choose = chooser(sampling)
        self._most, self._end = most, end
        self.tokens: list[int] = []

    @property
    def has_ended(self) -> bool:
        return self.tokens[-1:] == [self._end]

    def __iter__(self) -> Iterator[int]:
        """Yield the tokens; the last may be the text's end.

        Raises:
            EzpzError: the model's logits are not finite.
        """
        while len(self.tokens) < self._most and not self.has_ended:
            self.tokens.append(self._choose(self._logits()))
            yield self.tokens[-1]

    def pieces(self, tokenizer: Tokenizer) -> Iterator[str]:
        """Yield the text as soon as its characters are complete, without special tokens.

        A character may take several tokens; one that is incomplete at the end comes as U+FFFD.
        """
        # The prompt too: some tokenizers leave out the space before the first word of a text.
        stream = DecodeStream(ids=list(self._prompt), skip_special_tokens=True)
        waiting: list[int] = []
        for token in self:
            waiting.append(token)
            if (piece := stream.step(tokenizer.tokenizer, token)) is not None:
                waiting.clear()
                yield piece
        if rest := tokenizer.decode(waiting, skip_special_tokens=True):
            yield rest

    def _logits(self) -> torch.Tensor:
        """Return the next token's logits [V] on the CPU."""
        part, device = host().analysis(), next(self._model.parameters()).device
        tokens_L = torch.tensor([*self._prompt, *self.tokens], device=device)
        with inference():
            positions_L = torch.arange(len(tokens_L), device=device)
            logits_V = part.forward(self._model, tokens_L, positions_L)[-1].cpu()
        if not logits_V.isfinite().all():
            raise EzpzError(
                f"token {len(tokens_L) + 1}: the model's logits are not finite. Its run has "
                "diverged, as the loss in its log says: take an earlier checkpoint."
            )
        return logits_V


def chooser(sampling: Sampling) -> Callable[[torch.Tensor], int]:
    """Return a function that chooses a token by its logits [V], which are on the CPU."""
    if sampling.temperature == 0:
        return lambda logits_V: int(logits_V.argmax())
    # On the CPU and in float64: the same seed then draws the same on every device.
    draws = torch.Generator().manual_seed(sampling.seed)

    def drawn(logits_V: torch.Tensor) -> int:
        scaled_V = (logits_V - logits_V.max()).double() / sampling.temperature
        kept_V = likeliest(scaled_V.softmax(-1), sampling.top_p)
        return int(torch.multinomial(kept_V, 1, generator=draws))

    return drawn


def likeliest(probabilities_V: torch.Tensor, top_p: float) -> torch.Tensor:
    """Keep the fewest tokens that have the probability ``top_p`` together; the others become 0.

    At least one token is kept. Of equally likely ones, those with the smaller IDs come first.
    """
    sorted_V, ids_V = probabilities_V.sort(descending=True, stable=True)
    # Left out is what comes after enough. A zero in front: nothing comes before the first.
    before_V = torch.nn.functional.pad(sorted_V.cumsum(-1)[:-1], (1, 0))
    return probabilities_V.index_fill(-1, ids_V[before_V >= top_p], 0.0)
