"""``ezpz-moe generate``."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, arg

from ezpz_moe.cli import display
from ezpz_moe.cli.arguments import Device, import_host
from ezpz_moe.cli.command import Command
from ezpz_moe.errors import EzpzError, printable

if TYPE_CHECKING:
    from ezpz_moe.config.flavors import Flavor
    from ezpz_moe.tools.generation import Sampling
    from ezpz_moe.tools.trained import Loaded

_STDIN = "-"


@dataclass(frozen=True)
class Generate(Command):
    """Continue a text with a trained model, to see what it has learnt.

    Takes the likeliest token, or draws one with --temperature or --top-p. The text appears on
    stdout as it comes. This is the host's own model without a cache of keys and values: every token
    costs a pass over the whole text before it. To serve a model, export it (ckpt remap --to hf).
    """

    group = "after a run"

    # The underscore: `run` is the method.
    run_: Annotated[Positional[str], arg(name="run", metavar="CHECKPOINT|RUN|JOB.toml")]
    """A checkpoint's folder, a run's folder (its newest checkpoint), a folder with safetensors, or
    the job of the run."""
    prompt: Annotated[str | None, arg(metavar="TEXT")] = None
    """Continue this text."""
    prompt_file: Annotated[str | None, arg(metavar="FILE")] = None
    """Continue the text in this file, without its last line break; - reads stdin."""
    config: Annotated[str | None, arg(metavar="FLAVOR|JOB.toml")] = None
    """Name the model, which a checkpoint does not. Not needed with JOB.toml."""
    chat: bool = False
    """Take the text for a user's message, and write it as the tokenizer's chat template does."""
    max_new_tokens: int = 64
    """Stop after this many tokens, if the text has not ended before."""
    temperature: Annotated[float | None, arg(metavar="FLOAT")] = None
    """Draw tokens, with logits divided by this. Default: 0, the likeliest token; 1 with --top-p."""
    top_p: Annotated[float | None, arg(metavar="FLOAT")] = None
    """Draw from the fewest tokens that have this probability together."""
    seed: int = 0
    """Seed the draws."""
    device: Device = None
    """Run the model on this device. Default: the accelerator if there is one."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute in this dtype; experts compute in bfloat16, as in the host."""

    def run(self) -> int:
        # Before torch is imported: a wrong number is reported at once.
        self._check()
        prompt = self._prompt()
        from ezpz_moe.tools.named_model import named_model

        named = named_model(self.run_, self.config)
        from ezpz_moe.hosts.dcp.paths import find_weights

        flavor, weights = named.flavor, find_weights(named.path)
        part = import_host().analysis()
        from ezpz_moe.tools.generation import Continuation, prompt_tokens

        tokenizer = part.tokenizer(named.tokenizer(weights), flavor)
        tokens = prompt_tokens(tokenizer, prompt, chat=self.chat)
        self._check_length(len(tokens), flavor, part.longest(flavor))
        loaded = self._load(weights, flavor, len(tokens) + self.max_new_tokens)
        for note in loaded.notes:
            display.print_to_stderr(note)
        most, end = self.max_new_tokens, tokenizer.eos_id
        text = Continuation(loaded, tokens, self._sampling(), most=most, end=end)
        is_blank = True
        for piece in text.pieces(tokenizer):
            is_blank = is_blank and not piece.strip()
            print(_shown(piece), end="", flush=True)
        print(flush=True)
        why = "the text ended" if text.has_ended else f"--max-new-tokens {most}"
        # Not to stdout, where the text is alone.
        display.print_to_stderr(f"{len(tokens)} tokens read, {len(text.tokens)} written: {why}")
        if is_blank:
            display.print_to_stderr(f"The text is blank. {self._more_than_blanks()}.")
        return 0

    def _check(self) -> None:
        if self.max_new_tokens < 1:
            raise EzpzError(f"--max-new-tokens {self.max_new_tokens}: must be at least 1.")
        # Refuses NaN as well: every comparison with it is false.
        if self.temperature is not None and not 0 <= self.temperature < float("inf"):
            raise EzpzError(f"--temperature {self.temperature}: must be a number >= 0.")
        if not 0 <= self.seed < 2**63:
            raise EzpzError(f"--seed {self.seed}: must be between 0 and 2^63 - 1.")
        if self.top_p is None:
            return
        if not 0 < self.top_p <= 1:
            raise EzpzError(f"--top-p {self.top_p}: must be a number above 0, and 1 at most.")
        if self.temperature == 0:
            raise EzpzError(
                f"--top-p {self.top_p}: draws tokens, but --temperature 0 takes the likeliest. "
                "Remove one of the two."
            )

    def _prompt(self) -> str:
        """Return the text to continue."""
        if (self.prompt is None) == (self.prompt_file is None):
            given = "not both" if self.prompt is not None else "or - for stdin"
            raise EzpzError(f"generate: needs --prompt TEXT or --prompt-file FILE, {given}.")
        if self.prompt_file is not None:
            where, text = f"--prompt-file {self.prompt_file}", _read(self.prompt_file)
        else:
            where, text = "--prompt", self.prompt or ""
        if not text:
            raise EzpzError(f"{where}: is empty; there is nothing to continue.")
        try:
            text.encode()
        except UnicodeEncodeError as error:  # bytes on a command line that are no text
            raise EzpzError(f"{where}: is not UTF-8 text: {error.reason}.") from error
        return text

    def _check_length(self, prompt: int, flavor: Flavor, longest: int) -> None:
        """Refuse a text that would be longer than the model's rotary positions."""
        if prompt >= longest:
            raise EzpzError(
                f"the prompt has {prompt} tokens, but flavor {flavor.name} reads {longest} at most "
                "and has to write one. Shorten the prompt."
            )
        if prompt + self.max_new_tokens > longest:
            raise EzpzError(
                f"--max-new-tokens {self.max_new_tokens}: after a prompt of {prompt} tokens, "
                f"flavor {flavor.name} can write {longest - prompt} at most."
            )

    def _more_than_blanks(self) -> str:
        """Say how to see more of what a model has learnt than blanks and line breaks."""
        if self.temperature or self.top_p is not None:
            return "Train the model for more steps"
        return (
            "A model of few steps finds those the likeliest: draw tokens with --temperature 0.8, "
            "or train it for more steps"
        )

    def _sampling(self) -> Sampling:
        from ezpz_moe.tools.generation import Sampling

        unless_said = 0.0 if self.top_p is None else 1.0
        temperature = unless_said if self.temperature is None else self.temperature
        return Sampling(temperature, 1.0 if self.top_p is None else self.top_p, self.seed)

    def _load(self, folder: Path, flavor: Flavor, length: int) -> Loaded:
        import torch

        from ezpz_moe.tools.trained import load
        from ezpz_moe.tools.verify import default_device

        with display.status("Loading"):
            return load(
                folder,
                flavor,
                length,
                device=self.device or default_device(),
                dtype=getattr(torch, self.dtype),
                one_document=True,
            )


COMMAND = Generate


def _shown(piece: str) -> str:
    """Return a piece of text without what a terminal would act on, if one shows it."""
    if not sys.stdout.isatty():
        return piece
    return "".join(each if each in "\n\t" else printable(each) for each in piece)


def _read(name: str) -> str:
    """Read a prompt's file."""
    try:
        data = sys.stdin.buffer.read() if name == _STDIN else Path(name).read_bytes()
        text = data.decode()
    except OSError as error:
        raise EzpzError(f"--prompt-file {name}: cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise EzpzError(
            f"--prompt-file {name}: is not UTF-8 text: byte {error.start} ({error.reason})."
        ) from error
    # Editors and `echo` end the last line; the model would see the line break as part of the text.
    return text.removesuffix("\n").removesuffix("\r")
