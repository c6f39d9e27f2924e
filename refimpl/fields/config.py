"""The rows of config.json, of its `quantization_config` and of its `rope_scaling`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from refimpl.fields.rows import BOOKKEEPING, OUTPUT, Field, harmless, honoured, refused

_TRAINING = "read in training only"


def _same_as(key: str) -> Callable[[Any, Mapping[str, Any]], bool]:
    return lambda value, raw: value == raw.get(key)


CONFIG: dict[str, Field] = {
    **honoured("one of the family (docs/family.md): what absent fields mean", "model_type"),
    **honoured("rows of the embedding and of the head", "vocab_size"),
    **honoured("width of the residual stream", "hidden_size"),
    **honoured("width of the dense layers' MLP", "intermediate_size"),
    **honoured("width of an expert", "moe_intermediate_size"),
    **honoured("number of layers; those behind them are not run", "num_hidden_layers"),
    **honoured("layers behind the last one, which are skipped with a note", "num_nextn_predict_layers"),
    **honoured("attention", "num_attention_heads", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim"),
    **honoured("attention", "v_head_dim"),
    **honoured("attention; null: one matrix for the queries", "q_lora_rank"),
    **honoured("router and experts", "n_routed_experts", "num_experts_per_tok", "n_group", "topk_group"),
    **honoured("router: weights of the chosen experts", "norm_topk_prob", "routed_scaling_factor"),
    **honoured("shared experts; null: none", "n_shared_experts"),
    **honoured("router: sigmoid or softmax of its products", "scoring_func"),
    **honoured(
        "router: `noaux_tc`, with a bias, groups by their two best; `group_limited_greedy`, by their best; "
        "`greedy`, of all experts",
        "topk_method",
    ),
    **honoured("which layers are dense", "first_k_dense_replace", "mlp_layer_types"),
    **honoured("every RMSNorm", "rms_norm_eps"),
    **honoured("rotary embedding; under `rope_parameters` too", "rope_theta"),
    **honoured("rotary embedding, rows below", "rope_scaling", "rope_parameters"),
    **honoured("length of the context", "max_position_embeddings"),
    **honoured("begin of a prompt where the tokenizer files name none", "bos_token_id"),
    **honoured(
        "stops an answer where generation_config.json does not say; a number or a list", "eos_token_id"
    ),
    **honoured("storage of the linears, rows below", "quantization_config"),
    **honoured("the model's own fields, where a config nests them", "text_config"),
    **refused("attention with biases", "attention_bias", "mlp_bias", neutral=(False,)),
    **refused("another activation", "hidden_act", neutral=("silu",)),
    **refused("a head that is the embedding", "tie_word_embeddings", neutral=(False,)),
    **refused("layers without experts in between", "moe_layer_freq", neutral=(1,)),
    **refused("halves instead of pairs are turned", "rope_interleave", neutral=(True,)),
    **harmless(
        "latent attention has keys for every head, and DeepSeek's code does not read it",
        "num_key_value_heads",
    ),
    **refused(
        "another head size",
        "head_dim",
        neutral=lambda v, raw: v in (raw.get("qk_rope_head_dim"), _sum(raw)),
        needs="qk_rope_head_dim, or the sum of qk_nope_head_dim and qk_rope_head_dim",
    ),
    **refused(
        "another head size",
        "qk_head_dim",
        neutral=lambda v, raw: v == _sum(raw),
        needs="the sum of qk_nope_head_dim and qk_rope_head_dim",
    ),
    **refused(
        "another number of experts",
        "num_local_experts",
        neutral=_same_as("n_routed_experts"),
        needs="n_routed_experts",
    ),
    **refused("a part of a head is turned", "partial_rotary_factor", neutral=(1.0,)),
    **refused("attention to near tokens only", "sliding_window", "attention_chunk_size"),
    **refused("attention to near tokens only", "use_sliding_window", neutral=(False,)),
    **honoured("sparse attention (DeepSeek-V3.2, GLM-5): rows that a token attends to", "index_topk"),
    **honoured("sparse attention: heads of the indexer", "index_n_heads", "index_head_dim"),
    **honoured("sparse attention: how pairs lie that the indexer turns", "indexer_rope_interleave"),
    **honoured("sparse attention: layers that attend to an earlier one's rows", "indexer_types"),
    **honoured("as `indexer_types`", "index_topk_pattern", "index_topk_freq", "index_skip_topk_offset"),
    **refused(
        "DeepSeek-V4's architecture",
        "compress_ratios",
        "hc_mult",
        "hc_sinkhorn_iters",
        "o_lora_rank",
        "o_groups",
        "num_hash_layers",
        "compress_rope_theta",
        "hc_eps",
    ),
    **refused("clipped activations", "swiglu_limit"),
    **refused(
        "capped scores or logits",
        "attn_logit_softcapping",
        "final_logit_softcapping",
        "router_logit_softcapping",
        "logits_soft_cap",
        "attention_logit_cap",
    ),
    **refused(
        "scaled numbers on the way",
        "embedding_multiplier",
        "residual_multiplier",
        "attention_multiplier",
        "logits_scaling",
        "logit_scale",
        "embedding_scale",
        neutral=(1.0,),
    ),
    **refused(
        "norms of queries and keys that V3 does not have", "use_qk_norm", "qk_layernorm", neutral=(False,)
    ),
    **refused(
        "gates on the attention that V3 does not have",
        "attention_output_gate",
        "use_gated_attention",
        neutral=(False,),
    ),
    **refused("linear attention in some layers", "linear_attn_config"),
    **refused(
        "another attention in some layers",
        "layer_types",
        neutral=lambda v, raw: isinstance(v, list) and set(map(str, v)) <= {"indexed_attention"},
        needs="'indexed_attention' for every layer, or no such field",
    ),
    **refused("experts of a second kind", "zero_expert_num", "zero_expert_type", neutral=(0,)),
    **refused("a second storage of the weights", "compression_config"),
    **harmless(
        BOOKKEEPING, "architectures", "auto_map", "transformers_version", "_name_or_path", "tokenizer_class"
    ),
    **harmless(
        BOOKKEEPING, "unsloth_version", "unsloth_fixed", "finetuning_task", "task_specific_params", "prefix"
    ),
    **harmless(BOOKKEEPING, "_attn_implementation", "_attn_implementation_autoset", "_commit_hash", "name"),
    **harmless("the tensors say what they are", "torch_dtype", "dtype", "expert_dtype"),
    **harmless(
        _TRAINING, "attention_dropout", "hidden_dropout", "initializer_range", "aux_loss_alpha", "seq_aux"
    ),
    **harmless(_TRAINING, "router_aux_loss_coef", "output_router_logits", "moe_router_bias_update_rate"),
    **harmless("how the weights were spread over devices", "ep_size", "pretraining_tp", "base_model_tp_plan"),
    **harmless(
        OUTPUT, "use_cache", "return_dict", "output_hidden_states", "output_attentions", "torchscript"
    ),
    **harmless(OUTPUT, "use_bfloat16", "tf_legacy_loss", "chunk_size_feed_forward", "problem_type"),
    **harmless(
        "for models with an encoder", "is_encoder_decoder", "is_decoder", "cross_attention_hidden_size"
    ),
    **harmless("for models with an encoder", "add_cross_attention", "tie_encoder_decoder", "pruned_heads"),
    **harmless("for models with an encoder", "decoder_start_token_id", "sep_token_id"),
    **harmless("for classifiers", "id2label", "label2id", "num_labels"),
    **harmless("answers are not padded", "pad_token_id"),
    **harmless(
        "generation_config.json governs answers", "max_length", "min_length", "do_sample", "temperature"
    ),
    **harmless("generation_config.json governs answers", "top_k", "top_p", "early_stopping", "num_beams"),
    **harmless("generation_config.json governs answers", "num_beam_groups", "diversity_penalty", "typical_p"),
    **harmless("generation_config.json governs answers", "repetition_penalty", "length_penalty"),
    **harmless(
        "generation_config.json governs answers", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"
    ),
    **harmless(
        "generation_config.json governs answers", "bad_words_ids", "num_return_sequences", "output_scores"
    ),
    **harmless("generation_config.json governs answers", "return_dict_in_generate", "forced_bos_token_id"),
    **harmless("generation_config.json governs answers", "forced_eos_token_id", "remove_invalid_values"),
    **harmless(
        "generation_config.json governs answers", "exponential_decay_length_penalty", "suppress_tokens"
    ),
    **harmless("generation_config.json governs answers", "begin_suppress_tokens"),
    **harmless(
        "for images and videos, which are not read here", "vision_config", "media_placeholder_token_id"
    ),
    **harmless(
        "for images and videos, which are not read here",
        "ignore_index",
        "use_unified_vision_chunk",
        "video_placeholder",
    ),
}


def _sum(raw: Mapping[str, Any]) -> Any:
    try:
        return raw["qk_nope_head_dim"] + raw["qk_rope_head_dim"]
    except (KeyError, TypeError):
        return None


QUANTIZATION: dict[str, Field] = {
    **refused("another storage", "quant_method", neutral=("fp8",)),
    **refused("another 8-bit float", "fmt", neutral=("e4m3",)),
    **refused("tiles of another size", "weight_block_size", neutral=([128, 128],)),
    **refused("activations with fixed scales", "activation_scheme", neutral=("dynamic",)),
    **honoured('`ue8m0`: scales of activations are powers of two, with `activations="fp8"`', "scale_fmt"),
    **harmless(
        "the tensors say which are FP8", "modules_to_not_convert", "ignored_layers", "ignore", "dequantize"
    ),
    **harmless("the tensors say which are FP8", "kv_cache_scheme"),
}
COMPRESSED: dict[str, Field] = {
    **refused("another storage", "quant_method", neutral=("compressed-tensors",)),
    **refused("another packing", "format", neutral=("pack-quantized",)),
    **refused("weights that are not packed yet", "quantization_status", neutral=("compressed",)),
    **refused("rounded activations", "input_activations", "output_activations"),
    **refused("a rounded cache", "kv_cache_scheme"),
    **refused("weights with holes", "sparsity_config", neutral=({},)),
    **refused("weights that are turned before they are packed", "transform_config", neutral=({},)),
    **harmless("its weights are judged by the rows below", "config_groups", "weights"),
    **harmless("the tensors say which are packed", "targets", "ignore"),
    **harmless(BOOKKEEPING, "version", "global_compression_ratio"),
}
COMPRESSED_WEIGHTS: dict[str, Field] = {
    **refused("weights of another width", "num_bits", neutral=(4,)),
    **refused("weights that are no integers", "type", neutral=("int",)),
    **refused("scales of other parts than groups", "strategy", neutral=("group",)),
    **refused("groups of another size", "group_size", neutral=(32,)),
    **refused("weights with zero points", "symmetric", neutral=(True,)),
    **refused("columns in another order", "actorder", neutral=(False,)),
    **refused("scales that are found while running", "dynamic", neutral=(False,)),
    **refused("scales of blocks", "block_structure"),
    **refused("scales of another type", "scale_dtype", "zp_dtype"),
    **harmless("how the scales were found", "observer", "observer_kwargs"),
}
ROPE: dict[str, Field] = {
    **honoured("`yarn`, `default` or null; others are refused", "type", "rope_type"),
    **honoured("rotary embedding", "rope_theta"),
    **honoured("YaRN", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow"),
    **honoured("YaRN: size of cosines and sines, by its ratio to that of `mscale_all_dim`", "mscale"),
    **honoured("YaRN: the same, and the softmax's temperature", "mscale_all_dim"),
    **honoured("YaRN: size of cosines and sines, in place of that ratio", "attention_factor"),
    **refused("a ramp with broken ends", "truncate", neutral=(True,)),
    **refused("a part of a head is turned", "partial_rotary_factor", neutral=(1.0,)),
    **refused(
        "another kind of scaling", "short_factor", "long_factor", "low_freq_factor", "high_freq_factor"
    ),
    **refused("attention that grows with the position", "llama_4_scaling_beta"),
    **refused(
        "one rotary embedding for some layers, another for others",
        "full_attention",
        "sliding_attention",
        "main",
        "compress",
    ),
}
