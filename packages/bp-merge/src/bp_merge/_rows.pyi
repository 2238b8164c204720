import numpy as np
from numpy.typing import NDArray

TARGETS: tuple[str, ...]

def add(
    base: NDArray[np.uint8],
    dtype: int,
    b: NDArray[np.float32],
    a: NDArray[np.float32],
    scale: float,
    rank: int,
    step: int,
    parts: int,
    out: NDArray[np.float32],
    target: int,
    /,
) -> None: ...
def gram(
    parts: tuple[NDArray[np.float32], ...], length: int, is_tall: bool, out: NDArray[np.float64], target: int, /
) -> None: ...
def decode(source: NDArray[np.uint8], out: NDArray[np.float32], target: int, /) -> None: ...
def encode(source: NDArray[np.float32], out: NDArray[np.uint16], target: int, /) -> None: ...
