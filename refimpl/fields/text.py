"""The rows of generation_config.json and tokenizer_config.json."""

from __future__ import annotations

from refimpl.fields.rows import BOOKKEEPING, OUTPUT, Field, harmless, honoured, refused

_LENGTH = "the length is `--max_new_tokens` and the context's"
_SEARCH = "a search over several answers"
GENERATION: dict[str, Field] = {
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
        OUTPUT, "use_cache", "cache_implementation", "cache_config", "max_cache_len", "output_attentions"
    ),
    **harmless(OUTPUT, "output_hidden_states", "output_logits", "output_scores", "return_dict_in_generate"),
    **harmless(
        OUTPUT, "prefill_chunk_size", "compile_config", "disable_compile", "continuous_batching_config"
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
    **harmless(BOOKKEEPING, "_from_model_config", "transformers_version", "trust_remote_code"),
}
_IN_TOKENIZER_JSON = "tokenizer.json has it"
TOKENIZER: dict[str, Field] = {
    **honoured(
        "named token, never made of a user's text", "bos_token", "eos_token", "pad_token", "unk_token"
    ),
    **honoured("one BOS before a prompt whose template gives none", "add_bos_token"),
    **honoured("prompts; a text, or a list of named ones", "chat_template"),
    **honoured(
        "with a tiktoken.model its control tokens; else tokenizer.json must have what a template writes",
        "added_tokens_decoder",
    ),
    **honoured(
        "tokenizer.json must have what a template writes", "additional_special_tokens", "extra_special_tokens"
    ),
    **refused(
        "spellings of control tokens in the template are no tokens", "split_special_tokens", neutral=(False,)
    ),
    **harmless("a template writes the end of a turn; nothing is added behind a prompt", "add_eos_token"),
    **harmless("the context's length is config.json's", "model_max_length", "max_len"),
    **harmless(_IN_TOKENIZER_JSON, "add_prefix_space"),
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
        BOOKKEEPING, "tokenizer_class", "auto_map", "name_or_path", "use_fast", "tokenizer_file", "backend"
    ),
    **harmless(
        BOOKKEEPING, "model_input_names", "return_token_type_ids", "use_default_system_prompt", "is_local"
    ),
    **harmless(BOOKKEEPING, "processor_class", "verbose", "transformers_version", "add_generation_prompt"),
    **harmless("a parser of answers, which is transformers'", "response_schema"),
}
