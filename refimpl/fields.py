"""Every field of the files that describe a model, and what is done with it: one table for config.json (with
its `quantization_config`, `rope_scaling` and `text_config`), generation_config.json, tokenizer_config.json
and the metadata of a GGUF.

honoured    it governs what the row says
harmless    it changes nothing that is computed here, for the reason given
refused     it would change what is computed and is not done; values at which it changes nothing are let
through

`check` is the one judge of all sources. Keys in none of the rows are named in one note. docs/fields.md is
made from this table.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from functools import cache
from typing import Any, NamedTuple

from refimpl.errors import printable, refusal

HONOURED, HARMLESS, REFUSED = "honoured", "harmless", "refused"


class Field(NamedTuple):
    """A row: what is done with the key, and where or why.

    `neutral`: values of a refused key that change nothing, or a function of (value, all fields) that knows
    them; null is always one. `needs` says the same in words.
    """

    verdict: str
    why: str
    neutral: tuple[Any, ...] | Callable[[Any, Mapping[str, Any]], bool] = ()
    needs: str = ""

    def passes(self, value: Any, raw: Mapping[str, Any]) -> bool:
        """Whether a key of this row with this value is let through."""
        if self.verdict != REFUSED or value is None:
            return True
        if callable(self.neutral):
            return self.neutral(value, raw)
        return any((type(value) is type(n) and value == n) or _equal_numbers(value, n) for n in self.neutral)

    @property
    def expected(self) -> str:
        """What a refused key may be, in words."""
        return self.needs or " or ".join([*(repr(n) for n in self.neutral), "no such field"])  # type: ignore[union-attr]


def _equal_numbers(a: Any, b: Any) -> bool:
    return not isinstance(a, bool | str) and not isinstance(b, bool | str) and a == b


def honoured(why: str, *keys: str) -> dict[str, Field]:
    """Rows for keys that are obeyed."""
    return {key: Field(HONOURED, why) for key in keys}


def harmless(why: str, *keys: str) -> dict[str, Field]:
    """Rows for keys without a say."""
    return {key: Field(HARMLESS, why) for key in keys}


def refused(why: str, *keys: str, neutral: Any = (), needs: str = "") -> dict[str, Field]:
    """Rows for keys that are not obeyed, and so not accepted."""
    return {key: Field(REFUSED, why, neutral, needs) for key in keys}


def _same_as(key: str) -> Callable[[Any, Mapping[str, Any]], bool]:
    return lambda value, raw: value == raw.get(key)


_TRAINING = "read in training only"
_BOOKKEEPING = "says how the file came about, or which code of others reads it"
_OUTPUT = "chooses what a function of transformers returns, or how much memory it takes"
_SPARSE = "DeepSeek-V3.2's sparse attention, which is another computation"

_CONFIG: dict[str, Field] = {
    **honoured("`deepseek_v3`, or `kimi_k2` with DeepSeek-V3's fields; others are refused", "model_type"),
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
    **honoured("which layers are dense", "first_k_dense_replace"),
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
    **refused("another router", "scoring_func", neutral=("sigmoid",)),
    **refused("another router", "topk_method", neutral=("noaux_tc",)),
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
    **refused(_SPARSE, "index_topk", "index_n_heads", "index_head_dim", "index_topk_freq"),
    **refused(
        _SPARSE, "indexer_types", "index_topk_pattern", "index_skip_topk_offset", "indexer_rope_interleave"
    ),
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
    **refused("linear attention in some layers", "linear_attn_config", "layer_types"),
    **refused("experts of a second kind", "zero_expert_num", "zero_expert_type", neutral=(0,)),
    **refused("a second storage of the weights", "compression_config"),
    **harmless(
        _BOOKKEEPING, "architectures", "auto_map", "transformers_version", "_name_or_path", "tokenizer_class"
    ),
    **harmless(
        _BOOKKEEPING, "unsloth_version", "unsloth_fixed", "finetuning_task", "task_specific_params", "prefix"
    ),
    **harmless(_BOOKKEEPING, "_attn_implementation", "_attn_implementation_autoset", "_commit_hash", "name"),
    **harmless("the tensors say what they are", "torch_dtype", "dtype", "expert_dtype"),
    **harmless(
        _TRAINING, "attention_dropout", "hidden_dropout", "initializer_range", "aux_loss_alpha", "seq_aux"
    ),
    **harmless(_TRAINING, "router_aux_loss_coef", "output_router_logits", "moe_router_bias_update_rate"),
    **harmless("how the weights were spread over devices", "ep_size", "pretraining_tp", "base_model_tp_plan"),
    **harmless(
        _OUTPUT, "use_cache", "return_dict", "output_hidden_states", "output_attentions", "torchscript"
    ),
    **harmless(_OUTPUT, "use_bfloat16", "tf_legacy_loss", "chunk_size_feed_forward", "problem_type"),
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
        "of the part of a model that sees, which is not run", "vision_config", "media_placeholder_token_id"
    ),
}


def _sum(raw: Mapping[str, Any]) -> Any:
    try:
        return raw["qk_nope_head_dim"] + raw["qk_rope_head_dim"]
    except (KeyError, TypeError):
        return None


_QUANTIZATION: dict[str, Field] = {
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
_ROPE: dict[str, Field] = {
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
}
_LENGTH = "the length is `--max_new_tokens` and the context's"
_SEARCH = "a search over several answers"
_GENERATION: dict[str, Field] = {
    **honoured("true: sampling; false: greedy; absent: sampling where a temperature is given", "do_sample"),
    **honoured("sampling", "temperature", "top_k", "top_p", "min_p"),
    **honoured("stops an answer; a number or a list", "eos_token_id"),
    **honoured("tokens of an answer at most, where `--max_new_tokens` is not given", "max_new_tokens"),
    **refused(
        "penalties on what was said", "repetition_penalty", "encoder_repetition_penalty", neutral=(1.0,)
    ),
    **refused(
        "penalties on what was said", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", neutral=(0,)
    ),
    **refused("penalties on what was said", "presence_penalty", "frequency_penalty", neutral=(0,)),
    **refused(_SEARCH, "num_beams", "num_beam_groups", "num_return_sequences", neutral=(1,)),
    **refused(_SEARCH, "penalty_alpha", "diversity_penalty", neutral=(0.0,)),
    **refused("another cut of the probabilities", "typical_p", neutral=(1.0,)),
    **refused("another cut of the probabilities", "epsilon_cutoff", "eta_cutoff", neutral=(0.0,)),
    **refused("another cut of the probabilities", "top_h"),
    **refused(
        "probabilities of certain tokens are changed", "bad_words_ids", "force_words_ids", "sequence_bias"
    ),
    **refused("probabilities of certain tokens are changed", "suppress_tokens", "begin_suppress_tokens"),
    **refused("probabilities of certain tokens are changed", "constraints", "watermarking_config"),
    **refused("probabilities of certain tokens are changed", "forced_bos_token_id", "forced_eos_token_id"),
    **refused("probabilities of certain tokens are changed", "exponential_decay_length_penalty"),
    **refused("two models at once", "guidance_scale", neutral=(1.0,)),
    **refused("layers are contrasted", "dola_layers"),
    **refused("answers of a least length", "min_length", "min_new_tokens", neutral=(0,)),
    **refused("texts that end an answer", "stop_strings", neutral=([],), needs="[] or no such field"),
    **refused("the prompt's end is changed", "token_healing", neutral=(False,)),
    **harmless("the tokenizer files name it", "bos_token_id", "decoder_start_token_id"),
    **harmless("answers are not padded", "pad_token_id"),
    **harmless(_LENGTH, "max_length", "max_time"),
    **harmless("for beams only", "length_penalty", "early_stopping", "low_memory"),
    **harmless("kept weights are not changed by it", "renormalize_logits", "remove_invalid_values"),
    **harmless(
        _OUTPUT, "use_cache", "cache_implementation", "cache_config", "max_cache_len", "output_attentions"
    ),
    **harmless(_OUTPUT, "output_hidden_states", "output_logits", "output_scores", "return_dict_in_generate"),
    **harmless(
        _OUTPUT, "prefill_chunk_size", "compile_config", "disable_compile", "continuous_batching_config"
    ),
    **harmless(
        "drafts of another model, which change no answer", "is_assistant", "assistant_early_exit", "use_mtp"
    ),
    **harmless("drafts of another model, which change no answer", "assistant_confidence_threshold"),
    **harmless(
        "drafts of another model, which change no answer", "assistant_lookbehind", "target_lookbehind"
    ),
    **harmless(
        "drafts of another model, which change no answer", "num_assistant_tokens", "assistant_ensemble_weight"
    ),
    **harmless("drafts of another model, which change no answer", "num_assistant_tokens_schedule"),
    **harmless(
        "drafts of another model, which change no answer", "prompt_lookup_num_tokens", "speculation_type"
    ),
    **harmless("drafts of another model, which change no answer", "max_matching_ngram_size"),
    **harmless(_BOOKKEEPING, "_from_model_config", "transformers_version", "trust_remote_code"),
}
_IN_TOKENIZER_JSON = "tokenizer.json has it"
_TOKENIZER: dict[str, Field] = {
    **honoured(
        "named token, never made of a user's text", "bos_token", "eos_token", "pad_token", "unk_token"
    ),
    **honoured("one BOS before a prompt whose template gives none", "add_bos_token"),
    **honoured("prompts; a text, or a list of named ones", "chat_template"),
    **honoured("read with a tiktoken.model: its control tokens", "added_tokens_decoder"),
    **refused(
        "spellings of control tokens in the template are no tokens", "split_special_tokens", neutral=(False,)
    ),
    **harmless("a template writes the end of a turn; nothing is added behind a prompt", "add_eos_token"),
    **harmless("the context's length is config.json's", "model_max_length", "max_len"),
    **harmless(_IN_TOKENIZER_JSON, "add_prefix_space", "additional_special_tokens", "extra_special_tokens"),
    **harmless(
        _IN_TOKENIZER_JSON, "cls_token", "sep_token", "mask_token", "special_tokens_map_file", "legacy"
    ),
    **harmless(_IN_TOKENIZER_JSON, "sp_model_kwargs", "from_slow", "model_specific_special_tokens", "errors"),
    **harmless(
        "tokens are shown as they are spelled",
        "clean_up_tokenization_spaces",
        "spaces_between_special_tokens",
    ),
    **harmless(
        "prompts are not cut and not padded", "padding_side", "truncation_side", "truncation", "padding"
    ),
    **harmless("prompts are not cut and not padded", "max_length", "stride", "pad_to_multiple_of"),
    **harmless("prompts are not cut and not padded", "pad_token_type_id", "truncation_strategy"),
    **harmless(
        _BOOKKEEPING, "tokenizer_class", "auto_map", "name_or_path", "use_fast", "tokenizer_file", "backend"
    ),
    **harmless(
        _BOOKKEEPING, "model_input_names", "return_token_type_ids", "use_default_system_prompt", "is_local"
    ),
    **harmless(_BOOKKEEPING, "processor_class", "verbose", "transformers_version", "add_generation_prompt"),
    **harmless("a parser of answers, which is transformers'", "response_schema"),
}


def _like(key: str) -> Field:
    """The row of config.json, for a GGUF key of the same meaning."""
    return _CONFIG[key]._replace(why=f"as `{key}`: {_CONFIG[key].why}")


def _model(**rows: str) -> dict[str, Field]:
    return {"deepseek2." + key.replace("__", "."): _like(config) for key, config in rows.items()}


_TOKENS = "the tokenizer"
_GGUF: dict[str, Field] = {
    **honoured("`deepseek2`; others are refused", "general.architecture"),
    **honoured("where tensors lie", "general.alignment"),
    **honoured("parts of a model in several files", "split.no", "split.count", "split.tensors.count"),
    **_model(
        vocab_size="vocab_size",
        embedding_length="hidden_size",
        feed_forward_length="intermediate_size",
        expert_feed_forward_length="moe_intermediate_size",
        block_count="num_hidden_layers",
        nextn_predict_layers="num_nextn_predict_layers",
        attention__head_count="num_attention_heads",
        attention__q_lora_rank="q_lora_rank",
        attention__kv_lora_rank="kv_lora_rank",
        attention__key_length_mla="qk_nope_head_dim",
        attention__key_length="qk_nope_head_dim",
        attention__value_length_mla="v_head_dim",
        attention__value_length="v_head_dim",
        rope__dimension_count="qk_rope_head_dim",
        expert_count="n_routed_experts",
        expert_used_count="num_experts_per_tok",
        expert_shared_count="n_shared_experts",
        expert_group_count="n_group",
        expert_group_used_count="topk_group",
        expert_weights_scale="routed_scaling_factor",
        expert_weights_norm="norm_topk_prob",
        leading_dense_block_count="first_k_dense_replace",
        attention__layer_norm_rms_epsilon="rms_norm_eps",
        rope__freq_base="rope_theta",
        context_length="max_position_embeddings",
    ),
    **honoured("2, sigmoid; others are refused as `scoring_func` is", "deepseek2.expert_gating_func"),
    **honoured("as `rope_scaling`: `none` or `yarn`; others are refused", "deepseek2.rope.scaling.type"),
    **honoured("YaRN", "deepseek2.rope.scaling.factor", "deepseek2.rope.scaling.original_context_length"),
    **honoured("YaRN", "deepseek2.rope.scaling.yarn_beta_fast", "deepseek2.rope.scaling.yarn_beta_slow"),
    **honoured(
        "YaRN: a tenth of `mscale_all_dim`, which `mscale` equals unless refimpl's key says otherwise",
        "deepseek2.rope.scaling.yarn_log_multiplier",
    ),
    **honoured("YaRN: as `mscale`; refimpl's own key", "refimpl.rope.mscale"),
    **honoured("YaRN: as `attention_factor`; refimpl's own key", "refimpl.rope.attention_factor"),
    **refused(
        "other sizes of cosines and sines",
        "deepseek2.rope.scaling.attn_factor",
        "deepseek2.rope.scaling.yarn_attn_factor",
        neutral=(1.0,),
    ),
    **refused("a part of YaRN", "deepseek2.rope.scaling.yarn_ext_factor", neutral=(1.0, -1.0)),
    **refused(
        "another kind of scaling",
        "deepseek2.rope.scale_linear",
        "deepseek2.rope.scaling.alpha",
        neutral=(1.0,),
    ),
    **{
        f"deepseek2.attention.{g}": _like(c)
        for g, c in {
            "sliding_window": "sliding_window",
            "indexer.top_k": "index_topk",
            "indexer.head_count": "index_n_heads",
            "indexer.key_length": "index_head_dim",
        }.items()
    },
    **{
        f"deepseek2.{c}": _like(c)
        for c in (
            "attn_logit_softcapping",
            "final_logit_softcapping",
            "router_logit_softcapping",
            "logit_scale",
            "embedding_scale",
        )
    },
    **refused("scaled numbers on the way", "deepseek2.residual_scale", neutral=(1.0,)),
    **refused(
        "another temperature",
        "deepseek2.attention.scale",
        "deepseek2.attention.temperature_length",
        "deepseek2.attention.temperature_scale",
        "deepseek2.attention.output_scale",
        neutral=(0.0,),
    ),
    **refused("attention to what comes later", "deepseek2.attention.causal", neutral=(True,)),
    **refused("clipped activations", "deepseek2.attention.clamp_kqv", neutral=(0.0,)),
    **refused("clipped activations", "deepseek2.swiglu_clamp_exp", "deepseek2.swiglu_clamp_shexp"),
    **refused(
        "layers without experts in between",
        "deepseek2.moe_every_n_layers",
        "deepseek2.interleave_moe_layer_step",
        neutral=(0, 1),
    ),
    **refused(
        "experts in groups of another kind",
        "deepseek2.expert_group_scale",
        "deepseek2.experts_per_group",
        "deepseek2.moe_latent_size",
    ),
    **refused(
        "another width",
        "deepseek2.expert_shared_feed_forward_length",
        needs="expert_feed_forward_length times expert_shared_count",
        neutral=lambda v, raw: (
            v
            == raw.get("deepseek2.expert_feed_forward_length", 0)
            * raw.get("deepseek2.expert_shared_count", 0)
        ),
    ),
    **harmless(
        "1 in files with the halves of kv_b, else the number of heads", "deepseek2.attention.head_count_kv"
    ),
    **harmless("says how the model was trained", "deepseek2.rope.scaling.finetuned"),
    **harmless(
        _BOOKKEEPING, "general.type", "general.name", "general.author", "general.version", "general.tags"
    ),
    **harmless(
        _BOOKKEEPING, "general.organization", "general.finetune", "general.basename", "general.description"
    ),
    **harmless(_BOOKKEEPING, "general.quantized_by", "general.size_label", "general.license*", "general.url"),
    **harmless(_BOOKKEEPING, "general.doi", "general.uuid", "general.repo_url", "general.source.*"),
    **harmless(
        _BOOKKEEPING, "general.base_model.*", "general.dataset.*", "general.languages", "general.datasets"
    ),
    **harmless(_BOOKKEEPING, "quantize.imatrix.*", "general.source*", "general.quantization_version"),
    **harmless("the tensors say what they are", "general.file_type", "deepseek2.tensor_data_layout"),
    **honoured("sampling: temperature; 0 is greedy", "general.sampling.temp"),
    **honoured("sampling", "general.sampling.top_k", "general.sampling.top_p", "general.sampling.min_p"),
    **refused("penalties on what was said", "general.sampling.penalty_repeat", neutral=(1.0,)),
    **refused("another way to draw", "general.sampling.mirostat", neutral=(0,)),
    **refused("another cut of the probabilities", "general.sampling.xtc_probability", neutral=(0.0,)),
    **harmless(
        "for a penalty or a way to draw that is off",
        "general.sampling.penalty_last_n",
        "general.sampling.mirostat_tau",
        "general.sampling.mirostat_eta",
        "general.sampling.xtc_threshold",
    ),
    **harmless("temperature, then top_k, top_p, min_p, as everywhere here", "general.sampling.sequence"),
    **honoured(f"{_TOKENS}: `gpt2`; others are refused", "tokenizer.ggml.model"),
    **honoured(f"{_TOKENS}: how text is split, by name; unknown ones are refused", "tokenizer.ggml.pre"),
    **honoured(_TOKENS, "tokenizer.ggml.tokens", "tokenizer.ggml.token_type", "tokenizer.ggml.merges"),
    **honoured(f"{_TOKENS}: all of tokenizer.json", "tokenizer.huggingface.json"),
    **honoured("named token", "tokenizer.ggml.bos_token_id", "tokenizer.ggml.padding_token_id"),
    **honoured("named token", "tokenizer.ggml.unknown_token_id"),
    **honoured("stops an answer", "tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id"),
    **honoured("stops an answer", "tokenizer.ggml.eom_token_id"),
    **honoured("stops an answer, in place of those three; refimpl's own key", "refimpl.stop_token_ids"),
    **honoured("tokens of an answer at most; refimpl's own key", "refimpl.max_new_tokens"),
    **honoured("one BOS before a prompt whose template gives none", "tokenizer.ggml.add_bos_token"),
    **honoured("prompts", "tokenizer.chat_template", "tokenizer.chat_templates", "tokenizer.chat_template.*"),
    **harmless(
        "a template writes the end of a turn; nothing is added behind a prompt",
        "tokenizer.ggml.add_eos_token",
        "tokenizer.ggml.add_sep_token",
    ),
    **refused("a blank before a text", "tokenizer.ggml.add_space_prefix", neutral=(False,)),
    **refused("blanks are dropped", "tokenizer.ggml.remove_extra_whitespaces", neutral=(False,)),
    **refused("text is rewritten", "tokenizer.ggml.precompiled_charsmap"),
    **harmless("of no use to byte-level BPE", "tokenizer.ggml.scores", "tokenizer.ggml.token_type_count"),
    **harmless(
        "no prompt of a chat has them",
        "tokenizer.ggml.fim_*",
        "tokenizer.ggml.prefix_token_id",
        "tokenizer.ggml.suffix_token_id",
        "tokenizer.ggml.middle_token_id",
        "tokenizer.ggml.seperator_token_id",
        "tokenizer.ggml.mask_token_id",
        "tokenizer.ggml.cls_token_id",
    ),
}

TABLES: dict[str, dict[str, Field]] = {
    "config.json": _CONFIG,
    "quantization_config": _QUANTIZATION,
    "rope_scaling": _ROPE,
    "generation_config.json": _GENERATION,
    "tokenizer_config.json": _TOKENIZER,
    "GGUF": _GGUF,
}
PROMPTS = (
    "tokenizer.",
    "general.sampling.",
    "refimpl.stop",
    "refimpl.max",
)  # of a GGUF's keys, what text needs


def row(source: str, key: str) -> Field | None:
    """The row of a key, None where there is none."""
    table = TABLES[source]
    return table.get(key) or next((f for k, f in table.items() if "*" in k and fnmatchcase(key, k)), None)


def check(source: str, raw: Mapping[str, Any], where: object, keys: Iterable[str] | None = None) -> None:
    """Judge the keys of `raw` (or those of `keys`) by the table of `source`: UnsupportedError E4002 for the
    first that is refused; one note for all that are in no row.
    """
    unknown = []
    for key in raw if keys is None else keys:
        found = row(source, key)
        if found is None:
            unknown.append(str(key))
        elif not found.passes(raw[key], raw):
            shown = printable(repr(raw[key]), 60)
            raise refusal("E4002", where, key=key, why=found.why, found=shown, expected=found.expected)
    if unknown:
        shown = ", ".join(printable(k, 60) for k in sorted(unknown)[:20])
        more = f" and {len(unknown) - 20} more" if len(unknown) > 20 else ""
        note(f"{where}: fields that are not known here and not looked at: {shown}{more}")


@cache
def note(text: str) -> None:
    """One line on stderr, once a process."""
    print(f"refimpl: note: {printable(text, 1000)}", file=sys.stderr)
