"""The arithmetic of a model from its Hugging Face config: parameters per part, cache bytes and operations per token.

Takes config.json's content, loads no weights and no torch. Families: Llama, Mistral, Qwen2, Qwen3, DeepseekV3 (and so R1 and its
distills). Knows no hardware and no prices.

Letters: D hidden, H query heads, K key-value heads, V vocabulary, T tokens of context.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from r1ray.errors import UnsupportedModel
from r1ray.model.family import context_length, quantisation

__all__ = ["Latent", "ModelShape", "Parameters", "shape_of"]

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "deepseek_v3")


@dataclass(frozen=True, slots=True, kw_only=True)
class Latent:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): one compressed vector per token is the whole cache."""

    query_rank: int | None
    kv_rank: int
    rope_dim: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """Numbers of weights by part. `total` is what transformers builds; the prediction head of DeepSeek-V3 stands beside it."""

    embedding: int
    head: int
    attention: int
    dense_mlp: int
    experts: int
    shared_experts: int
    router: int
    norms: int
    prediction_head: int

    @property
    def total(self) -> int:
        return sum(asdict(self).values()) - self.prediction_head


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """The sizes that memory and time follow from. `key_dim` and `value_dim` are per head, as the attention products see them."""

    family: str
    num_layers: int
    hidden: int
    vocab: int
    num_heads: int
    num_kv_heads: int
    key_dim: int
    value_dim: int
    intermediate: int
    max_context: int
    latent: Latent | None = None
    num_experts: int = 0
    experts_per_token: int = 0
    num_shared_experts: int = 0
    expert_intermediate: int = 0
    num_dense_layers: int = 0
    num_prediction_layers: int = 0
    query_key_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    query_key_norm: bool = False
    tied: bool = False
    stored_bytes: float = 2.0
    """Bytes of a stored weight: 2 for bfloat16, about 1 for DeepSeek's block-wise FP8."""
    quantisation: str | None = None
    """How its weights are stored, fp8 or another method; None: as plain numbers."""

    @property
    def num_moe_layers(self) -> int:
        return self.num_layers - self.num_dense_layers if self.num_experts else 0

    @property
    def attention_parameters(self) -> int:
        """Of one layer, its inner norms included."""
        return self._attention_weights + self._attention_norms

    @property
    def _attention_weights(self) -> int:
        wide = self.num_heads * self.value_dim
        output = wide * self.hidden + (self.hidden if self.output_bias else 0)
        if self.latent is None:
            query, pair = self.num_heads * self.key_dim, self.num_kv_heads * (self.key_dim + self.value_dim)
            return self.hidden * (query + pair) + ((query + pair) if self.query_key_bias else 0) + output
        latent, compressed = self.latent, self.latent.kv_rank + self.latent.rope_dim
        bias = compressed + (latent.query_rank or 0) if self.query_key_bias else 0
        query = self.num_heads * self.key_dim
        queries = self.hidden * query if latent.query_rank is None else latent.query_rank * (self.hidden + query)
        expand = latent.kv_rank * self.num_heads * (self.key_dim - latent.rope_dim + self.value_dim)
        return queries + self.hidden * compressed + expand + bias + output

    @property
    def _attention_norms(self) -> int:
        if self.latent is not None:
            return self.latent.kv_rank + (self.latent.query_rank or 0)
        return 2 * self.key_dim if self.query_key_norm else 0

    @property
    def expert_parameters(self) -> int:
        """Of one routed or shared expert."""
        return 3 * self.hidden * self.expert_intermediate

    @property
    def dense_parameters(self) -> int:
        """Of one dense feed-forward block."""
        return 3 * self.hidden * self.intermediate + (2 * self.intermediate + self.hidden if self.mlp_bias else 0)

    def layer_parameters(self, layer: int) -> int:
        """Of layer number `layer`, counted from 0."""
        common = self.attention_parameters + 2 * self.hidden
        if not self.num_experts or layer < self.num_dense_layers:
            return common + self.dense_parameters
        return common + (self.num_experts + self.num_shared_experts) * self.expert_parameters + self.num_experts * self.hidden

    def active_layer_parameters(self, layer: int) -> int:
        """What one token is multiplied with in a layer."""
        idle = self.num_experts - self.experts_per_token
        is_moe = self.num_experts > 0 and layer >= self.num_dense_layers
        return self.layer_parameters(layer) - (idle * self.expert_parameters if is_moe else 0)

    @property
    def parameters(self) -> Parameters:
        """Counted by part; exact, tested against transformers' own models."""
        moe = self.num_moe_layers
        return Parameters(
            embedding=self.vocab * self.hidden,
            head=0 if self.tied else self.vocab * self.hidden,
            attention=self.num_layers * self._attention_weights,
            dense_mlp=(self.num_layers - moe) * self.dense_parameters,
            experts=moe * self.num_experts * self.expert_parameters,
            shared_experts=moe * self.num_shared_experts * self.expert_parameters,
            router=moe * self.num_experts * self.hidden,
            norms=self.num_layers * (2 * self.hidden + self._attention_norms) + self.hidden,
            prediction_head=self.num_prediction_layers * self._prediction_layer,
        )

    @property
    def _prediction_layer(self) -> int:
        """As published: a decoder layer, the projection of two states into one, three norms, copies of embedding and head."""
        return self.layer_parameters(self.num_layers) + 2 * self.hidden**2 + 3 * self.hidden + 2 * self.vocab * self.hidden

    @property
    def active_parameters(self) -> int:
        """What one token touches, embedding and head included; equals the total in a dense model."""
        idle = self.num_experts - self.experts_per_token
        return self.parameters.total - self.num_moe_layers * idle * self.expert_parameters

    @property
    def multiplied_parameters(self) -> int:
        """The active ones without the embedding, which is looked up: two operations each per token."""
        return self.active_parameters - (0 if self.tied else self.parameters.embedding)

    @property
    def cached_values(self) -> int:
        """Numbers in the KV cache per token and layer: keys and values of each KV head, or the latent with its rotary part."""
        if self.latent is not None:
            return self.latent.kv_rank + self.latent.rope_dim
        return self.num_kv_heads * (self.key_dim + self.value_dim)

    def kv_bytes_per_token(self, bytes_per_value: float = 2) -> float:
        """Over all layers."""
        return self.num_layers * self.cached_values * bytes_per_value

    def attention_operations(self, context: float, *, absorbed: bool = False) -> float:
        """Of one new token against `context` earlier ones, all layers. `absorbed`: MLA computed on the latent, as decoding does."""
        per_head = self.key_dim + self.value_dim
        if absorbed and self.latent is not None:
            per_head = 2 * self.latent.kv_rank + self.latent.rope_dim
        return 2.0 * self.num_layers * self.num_heads * per_head * context

    def forward_operations(self, context: float, *, absorbed: bool = False) -> float:
        """FLOPs of one token's forward pass."""
        return 2.0 * self.multiplied_parameters + self.attention_operations(context, absorbed=absorbed)


def shape_of(config: Mapping[str, Any]) -> ModelShape:
    """The shape that a config.json describes.

    Raises:
        UnsupportedModel: a family whose arithmetic is not known here, or a config without one of its sizes.
    """
    family = str(config.get("model_type"))
    if family not in FAMILIES:
        raise UnsupportedModel(f"No arithmetic for model_type {family!r}; known: {', '.join(FAMILIES)}. Plan with a model of its size.")
    try:
        return _deepseek(config) if family == "deepseek_v3" else _plain(config, family)
    except KeyError as error:
        raise UnsupportedModel(f"The {family} config.json lacks {error}. Give the model's complete config.") from error


def _plain(config: Mapping[str, Any], family: str) -> ModelShape:
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    head_dim = config.get("head_dim") or (128 if family == "qwen3" else hidden // heads)
    bias = bool(config.get("attention_bias", False))
    return ModelShape(
        family=family,
        num_layers=config["num_hidden_layers"],
        hidden=hidden,
        vocab=config["vocab_size"],
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        key_dim=head_dim,
        value_dim=head_dim,
        intermediate=config["intermediate_size"],
        max_context=context_length(config),
        query_key_bias=bias or family == "qwen2",
        output_bias=bias and family != "qwen2",
        mlp_bias=bool(config.get("mlp_bias", False)),
        query_key_norm=family == "qwen3",
        tied=bool(config.get("tie_word_embeddings", False)),
        stored_bytes=_stored_bytes(config),
        quantisation=quantisation(config),
    )


def _deepseek(config: Mapping[str, Any]) -> ModelShape:
    bias = bool(config.get("attention_bias", False))
    rope = config["qk_rope_head_dim"]
    return ModelShape(
        family="deepseek_v3",
        num_layers=config["num_hidden_layers"],
        hidden=config["hidden_size"],
        vocab=config["vocab_size"],
        num_heads=config["num_attention_heads"],
        num_kv_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
        key_dim=config["qk_nope_head_dim"] + rope,
        value_dim=config["v_head_dim"],
        intermediate=config["intermediate_size"],
        max_context=context_length(config),
        latent=Latent(query_rank=config.get("q_lora_rank"), kv_rank=config["kv_lora_rank"], rope_dim=rope),
        num_experts=config["n_routed_experts"],
        experts_per_token=config["num_experts_per_tok"],
        num_shared_experts=config.get("n_shared_experts") or 0,
        expert_intermediate=config["moe_intermediate_size"],
        num_dense_layers=config["first_k_dense_replace"],
        num_prediction_layers=config.get("num_nextn_predict_layers") or 0,
        query_key_bias=bias,
        output_bias=bias,
        tied=bool(config.get("tie_word_embeddings", False)),
        stored_bytes=_stored_bytes(config),
        quantisation=quantisation(config),
    )


def _stored_bytes(config: Mapping[str, Any]) -> float:
    quantised = config.get("quantization_config") or {}
    if quantised.get("quant_method") == "fp8":
        rows, columns = quantised.get("weight_block_size") or (128, 128)
        return 1 + 4 / (rows * columns)  # one float32 scale per block
    return 4.0 if str(config.get("torch_dtype") or config.get("dtype")) == "float32" else 2.0
