"""EasyQuant: alternating search of the weight's and the activation's scale by the cosine of the outputs.

Wu, Tang, Zhao, Wang, Zhang and Zhuang, "EasyQuant: Post-training Quantization via Scale Optimization", 2020
(arXiv 2006.16669), section 3.2: from the min-max scales, the weight's scale is searched in [α s, β s] with the
activation's fixed, then the other way round, until neither changes. Here the cosine is taken over all calibration
images together, and every candidate of a search counts from the min-max scale, so that the search ends at a fixed point
of one list.
"""

from __future__ import annotations

from dataclasses import dataclass

from bc.quantizers.base_ptq import SearchQuantizer
from bc.search import Metric


class EasyQuant(SearchQuantizer):
    """EasyQuant on symmetric uniform grids."""

    name = "easyquant"

    @dataclass(frozen=True)
    class Options(SearchQuantizer.Options):
        """Options of EasyQuant; see :class:`bc.quantizers.base_ptq.SearchQuantizer.Options`."""

        metric: Metric = "cosine"
        low: float = 0.5
        high: float = 2.0
        candidates: int = 100
        rounds: int = 10
