"""Files of weights: strict readers and writers of safetensors and GGUF, names in both, and the three kinds of
folder.
"""
