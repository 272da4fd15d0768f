"""Small models of many more architectures, and where their places are, found by reading their source."""

from __future__ import annotations

from typing import Any

import transformers as t

from tests import models
from tests.models import GROUPED, LLAMA_PLACES, SMALL, VOCAB_SIZE, Place

_NO_HEAD_DIM: dict[str, Any] = {k: v for k, v in GROUPED.items() if k != "head_dim"}
_SLIDING: dict[str, Any] = {
    "sliding_window": 6,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
_EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2}
_DELTA: dict[str, Any] = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
_GPT: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "n_layer": 3, "n_head": 4, "bos_token_id": 0, "eos_token_id": 1}
_GEMMA4: dict[str, Any] = {
    "global_head_dim": 16,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCAB_SIZE,
}
_GEMMA3 = t.Gemma3TextConfig(**GROUPED, **_SLIDING, query_pre_attn_scalar=8)

CONFIGS: dict[str, Any] = {
    "llama3": t.LlamaConfig(
        **GROUPED,
        max_position_embeddings=256,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    ),
    "llama_dynamic": t.LlamaConfig(
        **GROUPED,
        max_position_embeddings=12,
        rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
    ),
    "gemma": t.GemmaConfig(**GROUPED),
    "gemma3_text": _GEMMA3,
    "gemma3": t.Gemma3Config(
        text_config=_GEMMA3,
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        mm_tokens_per_image=4,
        image_token_index=259,
        boi_token_index=258,
        eoi_token_index=257,
    ),
    "gemma4_text": t.Gemma4TextConfig(
        **GROUPED,
        sliding_window=6,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        **_GEMMA4,
    ),
    "gpt_oss": t.GptOssConfig(**GROUPED, **_SLIDING, **_EXPERTS, num_local_experts=4),
    "qwen3_moe": t.Qwen3MoeConfig(**GROUPED, **_EXPERTS, num_experts=4, moe_intermediate_size=16),
    "mixtral": t.MixtralConfig(**GROUPED, **_EXPERTS, num_local_experts=4),
    "mistral": t.MistralConfig(**GROUPED, sliding_window=6),
    "phi3": t.Phi3Config(**_NO_HEAD_DIM, max_position_embeddings=256, original_max_position_embeddings=256),
    "phi3_longrope": t.Phi3Config(
        **_NO_HEAD_DIM,
        max_position_embeddings=256,
        original_max_position_embeddings=16,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0, 1.1, 1.2, 1.3],
            "long_factor": [2.0, 3.0, 4.0, 5.0],
            "original_max_position_embeddings": 16,
            "partial_rotary_factor": 1.0,
        },
    ),
    "olmo2": t.Olmo2Config(**_NO_HEAD_DIM),
    "olmo3": t.Olmo3Config(**_NO_HEAD_DIM, **_SLIDING),
    "smollm3": t.SmolLM3Config(**_NO_HEAD_DIM, no_rope_layers=[1, 0, 1]),
    "deepseek_v3": t.DeepseekV3Config(
        **SMALL,
        **_EXPERTS,
        num_key_value_heads=4,
        moe_intermediate_size=16,
        n_routed_experts=4,
        n_shared_experts=1,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=16,
        kv_lora_rank=8,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=8,
    ),
    "bloom": t.BloomConfig(**_GPT, hidden_size=32, pad_token_id=1),
    "opt": t.OPTConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        word_embed_proj_dim=32,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    ),
    "gptj": t.GPTJConfig(**_GPT, n_embd=32, rotary_dim=4, n_positions=512),
    "cohere": t.CohereConfig(**_NO_HEAD_DIM),
    "cohere2": t.Cohere2Config(**_NO_HEAD_DIM, **_SLIDING),
    "qwen3_5": t.Qwen3_5TextConfig(**GROUPED, **_DELTA),
    "qwen3_5_moe": t.Qwen3_5MoeTextConfig(
        **{k: v for k, v in GROUPED.items() if k != "intermediate_size"},
        **_DELTA,
        **_EXPERTS,
        num_experts=4,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    ),
}

_SANDWICH = models.PLACES["gemma2"]
_MLP = {"mlp.hook_post": Place(lambda block: block.mlp.down_proj, True)}
_EITHER_ATTENTION = Place(lambda block: getattr(block, "self_attn", None) or block.linear_attn, False)
_PRE_NORM = {**LLAMA_PLACES, **_MLP}
PLACES: dict[str, dict[str, Place]] = {
    **dict.fromkeys(("llama3", "llama_dynamic", "gemma", "mistral", "phi3", "phi3_longrope", "smollm3"), _PRE_NORM),
    **dict.fromkeys(("cohere", "cohere2", "deepseek_v3"), _PRE_NORM),
    **dict.fromkeys(("gpt_oss", "qwen3_moe", "mixtral"), LLAMA_PLACES),
    "qwen3_5": {**_PRE_NORM, "hook_attn_out": _EITHER_ATTENTION},
    "qwen3_5_moe": {**LLAMA_PLACES, "hook_attn_out": _EITHER_ATTENTION},
    **{family: {**_SANDWICH, **_MLP} for family in ("gemma3_text", "gemma3", "gemma4_text", "olmo2", "olmo3")},
    "bloom": {
        **LLAMA_PLACES,
        "attn.hook_z": Place(lambda block: block.self_attention.dense, True),
        "hook_attn_out": Place(lambda block: block.self_attention.dense, False),
        "hook_mlp_out": Place(lambda block: block.mlp.dense_4h_to_h, False),
        "mlp.hook_post": Place(lambda block: block.mlp.dense_4h_to_h, True),
    },
    "opt": {
        **LLAMA_PLACES,
        "attn.hook_z": Place(lambda block: block.self_attn.out_proj, True),
        "hook_mlp_out": Place(lambda block: block.fc2, False),
        "mlp.hook_post": Place(lambda block: block.fc2, True),
    },
    "gptj": {
        **LLAMA_PLACES,
        "attn.hook_z": Place(lambda block: block.attn.out_proj, True),
        "hook_attn_out": Place(lambda block: block.attn, False),
        "mlp.hook_post": Place(lambda block: block.mlp.fc_out, True),
    },
}

models.MORE_CONFIGS.update(CONFIGS)
models.MORE_PLACES.update(PLACES)
