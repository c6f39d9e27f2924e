"""The rows of a GGUF's metadata: what llama.cpp's converter writes here, and refimpl's own keys."""

from __future__ import annotations

from refimpl.fields.config import CONFIG
from refimpl.fields.rows import BOOKKEEPING, Field, harmless, honoured, refused


def _like(key: str) -> Field:
    """The row of config.json, for a GGUF key of the same meaning."""
    return CONFIG[key]._replace(why=f"as `{key}`: {CONFIG[key].why}")


def _model(**rows: str) -> dict[str, Field]:
    return {"deepseek2." + key.replace("__", "."): _like(config) for key, config in rows.items()}


_TOKENS = "the tokenizer"
GGUF: dict[str, Field] = {
    **honoured(
        "`deepseek2`, `deepseek32` or `glm-dsa`, whose keys are here as `deepseek2.` has them; others are "
        "refused",
        "general.architecture",
    ),
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
    **honoured("1, softmax, or 2, sigmoid; others are refused", "deepseek2.expert_gating_func"),
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
            "indexer.types": "indexer_types",
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
        BOOKKEEPING, "general.type", "general.name", "general.author", "general.version", "general.tags"
    ),
    **harmless(
        BOOKKEEPING, "general.organization", "general.finetune", "general.basename", "general.description"
    ),
    **harmless(BOOKKEEPING, "general.quantized_by", "general.size_label", "general.license*", "general.url"),
    **harmless(BOOKKEEPING, "general.doi", "general.uuid", "general.repo_url", "general.source.*"),
    **harmless(
        BOOKKEEPING, "general.base_model.*", "general.dataset.*", "general.languages", "general.datasets"
    ),
    **harmless(BOOKKEEPING, "quantize.imatrix.*", "general.source*", "general.quantization_version"),
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
    **honoured("prompts", "tokenizer.chat_template", "tokenizer.chat_template.*"),
    **harmless("the templates that it names have keys of their own", "tokenizer.chat_templates"),
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
