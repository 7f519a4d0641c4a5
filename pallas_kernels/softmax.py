"""Constants of the online softmax, shared by every implementation.

Scores are kept in base 2 by the Pallas kernels: exp2(x * LOG2E) is one instruction on the GPU.
"""

from __future__ import annotations

import math

LOG2E = math.log2(math.e)
# a finite "minus infinity": differences of two of them are 0, never NaN
NEG = -1e30
# keeps the division of an empty row defined: 0 / TINY is 0
TINY = 1e-30
