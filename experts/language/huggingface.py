"""Our language model in the format of Qwen3-MoE, which transformers reads without our code (`pip install
moe-envs[hf]`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from cost.files import replacing
from experts.data import DataError
from experts.language import tokens
from experts.language.model import LanguageModel, require_sound
from experts.language.tokens import END
from experts.language.transformer import ModelSettings, Transformer

NAMES = {
    "attention_norm.weight": "input_layernorm.weight", "expert_norm.weight": "post_attention_layernorm.weight",
    "attention.query.weight": "self_attn.q_proj.weight", "attention.key.weight": "self_attn.k_proj.weight",
    "attention.value.weight": "self_attn.v_proj.weight", "attention.out.weight": "self_attn.o_proj.weight",
    "attention.query_norm.weight": "self_attn.q_norm.weight", "attention.key_norm.weight": "self_attn.k_norm.weight",
    "moe.gate.weight": "mlp.gate.weight",
}  # fmt: skip
STACKED = {"w_in": "gate_up_proj", "w_out": "down_proj"}


def save_huggingface(model: LanguageModel, folder: Path | str) -> Path:
    """Write our model as a Qwen3-MoE model with its tokenizer, for `AutoModelForCausalLM.from_pretrained`."""
    from transformers import PreTrainedTokenizerFast, Qwen3MoeForCausalLM

    with_end: Any = PreTrainedTokenizerFast

    made = Qwen3MoeForCausalLM(_config(model.settings))
    absent, foreign = made.load_state_dict(_to_qwen(model.network), strict=False)
    if foreign or set(absent) != {"lm_head.weight"}:  # which is the embedding
        raise ImportError("this version of transformers names weights otherwise: pip install 'moe-envs[hf]'")
    target = Path(folder)
    with replacing(target) as new:
        made.save_pretrained(new)
        with_end(tokenizer_object=model.tokenizer, eos_token=END, bos_token=END).save_pretrained(new)
    return target


def load_huggingface(folder: Path | str) -> LanguageModel:
    """Our model from what `save_huggingface` wrote; raises `DataError` for a Qwen3-MoE model of another form."""
    from transformers import AutoTokenizer, Qwen3MoeForCausalLM

    local: dict[str, Any] = {"local_files_only": True}  # never from the network
    try:
        source: Any = Qwen3MoeForCausalLM.from_pretrained(folder, use_safetensors=True, **local)
        tokenizer = tokens.load(AutoTokenizer.from_pretrained(folder, **local).backend_tokenizer.to_str())
    except (OSError, ValueError) as error:
        raise DataError(f"{folder} holds no Qwen3-MoE model: {error}") from error
    config = source.config
    settings = ModelSettings(
        vocabulary=config.vocab_size, d_model=config.hidden_size, layers=config.num_hidden_layers,
        heads=config.num_attention_heads, num_experts=config.num_experts, d_ff=config.moe_intermediate_size,
        k=config.num_experts_per_tok, context=config.max_position_embeddings,
        rope_theta=config.rope_parameters["rope_theta"], norm_eps=config.rms_norm_eps,
    )  # fmt: skip
    loading = dict.fromkeys(("_name_or_path", "architectures", "dtype"))  # what is set by saving and loading
    theirs, wanted = config.to_dict() | loading, _config(settings).to_dict() | loading
    if other := sorted(name for name in theirs | wanted if theirs.get(name) != wanted.get(name)):
        raise DataError(f"{folder} is not of `save_huggingface`: it differs in {', '.join(other)}")
    with torch.random.fork_rng(devices=[]):  # first weights are drawn, and replaced
        network = Transformer(settings)
    network.load_state_dict(_from_qwen(source.state_dict(), settings))
    require_sound(network, Path(folder))
    return LanguageModel(network.eval().requires_grad_(False), tokenizer, {"source": str(folder)})


def _config(settings: ModelSettings) -> Any:
    from transformers import Qwen3MoeConfig

    make: Any = Qwen3MoeConfig
    return make(
        vocab_size=settings.vocabulary, hidden_size=settings.d_model, num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads, num_key_value_heads=settings.heads,
        head_dim=settings.d_model // settings.heads, moe_intermediate_size=settings.d_ff,
        intermediate_size=settings.d_ff, num_experts=settings.num_experts, num_experts_per_tok=settings.k,
        norm_topk_prob=True, max_position_embeddings=settings.context, rms_norm_eps=settings.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": settings.rope_theta}, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip


def _to_qwen(network: Transformer) -> dict[str, torch.Tensor]:
    state, settings = network.state_dict(), network.settings
    found = {"model.embed_tokens.weight": state["embedding.weight"], "model.norm.weight": state["norm.weight"]}
    for layer in range(settings.layers):
        ours, theirs = f"blocks.{layer}.", f"model.layers.{layer}."
        found |= {theirs + name: state[ours + own] for own, name in NAMES.items()}
        for own, name in STACKED.items():
            each = [state[f"{ours}moe.experts.{number}.{own}"] for number in range(settings.num_experts)]
            found[f"{theirs}mlp.experts.{name}"] = torch.stack(each)
    return found


def _from_qwen(state: dict[str, torch.Tensor], settings: ModelSettings) -> dict[str, torch.Tensor]:
    found = {"embedding.weight": state["model.embed_tokens.weight"], "norm.weight": state["model.norm.weight"]}
    for layer in range(settings.layers):
        ours, theirs = f"blocks.{layer}.", f"model.layers.{layer}."
        found |= {ours + own: state[theirs + name] for own, name in NAMES.items()}
        for own, name in STACKED.items():
            for number, weight in enumerate(state[f"{theirs}mlp.experts.{name}"]):
                found[f"{ours}moe.experts.{number}.{own}"] = weight
    return {name: value.float() for name, value in found.items()}
