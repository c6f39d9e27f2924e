"""What a model reads and writes as text: tokenizers, chat templates, and the sandbox that strangers' programs
run in.
"""
