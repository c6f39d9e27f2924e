"""The paper in numpy, slow and true: linear layers on FP8 tiles and on GGML blocks, attention, router and
experts.
"""
