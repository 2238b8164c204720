import numpy as np
from numpy.typing import NDArray

TARGETS: tuple[str, ...]

def quantize(bits: int, rows: NDArray[np.float32], out: NDArray[np.uint8], target: int, /) -> None: ...
def is_finite(rows: NDArray[np.float32], /) -> bool: ...
