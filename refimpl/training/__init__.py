"""How the embedded model was made: problems, phrases, tokenizer, training, export and evaluation
(docs/tiny.md).
"""
