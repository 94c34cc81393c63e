"""Say what a run's routers do that nobody may have meant: not mistakes, but not silent either."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache, partial
from typing import Any

from torchtitan.config import Configurable
from torchtitan.tools.logging import logger

from ezpz_moe.config.routing_schema import BALANCING, Router
from ezpz_moe.hosts.job_files import special_tokens
from ezpz_moe.hosts.titan.expert_remarks import doubled_gradients
from ezpz_moe.routing.gate import why_untrained


def router_remarks(config: Any) -> list[str]:
    """Return the remarks on a trainer's config, each a sentence or two."""
    moes = _moes(config)
    if not moes:
        return []
    flavor = f"flavor {config.model_spec.flavor!r}"
    # Apart from their sizes, all layers have the same router.
    first, fewest = next(iter(moes.values())), min(moes.values(), key=lambda moe: moe.router.top_k)
    found = (
        *_untrained_gates(moes),
        *_kept_score(fewest),
        *_two_that_balance(first),
        *_padding_with_a_special_token(config, first),
        *doubled_gradients(config, moes.values()),
    )
    return [f"{flavor}: {each}" for each in found]


def log_once(config: Any) -> None:
    """Log the remarks, each once in a process."""
    for remark in router_remarks(config):
        _log(remark)


# A job's config may be constructed more than once per process.
@cache
def _log(remark: str) -> None:
    logger.warning(f"ezpz_moe: {remark}")


def _moes(config: Any) -> dict[str, Any]:
    """Return the configs of the MoE layers by the layer's path, such as "layers.3.moe"."""
    if config.model_spec is None:
        return {}
    # recurse, because every node is of this class: the search would otherwise end at the root.
    nodes = config.model_spec.model.traverse(Configurable.Config, recurse=True)
    return {
        path: node
        for path, node, _, _ in nodes
        if hasattr(getattr(node, "router", None), "score_func")
    }


def _untrained_gates(moes: Mapping[str, Any]) -> Iterator[str]:
    layers_of: dict[str, list[str]] = {}
    for path, moe in moes.items():
        for reason in _untrained_gate(moe.router):
            layers_of.setdefault(reason, []).append(path.removesuffix(".moe"))
    for reason, layers in layers_of.items():
        yield reason if len(layers) == len(moes) else f"in {', '.join(layers)} {reason}"


def _untrained_gate(router: Any) -> Iterator[str]:
    return why_untrained(
        # The host's own router has no table.
        getattr(router, "settings", Router()),
        score_func=router.score_func,
        experts=router.num_experts,
        top_k=router.top_k,
        norm=router.route_norm,
    )


def _kept_score(moe: Any) -> Iterator[str]:
    settings, top_k = getattr(moe.router, "settings", Router()), moe.router.top_k
    if settings.keep_top1_score and top_k > 1:
        yield (
            f"[router] keep_top1_score = true has no effect, as a token has {top_k} experts. "
            "Remove it, or if it is inherited set it to false"
        )


def _two_that_balance(moe: Any) -> Iterator[str]:
    balance = getattr(moe.router, "balance", None)
    if balance is None or balance.bias_update is not None or moe.load_balance_coeff is None:
        return
    if moe.router.settings.freeze:  # nor is the bias updated
        return
    losses = [
        f"{key} = {value:g}"
        for key, value in balance.losses_by_key.items()
        if key.endswith(BALANCING)
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
