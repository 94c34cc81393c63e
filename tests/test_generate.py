"""``ezpz-moe generate``: the host's model continues a text as transformers does with its export."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from jinja2 import TemplateError

from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.detect import check_host, presumed_host
from ezpz_moe.hosts.titan.v0_3 import Titan03

if type(presumed_host()) is not Titan03:
    pytest.skip("builds models of torchtitan 0.3", allow_module_level=True)
check_host()  # before torchtitan is imported: it chooses the device

import hf_cases  # noqa: E402
from hf_cases import Case, random_weights, save  # noqa: E402
from hf_models import opened  # noqa: E402
from transformers import AutoTokenizer, PreTrainedTokenizerBase  # noqa: E402

from ezpz_moe import cli  # noqa: E402
from ezpz_moe.cli.generate import _shown  # noqa: E402
from ezpz_moe.config.assets import EMBEDDED_TOKENIZER  # noqa: E402
from ezpz_moe.tools.generation import (  # noqa: E402
    Continuation,
    Sampling,
    chooser,
    likeliest,
    prompt_tokens,
)
from ezpz_moe.tools.named_model import named_model  # noqa: E402
from ezpz_moe.tools.trained import Loaded  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is unavailable"),
    pytest.mark.filterwarnings("ignore:In CPU autocast"),
]

PROMPT = "The with statement is used to wrap a block"
NEW = 12
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}" + (
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


exports = pytest.fixture(scope="module")(hf_cases.tiny_exports)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(EMBEDDED_TOKENIZER)


def said(capsys, *arguments: object) -> str:
    """What the command writes to stdout."""
    capsys.readouterr()
    assert cli.main(["generate", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def refused(capsys, *arguments: object) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        cli.main(["generate", *map(str, arguments)])
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1, captured.err
    return captured.err


def prompt(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return [tokenizer.bos_token_id, *tokenizer(PROMPT).input_ids]


@pytest.mark.parametrize("kind", ["deepseek_v3", "qwen3_moe"])
def test_the_likeliest_text_is_that_of_transformers(exports, tokenizer, kind, capsys) -> None:
    """From the checkpoint and from the export, which says the tokenizer itself."""
    case, (_, checkpoint, exported) = exports.case(kind), exports.plain(kind)
    model = opened(exported)
    ids = torch.tensor([prompt(tokenizer)])
    with torch.inference_mode():
        theirs = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW
        )
    expected = tokenizer.decode(theirs[0, ids.shape[1] :], skip_special_tokens=True)
    assert len(expected) > NEW
    flags = ("--prompt", PROMPT, "--max-new-tokens", NEW)
    assert said(capsys, checkpoint, *flags, "--config", case.job) == f"{expected}\n"
    assert said(capsys, exported, *flags, "--config", case.job) == f"{expected}\n"


@pytest.mark.parametrize(
    ("kind", "extra"),
    [
        ("deepseek_v3", 'attention = "flex"'),  # compiled for each length, or no kernel on a CPU
        ("deepseek_v2", "[router]\nconstant_experts = 3\nnull_experts = 1"),
        ("deepseek_v2", "[router]\ntemperature = { start = 0.05, end = 5.0, steps = 3 }"),
        pytest.param("gpt_oss", 'compute_backend = "grouped_mm"', marks=pytest.mark.full),
    ],
)
def test_any_flavors_text_is_by_its_own_logits(
    exports, tokenizer, kind, extra, tmp_path, capsys
) -> None:
    """With selection biases, which are none of an export's, and at the checkpoint's step."""
    if "compute_backend" in extra or "attention" in extra:  # keys that the base has too
        case = exports.case(kind)
        other = hf_cases.make_case(kind, tmp_path / "other", extra)
    else:
        case = other = exports.case(kind, extra)
    weights = random_weights(case, bias=0.1)
    step = save(weights, tmp_path / "step-3")
    expected = greedy_at(case, weights, prompt(tokenizer), 3)
    flags = ("--prompt", PROMPT, "--max-new-tokens", 4, "--config", other.job)
    assert said(capsys, step, *flags) == f"{tokenizer.decode(expected)}\n"


def greedy_at(case: Case, weights: dict, tokens: list[int], step: int) -> list[int]:
    """Four tokens by the logits of the model at a training step."""
    start = len(tokens)
    for _ in range(4):
        logits_V = case.logits(weights, torch.tensor(tokens), step=step)[-1]
        tokens = [*tokens, int(logits_V.argmax())]
    return tokens[start:]


def test_the_newest_step_of_a_job_and_a_chat_by_its_tokenizer(
    exports, tokenizer, tmp_path, capsys, monkeypatch
) -> None:
    case, (_, checkpoint, _) = exports.case("qwen3_moe"), exports.plain("qwen3_moe")
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_TOKENIZER)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "chatty")
    (tmp_path / "run" / "checkpoint").mkdir(parents=True)
    for name in ("step-9", "step-10"):
        (tmp_path / "run" / "checkpoint" / name).symlink_to(checkpoint)
    job = case.folder / "chatty.toml"
    text = Path(case.job).read_text() + f'hf_assets_path = "{tmp_path}/chatty"\n'
    job.write_text(f'[job]\ndump_folder = "{tmp_path}/run"\n{text}')
    flags = ("--max-new-tokens", 3)
    plain = said(capsys, job, *flags, "--prompt", "user: Hi?\nassistant: ")
    assert said(capsys, job, *flags, "--prompt", "Hi?", "--chat") == plain
    (tmp_path / "prompt.txt").write_text("Hi?\n")
    in_file = said(capsys, job, *flags, "--prompt-file", tmp_path / "prompt.txt", "--chat")
    assert in_file == plain
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"Hi?\n")))
    assert said(capsys, job, *flags, "--prompt-file", "-", "--chat") == plain
    assert said(capsys, job, *flags, "--prompt", "Hi?") != plain


def test_the_tokenizer_is_the_jobs_or_lies_beside_the_weights(tmp_path) -> None:
    named = Path(tmp_path / "job.toml")
    named.write_text('[model]\nname = "ezpz_moe"\nflavor = "debugmodel"\n')
    weights = tmp_path / "hf"
    weights.mkdir()
    flavor, job = (named_model(str(weights), config) for config in ("debugmodel", str(named)))
    assert flavor.tokenizer(weights) == str(EMBEDDED_TOKENIZER)
    (weights / "tokenizer.json").write_text("{}")
    assert flavor.tokenizer(weights) == str(weights)
    assert job.tokenizer(weights) == str(EMBEDDED_TOKENIZER)
    (weights / "own.toml").write_text('inherits = "debugmodel"\n')
    run = f'[job]\ndump_folder = "{tmp_path}"\n[checkpoint]\nfolder = "hf"\n'
    (weights / "job.toml").write_text(f'{run}{named.read_text()}hf_assets_path = "{weights}"\n')
    for config in (None, "own"):  # another flavor of the same job, beside it
        found = named_model(str(weights / "job.toml"), config)
        assert (found.path, Path(found.tokenizer(weights))) == (weights, weights)
    assert found.flavor.name == "own"


def test_a_template_that_fails_is_one_line() -> None:
    class Failing:
        def apply_chat_template(self, messages: list, **_: bool) -> str:
            raise TemplateError("roles must alternate")

    with pytest.raises(EzpzError, match="--chat: the tokenizer's chat template fails: roles must"):
        prompt_tokens(Failing(), "x", chat=True)  # type: ignore[arg-type]


def test_a_seed_gives_the_same_text(exports, capsys) -> None:
    case, (_, checkpoint, _) = exports.case("qwen3_moe"), exports.plain("qwen3_moe")
    flags = (checkpoint, "--config", case.job, "--prompt", PROMPT, "--max-new-tokens", 8)
    drawn = [said(capsys, *flags, "--top-p", 0.9, "--seed", seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    # The likeliest token alone is left.
    assert said(capsys, *flags, "--top-p", 1e-9) == said(capsys, *flags)


@pytest.mark.parametrize(
    ("flags", "advice"),
    [((), "draw tokens with --temperature 0.8, or"), (("--temperature", 1), "Train the model for")],
)
def test_a_text_of_blanks_is_said(exports, capsys, monkeypatch, flags, advice) -> None:
    """As a model of few steps writes it: one sees nothing, and not why."""
    case, (_, checkpoint, _) = exports.case("qwen3_moe"), exports.plain("qwen3_moe")
    line = ["generate", str(checkpoint), "--config", str(case.job), "--prompt", "x"]
    line += ["--max-new-tokens", "2", *map(str, flags)]
    for pieces, is_said in (["\n", " "], True), (["\n", "a"], False):
        monkeypatch.setattr(Continuation, "pieces", lambda *_, pieces=pieces: iter(pieces))
        assert cli.main(line) == 0
        assert (advice in capsys.readouterr().err) is is_said


@given(
    st.lists(st.floats(-8, 8), min_size=1, max_size=40),
    st.floats(1e-6, 1.0, exclude_min=True),
)
@example([0.0, 0.0, 0.0, 0.0], 0.5)
@example([0.0, 0.0], 1.0)
@example([5.0, -5.0], 1e-6)
def test_top_p_keeps_the_fewest_tokens_that_are_enough(logits: list, top_p: float) -> None:
    probabilities_V = torch.tensor(logits, dtype=torch.float64).softmax(-1)
    kept = likeliest(probabilities_V, top_p).tolist()
    # Written out: one after the other, the likeliest first, until they are enough.
    expected, total = [0.0] * len(logits), 0.0
    for place in sorted(range(len(logits)), key=lambda v: -probabilities_V[v].item()):
        if total >= top_p:
            break
        expected[place] = probabilities_V[place].item()
        total += expected[place]
    assert kept == expected


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (2.0, 0.8)])
def test_draws_have_the_probabilities_that_are_asked_for(temperature: float, top_p: float) -> None:
    logits_V = torch.tensor([1.0, 0.0, -1.0, 0.5])
    expected_V = likeliest((logits_V.double() / temperature).softmax(-1), top_p)
    expected_V /= expected_V.sum()
    draw, count = chooser(Sampling(temperature, top_p, seed=3)), 4000
    drawn_V = torch.bincount(torch.tensor([draw(logits_V) for _ in range(count)]), minlength=4)
    error_V = (expected_V * (1 - expected_V) / count).sqrt()
    assert ((drawn_V / count - expected_V).abs() <= 4 * error_V).all()


class Told(Continuation):
    """Tokens that are told."""

    def __init__(self, tokens: list[int], *, most: int, end: int | None) -> None:
        model = torch.nn.Linear(1, 1)
        super().__init__(Loaded(model, ()), [0], Sampling(), most=most, end=end)
        self._told = iter(tokens)

    def _logits(self) -> torch.Tensor:
        return torch.nn.functional.one_hot(torch.tensor(next(self._told)), 2048).float()


def test_characters_of_several_tokens_come_whole(tokenizer) -> None:
    text = "naïve 日本語 🙂 end"
    tokens = [*tokenizer(text).input_ids, tokenizer.eos_token_id, 5]
    told = Told(tokens, most=99, end=tokenizer.eos_token_id)
    pieces = list(told.pieces(hosts_tokenizer()))
    assert "".join(pieces) == text
    assert len(pieces) > 5
    assert told.tokens == tokens[:-1]
    assert told.has_ended


def test_a_character_that_stays_incomplete_is_shown(tokenizer) -> None:
    tokens = tokenizer("日").input_ids
    assert len(tokens) > 1
    assert "".join(Told(tokens, most=1, end=None).pieces(hosts_tokenizer())) == "\ufffd"


def test_a_word_after_the_prompt_keeps_its_space() -> None:
    """In tokenizers that mark words, the first word of a text loses it."""
    from tokenizers import Tokenizer, decoders, models

    words = Tokenizer(models.WordLevel({"▁one": 0, "▁two": 1}, unk_token="▁one"))
    words.decoder = decoders.Metaspace()

    class Wrapped:
        tokenizer = words
        decode = staticmethod(words.decode)

    assert list(Told([1, 1], most=2, end=None).pieces(Wrapped())) == [" two", " two"]


def test_a_terminal_gets_no_commands_from_a_model(monkeypatch) -> None:
    text = "a\x1b[2J\tü\n🙂"
    assert _shown(text) == text
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert _shown(text) == "a\\x1b[2J\tü\n🙂"


def test_a_text_stops_after_as_many_tokens_as_asked_for(tokenizer) -> None:
    tokens = tokenizer("one two three four").input_ids
    told = Told(tokens, most=2, end=None)
    assert list(told) == tokens[:2]
    assert not told.has_ended


def hosts_tokenizer():
    from torchtitan.components.tokenizer import HuggingFaceTokenizer

    return HuggingFaceTokenizer(tokenizer_path=str(EMBEDDED_TOKENIZER))


def test_an_end_that_a_tokenizer_adds_is_no_part_of_the_prompt() -> None:
    class Ending:
        eos_id = 1

        def encode(self, text: str, **_: bool) -> list[int]:
            return [7, 8, 1]

    assert prompt_tokens(Ending(), "x", chat=False) == [7, 8]  # type: ignore[arg-type]


MISTAKES = [
    ([], "needs --prompt TEXT or --prompt-file FILE, or - for stdin"),
    (["--prompt", "a", "--prompt-file", "b"], "--prompt-file FILE, not both"),
    (["--prompt", ""], "--prompt: is empty"),
    (["--prompt", "\udcff"], "--prompt: is not UTF-8"),
    (["--prompt-file", "no.txt"], "no.txt: cannot be read: No such file"),
    (["--prompt-file", "/"], "/: cannot be read: Is a directory"),
    (["--prompt", "a", "--top-p", "0"], "--top-p 0.0: must be a number above 0"),
    (["--prompt", "a", "--top-p", "1.5"], "--top-p 1.5: must be"),
    (["--prompt", "a", "--top-p", "nan"], "--top-p nan: must be"),
    (["--prompt", "a", "--temperature", "-1"], "--temperature -1.0: must be"),
    (["--prompt", "a", "--temperature", "inf"], "--temperature inf: must be"),
    (["--prompt", "a", "--temperature", "0", "--top-p", "0.5"], "Remove one of the two"),
    (["--prompt", "a", "--seed", "-1"], "--seed -1: must be between 0 and 2^63 - 1"),
    (["--prompt", "a", "--max-new-tokens", "0"], "--max-new-tokens 0: must be at least 1"),
    (["--prompt", "a"], "Add --config FLAVOR|JOB.toml"),
    (["--prompt", "a", "--config", "no_such"], "unknown flavor 'no_such'"),
]


@pytest.mark.parametrize(("flags", "message"), MISTAKES)
def test_mistakes_are_one_line(capsys, tmp_path, flags: list[str], message: str) -> None:
    assert message in refused(capsys, tmp_path, *flags)


@pytest.mark.parametrize("more", [(), ("--config", "debugmodel")])
def test_a_path_that_does_not_exist_is_said_before_anything_else(capsys, more) -> None:
    assert "nowhere: there is no such folder" in refused(capsys, "nowhere", "--prompt", "a", *more)


def test_what_does_not_fit_the_model_is_one_line(exports, tmp_path, capsys) -> None:
    case, (_, checkpoint, _) = exports.case("qwen3_moe"), exports.plain("qwen3_moe")
    flags = (checkpoint, "--config", case.job)
    message = refused(capsys, *flags, "--prompt", "word " * 600)
    assert "but flavor qwen3_moe reads 512 at most" in message
    message = refused(capsys, *flags, "--prompt", "word", "--max-new-tokens", 512)
    assert "after a prompt of 3 tokens, flavor qwen3_moe can write 509 at most" in message
    assert "--chat: the tokenizer has no chat template" in refused(
        capsys, *flags, "--prompt", "Hi", "--chat"
    )
    assert "--device 'nowhere'" in refused(capsys, *flags, "--prompt", "a", "--device", "nowhere")
    job = tmp_path / "job.toml"
    named = f'[model]\nname = "ezpz_moe"\nflavor = "debugmodel"\nhf_assets_path = "{tmp_path}"\n'
    job.write_text(named)
    message = refused(capsys, checkpoint, "--config", job, "--prompt", "a")
    assert "has no tokenizer" in message
    other = refused(capsys, checkpoint, "--config", "debugmodel_sdpa", "--prompt", "a")
    assert "is not the flavor's model" in other


def test_weights_that_have_diverged_are_said(exports, tmp_path, capsys) -> None:
    case, (weights, _, _) = exports.case("qwen3_moe"), exports.plain("qwen3_moe")
    broken = weights | {"norm.weight": weights["norm.weight"] * float("nan")}
    step = save(broken, tmp_path / "step-1")
    message = refused(capsys, step, "--config", case.job, "--prompt", "a")
    assert "logits are not finite" in message
