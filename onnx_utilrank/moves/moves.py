"""The moves a site can make."""

from onnx_utilrank.errors import ConfigError
from onnx_utilrank.moves.low_rank import LOW_RANK
from onnx_utilrank.moves.move import MoveKind
from onnx_utilrank.moves.pivot import PIVOT

__all__ = ["MOVES", "find_move"]

# Adding a move is one file beside this one and one entry here.
MOVES: tuple[MoveKind, ...] = (LOW_RANK, PIVOT)


def find_move(key: str) -> MoveKind:
    """The move of that name.

    Raises:
        ConfigError: There is none.
    """
    found = next((m for m in MOVES if m.key == key), None)
    if found is None:
        raise ConfigError(
            f"move {key!r} is not known; choose from: {', '.join(m.key for m in MOVES)}"
        )
    return found
