"""The attention of a U-Net without what its library asks and draws up anew at every call.

diffusers reads its processor's signature at each attention of each step, which on small batches takes longer than the
host has; see `lean_attention`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor, nn
from torch.nn import functional

Projections = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""[B, n, width] of the queries' side, [B, m, width] of the other -> queries, keys, values, [B, n or m, inner]."""


_UNUSUAL = ("spatial_norm", "group_norm", "norm_q", "norm_k", "norm_cross", "residual_connection", "added_kv_proj_dim")
"""What some attentions of the library have beside their projections."""


class LeanAttention(Attention):
    """diffusers' `Attention` with its usual processor, computed directly; with another processor as it was."""

    project: Projections | None = None
    """An adapter that has a quicker way to queries, keys and values than one after another puts itself here."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **cross_attention_kwargs: Any,
    ) -> Tensor:
        """[B, n, width], and what is attended to, [B, m, width], if it is something else -> [B, n, width]."""
        plain = attention_mask is None and not cross_attention_kwargs and type(self.processor) is AttnProcessor2_0
        if not plain or hidden_states.ndim != 3:
            result: Tensor = super().forward(
                hidden_states, encoder_hidden_states, attention_mask, **cross_attention_kwargs
            )
            return result
        attended = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        project = self.project or self._project
        query, key, value = (
            each.unflatten(-1, (self.heads, -1)).transpose(1, 2) for each in project(hidden_states, attended)
        )
        mixed = functional.scaled_dot_product_attention(query, key, value)
        # The second part of `to_out` is a dropout, which nothing uses here.
        out: Tensor = self.to_out[0](mixed.transpose(1, 2).flatten(2))
        return out

    def _project(self, hidden: Tensor, attended: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.to_q(hidden), self.to_k(attended), self.to_v(attended)


def lean_attention(network: nn.Module) -> None:
    """Let the attentions of `network` that have nothing unusual compute directly."""
    for module in network.modules():
        if type(module) is Attention and _is_usual(module):
            module.__class__ = LeanAttention


def _is_usual(attention: Any) -> bool:
    """Whether it is queries, keys, values, their attention and one projection, and nothing else."""
    return (
        not any(getattr(attention, name, None) for name in _UNUSUAL)
        and attention.rescale_output_factor == 1
        and type(attention.processor) is AttnProcessor2_0
        and attention.to_k is not None and attention.to_v is not None
    )  # fmt: skip
