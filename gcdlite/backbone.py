"""What `sampling` and `packing` need to know about a Hugging Face model: how its attention takes masks, and how to run
small adapters without their overhead.

Both lay several sequences side by side, so they build their own masks and give each layer the one of its kind (full or
sliding-window). A model whose attention cannot be steered in this way is refused.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from peft.tuners import lora
from torch import Tensor, nn

from gcdlite.records import UserError


def plain(model: nn.Module) -> nn.Module:
    """The causal LM inside a peft wrapper: the adapters' layers are in place there, and a call costs less."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def windows(model: nn.Module) -> dict[str, int | None]:
    """Kinds of attention layers in the model -> how many positions back they see, itself included (None: all).

    Raises UserError for kinds or implementations of attention that do not follow a mask of ours.
    """
    config = model.config.get_text_config()
    if config._attn_implementation not in ("sdpa", "eager"):
        raise UserError(
            f"attention implementation {config._attn_implementation!r} takes no masks of ours: "
            "load the model with attn_implementation='sdpa'"
        )
    window = getattr(config, "sliding_window", None)
    layer_types = getattr(config, "layer_types", None)
    # Without a list of layer types, a model that names a window uses it in every layer.
    kinds = set(layer_types) if layer_types else {"sliding_attention" if window else "full_attention"}
    unknown = sorted(kinds - {"full_attention", "sliding_attention"})
    if unknown:
        raise UserError(f"layers of type {', '.join(unknown)} are not supported: only full and sliding-window attention")
    return {kind: window if kind == "sliding_attention" else None for kind in sorted(kinds)}


def additive(
    allowed: Tensor,
    query_positions: Tensor,
    key_positions: Tensor,
    kinds: dict[str, int | None],
    dtype: torch.dtype,
) -> Tensor | dict[str, Tensor]:
    """The mask to add to attention scores, 0 where a query may look and hugely negative elsewhere.

    allowed: bool (B, Q, K), what the layout permits; positions: (B, Q) and (B, K) in the token's own sequence, on
    which a sliding window is measured (not on where the token happens to lie). Returns (B, 1, Q, K), or such a mask
    for each kind of layer where the model mixes them. Not -inf: a row without any key (padding) must stay finite.
    """
    result = {}
    for kind, window in kinds.items():
        seen = allowed
        if window is not None:
            seen = allowed & (query_positions[:, :, None] - key_positions[:, None, :] < window)
        mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
        result[kind] = mask.masked_fill_(~seen, torch.finfo(dtype).min).unsqueeze(1)
    return result if len(result) > 1 else next(iter(result.values()))


@contextmanager
def folded(model: nn.Module) -> Iterator[None]:
    """Inside, narrow LoRA layers compute x(W + sBA)' in one product, with the same gradients for A and B.

    peft's xW' + s(xA')B' is five operations over all tokens, which costs a model of hidden size 128 a quarter of its
    training time. In a wide layer the gradient of W + sBA would cost more than it saves, and in 16 bits or less the sum
    would swallow the adapter: such layers stay as they are, and so does everything under activation checkpointing,
    which calls the layers again after this context has ended.
    """
    changed = []
    if not (model.training and model.is_activation_checkpointing):
        for layer in model.modules():
            if type(layer) is lora.Linear and _foldable(layer):
                weight = layer.base_layer.weight
                for name in layer.active_adapters:
                    if name in layer.lora_A:
                        a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
                        weight = torch.addmm(weight, b, a, alpha=layer.scaling[name])
                layer.forward = lambda x, weight=weight, bias=layer.base_layer.bias: F.linear(x, weight, bias)
                changed.append(layer)
    try:
        yield
    finally:
        for layer in changed:
            del layer.forward  # the class's own shows again


@contextmanager
def shared_heads(model: nn.Module) -> Iterator[None]:
    """Inside, attention on a CPU reads a key/value head where it is, for all query heads that use it.

    Elsewhere the library copies it for each of them, since CUDA's kernels cannot do both that and a mask. Like `folded`,
    without effect under activation checkpointing.
    """
    switch = "TRANSFORMERS_SDPA_FORCE_GQA"
    if switch in os.environ or model.device.type != "cpu" or (model.training and model.is_activation_checkpointing):
        yield
        return
    os.environ[switch] = "1"
    try:
        yield
    finally:
        del os.environ[switch]


def _foldable(layer: lora.Linear) -> bool:
    if layer.disable_adapters or layer.merged or layer.fan_in_fan_out or type(layer.base_layer) is not nn.Linear:
        return False
    if layer.base_layer.weight.dtype != torch.float32:
        return False
    for name in layer.active_adapters:
        if name not in layer.lora_A:
            continue
        dropout = layer.lora_dropout[name]
        if name in layer.lora_variant or layer.lora_bias[name] or (layer.training and not isinstance(dropout, nn.Identity)):
            return False
        # Products over the tokens: the full gradient of W takes in * out, the adapter's way about 4 * r * (in + out).
        if layer.in_features * layer.out_features > 4 * layer.r[name] * (layer.in_features + layer.out_features):
            return False
    return True
