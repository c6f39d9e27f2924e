"""Families of operations: how the inputs of each are drawn, what is true of it, and how its laws are
stated.
"""
