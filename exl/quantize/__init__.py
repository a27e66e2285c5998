"""Dense models -> GPTQ files."""

from exl.quantize.options import QuantizeOptions
from exl.quantize.run import Progress, QuantizeResult, quantize

__all__ = ["Progress", "QuantizeOptions", "QuantizeResult", "quantize"]
