import numpy as np
from numpy.typing import NDArray

TARGETS: tuple[str, ...]

def quantize(bits: int, rows: NDArray[np.float32], out: NDArray[np.uint8], target: int, /) -> None: ...
