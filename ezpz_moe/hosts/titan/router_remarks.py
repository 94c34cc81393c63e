"""Say what a run's routers do that nobody may have meant: not mistakes, but not silent either."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, partial
from typing import Any

from torchtitan.config import Configurable
from torchtitan.tools.logging import logger

from ezpz_moe.config.routing_schema import Router
from ezpz_moe.hosts.job_files import special_tokens
from ezpz_moe.routing.gate import why_untrained


def router_remarks(config: Any) -> list[str]:
    """Return the remarks on a trainer's config, each a sentence or two."""
    flavor = f"flavor {config.model_spec.flavor!r}" if config.model_spec else ""
    checks = (_untrained_gate, _kept_score, _two_that_balance, _padding_with_a_special_token)
    found = {
        each: None  # layers of one kind need one remark
        for moe in _kinds_of_moe(config)
        for check in checks
        for each in check(config, moe)
    }
    return [f"{flavor}: {each}" for each in found]


def log_once(config: Any) -> None:
    """Log the remarks, each once in a process."""
    for remark in router_remarks(config):
        _log(remark)


# A job's config may be constructed more than once per process.
@cache
def _log(remark: str) -> None:
    logger.warning(f"ezpz_moe: {remark}")


def _kinds_of_moe(config: Any) -> list[Any]:
    """Return configs of MoE layers, one of each size: apart from it, all have the same router."""
    if config.model_spec is None:
        return []
    # recurse, because every node is of this class: the search would otherwise end at the root.
    nodes = config.model_spec.model.traverse(Configurable.Config, recurse=True)
    moes = (node for _, node, _, _ in nodes if hasattr(getattr(node, "router", None), "score_func"))
    return list({(moe.router.num_experts, moe.router.top_k): moe for moe in moes}.values())


def _untrained_gate(config: Any, moe: Any) -> Iterator[str]:
    router = moe.router
    return why_untrained(
        # The host's own router has no table.
        getattr(router, "settings", Router()),
        score_func=router.score_func,
        experts=router.num_experts,
        top_k=router.top_k,
        norm=router.route_norm,
    )


def _kept_score(config: Any, moe: Any) -> Iterator[str]:
    settings, top_k = getattr(moe.router, "settings", Router()), moe.router.top_k
    if settings.keep_top1_score and top_k > 1:
        yield (
            f"[router] keep_top1_score = true has no effect, as a token has {top_k} experts. "
            "Remove it, or if it is inherited set it to false"
        )


def _two_that_balance(config: Any, moe: Any) -> Iterator[str]:
    balance = getattr(moe.router, "balance", None)
    if balance is None or balance.bias_update is not None or moe.load_balance_coeff is None:
        return
    if moe.router.settings.freeze:  # nor is the bias updated
        return
    losses = [
        f"{key} = {value:g}"
        for key, value in balance.losses_by_key.items()
        if not key.endswith("z_loss")  # it keeps logits small, and balances nothing
    ]
    if losses:
        yield (
            f"[balance] {_and(losses)} balance{'s' * (len(losses) == 1)} beside "
            f"torchtitan's own update of the selection bias, by {moe.load_balance_coeff:g} in "
            'every step, as [balance] does not mention it. Set bias_update = "sign" to keep both, '
            f'or "none" to have the loss{"es" * (len(losses) > 1)} alone'
        )


def _and(names: list[str]) -> str:
    return " and ".join(part for part in (", ".join(names[:-1]), names[-1]) if part)


def _padding_with_a_special_token(config: Any, moe: Any) -> Iterator[str]:
    settings = getattr(moe.router, "settings", Router())
    if settings.pad_token_id is None or settings.padding != "token":
        return
    build = partial(config.tokenizer.build, tokenizer_path=config.hf_assets_path)
    if name := special_tokens(build, config.hf_assets_path).get(settings.pad_token_id):
        yield (
            f"[router] pad_token_id = {settings.pad_token_id} is the tokenizer's {name} token, so "
            'real ones leave losses and dispatch too. Set padding = "trailing" to mask only the '
            "run that ends a sequence"
        )
