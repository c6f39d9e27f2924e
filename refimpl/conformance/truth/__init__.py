"""What the right result is and how far from it a kernel may be: bounds, comparisons, exact models of
rounding.
"""
