"""Block-scaled FP8, the public face of `refimpl.reference.fp8`: `refimpl.fp8.act_quant`, `weight_quant`,
`weight_dequant`, `linear`.
"""

from refimpl.reference.fp8 import BLOCK, act_quant, linear, weight_dequant, weight_quant

__all__ = ["BLOCK", "act_quant", "linear", "weight_dequant", "weight_quant"]
