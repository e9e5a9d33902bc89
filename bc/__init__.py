"""Post-training quantization with Bias Compensation (Gong et al., arXiv 2404.01892).

Three lines::

    import bc
    model = bc.load("smollm2_135m")
    report = bc.quantize(model, quantizer="gptq", bits="w3", bc="sink", calibration=samples)

Everything that is not named here is private to the package and may change.
"""

from bc.api import accuracies, accuracy, load, open, perplexity, quantize, save
from bc.compensation import BiasCompensation
from bc.errors import QuantizationError, UserError
from bc.models import load_tokenizer
from bc.settings import Bits, Compensation

__all__ = [
    "BiasCompensation",
    "Bits",
    "Compensation",
    "QuantizationError",
    "UserError",
    "accuracies",
    "accuracy",
    "load",
    "load_tokenizer",
    "open",
    "perplexity",
    "quantize",
    "save",
]
