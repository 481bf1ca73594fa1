"""The moves a site can make."""

from onnx_utilrank.errors import ConfigError
from onnx_utilrank.moves.low_rank import LOW_RANK
from onnx_utilrank.moves.move import MoveKind
from onnx_utilrank.moves.pivot import PIVOT
from onnx_utilrank.moves.shrink import SHRINK
from onnx_utilrank.moves.two_convs import TWO_CONVS

__all__ = ["MOVES", "MOVE_KEYS", "find_move"]

# Adding a move is one file beside this one and one entry here.
MOVES: tuple[MoveKind, ...] = (LOW_RANK, *TWO_CONVS, PIVOT)
# What users name; the last is made by several weights together.
MOVE_KEYS = (*(move.key for move in MOVES), SHRINK)


def find_move(key: str) -> MoveKind:
    """The move of that name.

    Raises:
        ConfigError: There is none.
    """
    found = next((m for m in MOVES if m.key == key), None)
    if found is None:
        raise ConfigError(f"move {key!r} is not known; choose from: {', '.join(MOVE_KEYS)}")
    return found
