"""A checkpoint's weights as parameters, under the runtime's own encoder and decoder.

Every layer is a module of its own, so that FSDP2 (torch `fully_shard`) can gather the weights of one layer
at a time; what the layer computes stays in encoder.py and decoder.py, and is not written a second time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..config import ModelConfig
from ..decoder import Decoder, decoder_shapes
from ..encoder import Encoder, encoder_shapes

Weights = dict[str, Tensor]


QUERY_BLOCK = 128
SELDOM = -4.0  # log odds that a class is heard
STEM_GAINS = {"encoder.conv1.weight": 6.0, "encoder.conv2.weight": 2.0}


def initial_weights(config: ModelConfig, seed: int) -> Weights:
    """Unit-gain linear layers, residual branches scaled down by depth, zero biases; float32.

    Log-mel frames are one large offset, the loudness, and small differences, the sound. The first filters
    have a zero mean over the bins, so that they see the differences alone, and a gain that brings these to
    the size of the positions that are added behind the stem (both measured on streams: 0.16 of the positions'
    0.7 without it, 1.1 with it). Else a young encoder sees little but where in the chunk it is.
    """
    generator = torch.Generator().manual_seed(seed)
    weights: Weights = {}
    for name, shape in (encoder_shapes(config) | decoder_shapes(config)).items():
        if name.endswith("bias"):
            value = torch.zeros(shape)
        elif len(shape) == 1:
            value = torch.ones(shape)
        else:
            value = torch.randn(shape, generator=generator)
            value *= 0.5 if name == "decoder.embed.weight" else math.prod(shape[1:]) ** -0.5
            if name == "encoder.conv1.weight":
                value -= value.mean(dim=1, keepdim=True)
            value *= STEM_GAINS.get(name, 1.0)
            if name.endswith(("out.weight", "down.weight", "fc2.weight")):
                layers = config.encoder.layers if name.startswith("encoder.") else config.decoder.layers
                value *= (2 * layers) ** -0.5
        weights[name] = value
    return weights


class Node(nn.Module):
    """A branch of the tree of weights. `forward` runs a function while this branch's weights are whole:
    FSDP2 gathers them before a module's forward and frees them after it.
    """

    def forward(self, run: Callable[..., Tensor], *arguments: Any) -> Tensor:
        return run(*arguments)

    def branch(self, name: str) -> Node:
        """The child of that name, made where it is missing."""
        if name not in self._modules:
            self.add_module(name, Node())
        found = self._modules[name]
        assert isinstance(found, Node)
        return found


def tree(weights: Mapping[str, Tensor]) -> Node:
    """Weights by dotted name -> modules whose `named_parameters` have the same names."""
    root = Node()
    for name, value in weights.items():
        node, (*path, leaf) = root, name.split(".")
        for part in path:
            node = node.branch(part)
        node.register_parameter(leaf, nn.Parameter(value.detach().clone()))
    return root


class Live(Mapping[str, Tensor]):
    """The tree's weights by dotted name, as they are at the moment of asking (FSDP2 swaps them), in the
    dtype that is computed in.
    """

    def __init__(self, root: Node, config: ModelConfig, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._places = {}
        for name, _ in root.named_parameters():
            path, _, leaf = name.rpartition(".")
            self._places[name] = (root.get_submodule(path), leaf)
        key = torch.ones(3, config.encoder.width)
        key[1] = 0  # the architecture has no key bias
        self._has_bias = key.flatten()

    def __getitem__(self, name: str) -> Tensor:
        module, leaf = self._places[name]
        value: Tensor = getattr(module, leaf).to(self.dtype)
        if name.startswith("encoder.layers.") and name.endswith("qkv.bias"):
            return value * self._has_bias.to(value)
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


class TrainableEncoder(Encoder):
    """The encoder, each layer run by its node."""

    def __init__(self, config: ModelConfig, weights: Live, root: Node) -> None:
        super().__init__(config, weights)
        self.root = root

    def _layer(self, x: Tensor, name: str, batch: int) -> Tensor:
        return self.root.get_submodule(name.rstrip("."))(super()._layer, x, name, batch)

    def _attention(self, qkv: Tensor) -> Tensor:
        if qkv.device.type == "cpu":
            return block_products(qkv, self.config.encoder.heads)
        return super()._attention(qkv)


class TrainableDecoder(Decoder):
    """The decoder over whole sequences, each layer run by its node; `halfway` [B, T, D] is what half of the
    layers have made of the last sequences.
    """

    def __init__(self, config: ModelConfig, weights: Live, root: Node) -> None:
        super().__init__(config, weights)
        self.root = root
        self.halfway = torch.empty(0)

    def _sequence_layer(self, x: Tensor, name: str, positions: Tensor) -> Tensor:
        x = self.root.get_submodule(name.rstrip("."))(super()._sequence_layer, x, name, positions)
        if name == f"decoder.layers.{(self.config.decoder.layers - 1) // 2}.":
            self.halfway = x
        return x

    def _sequence_attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.device.type == "cpu":
            return causal_products(q, k, v)
        return super()._sequence_attention(q, k, v)


def block_products(qkv: Tensor, heads: int) -> Tensor:
    """Attention inside each block as plain matrix products: qkv [B, T, 3 E] as [q | k | v] -> [B, T, E].

    On a CPU in bfloat16, forward and backward, over 20 positions this is three times as fast as the fused
    kernel, which is made for long sequences.
    """
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)  # each [B, H, T, K]
    scores = (q * q.shape[-1] ** -0.5) @ k.mT
    return (scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2)


def causal_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention as plain matrix products: q [B, H, T, K], k, v [B, G, T, K] -> [B, H, T, K].

    On a CPU in bfloat16, forward and backward, this takes two fifths of the fused kernel's time at 500
    positions, half at 1,000 and three quarters at 2,000 (bench/bench_training.py). Queries go in blocks, so
    that the half of the scores that is masked is mostly not computed, and of the rest only the square on the
    diagonal is masked; the heads of a group are rows of one product.
    """
    length, width = q.shape[2:]
    groups = k.shape[1]
    q = (q * width**-0.5).unflatten(1, (groups, -1))
    future = torch.ones((min(QUERY_BLOCK, length),) * 2, dtype=torch.bool, device=q.device).triu(1)
    parts = []
    for first in range(0, length, QUERY_BLOCK):
        end = min(first + QUERY_BLOCK, length)
        rows = q[..., first:end, :].flatten(2, 3)  # [B, G, H/G Tq, K]
        scores = (rows @ k[:, :, :end].mT).unflatten(2, (-1, end - first))
        square = scores.detach()[..., first:]  # unseen by autograd: a weight of 0 passes no gradient anyway
        square.masked_fill_(future[: end - first, : end - first], -torch.inf)
        out = scores.softmax(dim=-1).flatten(2, 3) @ v[:, :, :end]
        parts.append(out.unflatten(2, (-1, end - first)))
    return torch.cat(parts, dim=3).flatten(1, 2)


def _probe(width: int, classes: int) -> nn.Linear:
    """Knows nothing yet, but that most classes are not heard."""
    probe = nn.Linear(width, classes)
    nn.init.zeros_(probe.weight)
    nn.init.constant_(probe.bias, SELDOM)
    return probe


class Trainable(nn.Module):
    """The weights of a model in training, kept in float32 and computed with in `dtype`; and three probes that
    are not part of it: linear layers that tell which of `classes` are heard under every audio token, from
    the encoder's output and from the decoder's; and, halfway through the decoder, which were heard so far
    in the row, at all, first and last.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, Tensor],
        classes: int,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.config, self.dtype = config, dtype
        self.root = tree(weights)
        self.heard, self.recognised = (_probe(config.decoder.width, classes) for _ in range(2))
        self.recalled = _probe(config.decoder.width, 3 * classes)

    def layers(self) -> list[Node]:
        """Every encoder and decoder layer, in order: what FSDP2 shards one by one."""
        counts = {"encoder": self.config.encoder.layers, "decoder": self.config.decoder.layers}
        names = [f"{part}.layers.{i}" for part, count in counts.items() for i in range(count)]
        return [node for name in names if isinstance(node := self.root.get_submodule(name), Node)]

    def stages(self) -> tuple[TrainableEncoder, TrainableDecoder]:
        """Encoder and decoder over the weights as they are now; call it anew in every forward."""
        live = Live(self.root, self.config, self.dtype)
        return TrainableEncoder(self.config, live, self.root), TrainableDecoder(self.config, live, self.root)

    def checkpoint(self) -> Weights:
        """The model's own weights by name, without the probes, detached."""
        return {name: value.detach() for name, value in self.root.named_parameters()}
