"""Tetris for one player, with two interfaces: eight buttons, or one choice for every piece.

    pip install opencv-python-headless
    pip install --no-deps tetris-gymnasium==0.3.1   # what it names as further needs is not used
    python dreamer.py --env-id games.tetris:Tetris-v0
    python variants/masked.py --env-id games.tetris:TetrisPlacements-v0

Unlike the other modules of this folder it holds Gymnasium environments. Board, pieces and rewards
are those of tetris-gymnasium: a field of 20 rows and 10 columns, seven pieces that come in shuffled
bags, 1 for a piece that is placed and 10 · n² for n lines cleared at once; the step that loses the
game pays 0. It is lost when a new piece has no room. The package knows no time limit: here episodes
are truncated after 2,000 steps with buttons, and after 500 choices with placements.

Observations are dicts of choices, so that a world model predicts cells as probabilities:

    board    (20, 10)  1 where a placed piece lies
    queue    (4,)      kinds 0 to 6 of the next pieces, I O T S Z J L
    holder   (4, 4)    cells of the piece that was put aside, zeros if there is none

    Tetris-v0 adds               piece (20, 10)  cells of the falling piece
                                 swapped         1 if this piece was swapped already
    TetrisPlacements-v0 adds     piece (4, 4)    cells of the piece to place
                                 action_mask     (80,) 1 where a choice is allowed

`info` counts "lines" and "pieces" of the episode. A seed fixes all that follows.
"""
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Discrete, MultiBinary, MultiDiscrete

try:
    from tetris_gymnasium.envs.tetris import Tetris as Package
except ImportError as error:
    raise ImportError(f"games.tetris needs tetris-gymnasium ({error}): pip install opencv-python-"
                      "headless, then pip install --no-deps tetris-gymnasium==0.3.1") from error

LEFT, RIGHT, DOWN, CLOCKWISE, COUNTERCLOCKWISE, DROP, SWAP, NOTHING = range(8)  # of the package
ROWS, COLUMNS, ROTATIONS = 20, 10, 4


class Game(Package):
    """The package's game, without the pictures that take it four fifths of a step."""

    def _get_obs(self) -> dict[str, Any]:
        return {}


def effective(buttons: np.ndarray) -> list[int]:
    """The buttons (8,) of a step that have an effect, in the order in which they act."""
    pressed = set(np.flatnonzero(buttons).tolist())
    for opposites in ({LEFT, RIGHT}, {CLOCKWISE, COUNTERCLOCKWISE}):
        if opposites <= pressed:
            pressed -= opposites
    order = (SWAP, CLOCKWISE, COUNTERCLOCKWISE, LEFT, RIGHT, DOWN, DROP)
    return [button for button in order if button in pressed] or [NOTHING]


def cells(matrix: np.ndarray) -> np.ndarray:
    """A piece as the package stores it, (2, 2) to (4, 4) → (4, 4), 1 where it has a cell."""
    padded = np.zeros((4, 4), np.int8)
    padded[: matrix.shape[0], : matrix.shape[1]] = matrix > 0
    return padded


class Tetris(gym.Env):
    """Eight buttons: left, right, down, rotate clockwise, rotate counterclockwise, hard drop, swap
    with the holder, and nothing. Action: MultiBinary(8), 1 for a button that is pressed.

    Buttons that contradict each other: left and right cancel each other out, and so do the two
    rotations. "Nothing" gives way to any other button. All that remain act within the step, one
    after the other: swap, rotate, move, down, hard drop. What has no room, and a second swap of the
    same piece, has no effect. Then, unless it was dropped, the piece falls by one row, or is placed
    where it cannot fall. With one button a step is therefore the package's own."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(self, render_mode: str | None = None):
        """render_mode: None or "rgb_array". Raises UnsupportedMode for any other."""
        if render_mode not in (None, "rgb_array"):
            raise gym.error.UnsupportedMode(
                f"games.tetris: render_mode {render_mode!r} must be rgb_array or None")
        self.render_mode = render_mode
        self.game = Game(width=COLUMNS, height=ROWS)
        spaces = {"board": MultiBinary((ROWS, COLUMNS)), "queue": MultiDiscrete([7] * 4),
                  "holder": MultiBinary((4, 4))}
        self.observation_space = gym.spaces.Dict(spaces | self.further_spaces())
        self.action_space = self.make_action_space()

    def make_action_space(self) -> gym.Space:
        return MultiBinary(8)

    def further_spaces(self) -> dict[str, gym.Space]:
        """What this interface observes beside board, queue and holder."""
        return {"piece": MultiBinary((ROWS, COLUMNS)), "swapped": Discrete(2)}

    def further(self) -> dict[str, Any]:
        """The observations of `further_spaces`."""
        game = self.game
        padded = np.zeros_like(game.board)
        where = game.get_tetromino_slices(game.active_tetromino, game.x, game.y)
        padded[where] = game.active_tetromino.matrix > 0
        return {"piece": game.crop_padding(padded).astype(np.int8),
                "swapped": np.int64(game.has_swapped)}

    def observe(self) -> dict[str, Any]:
        held = self.game.holder.get_tetrominoes()
        return {"board": (self.game.crop_padding(self.game.board) > 0).astype(np.int8),
                "queue": np.array(self.game.queue.get_queue(), np.int64),
                "holder": cells(held[0].matrix if held else np.zeros((4, 4)))} | self.further()

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        """Returns (observation, info). There is nothing that options could change."""
        super().reset(seed=seed)
        # the package takes seed 0 for none, and would begin with pieces that no seed determines
        self.game.reset(seed=int(self.np_random.integers(1, 2**31)))
        self.lines = 0
        return self.observe(), {"lines": 0, "pieces": 0}

    def play(self, button: int, gravity: bool) -> float:
        """Lets one button act, and pays what the package pays."""
        self.game.gravity_enabled = gravity
        _, reward, _, _, info = self.game.step(button)
        self.lines += int(info["lines_cleared"])
        return float(reward)

    def act(self, action: Any) -> float:
        """One step of the game. Returns its reward."""
        *first, last = effective(action)
        return sum(self.play(button, gravity=False) for button in first) + self.play(last, True)

    def step(self, action: Any):
        """Returns (observation, reward, terminated, truncated, info)."""
        reward = self.act(action)
        placed = np.count_nonzero(self.game.crop_padding(self.game.board))
        # a piece brings four cells, and a line takes ten away
        info = {"lines": self.lines, "pieces": (placed + COLUMNS * self.lines) // 4}
        return self.observe(), reward, bool(self.game.game_over), False, info

    def render(self) -> np.ndarray:
        """The field with the falling piece, (200, 100, 3) uint8."""
        colors = np.array([pixel.color_rgb for pixel in self.game.pixels], np.uint8)
        field = colors[self.game.crop_padding(self.game.project_tetromino())]
        return field.repeat(10, 0).repeat(10, 1)


class TetrisPlacements(Tetris):
    """One choice for every piece. Action: Discrete(80), a place to drop the piece at:

        choice = 40 · (swap with the holder first) + 4 · column + quarter turns

    Without swap this is the numbering of the package's GroupedActionsObservations: the piece's
    middle column, shape[1] // 2 of its square, comes to `column`. So all final positions can be
    chosen that a piece reaches falling straight down; some have two numbers, as turning an O
    changes nothing. action_mask says which choices keep within the columns, as the package does: a
    place that is blocked at the top is allowed, and loses the game. A choice that is not allowed
    changes nothing and pays −0.1."""

    def make_action_space(self) -> gym.Space:
        return Discrete(2 * COLUMNS * ROTATIONS)

    def further_spaces(self) -> dict[str, gym.Space]:
        return {"piece": MultiBinary((4, 4)), "action_mask": MultiBinary(2 * COLUMNS * ROTATIONS)}

    def further(self) -> dict[str, Any]:
        game = self.game
        piece = game.active_tetromino.matrix
        held = game.holder.get_tetrominoes()  # empty, it is the next piece that comes in
        other = held[0] if held else game.tetrominoes[game.queue.get_queue()[0]]
        self.allowed = np.concatenate([self.places(piece), self.places(other.matrix)])
        return {"piece": cells(piece), "action_mask": self.allowed}

    def places(self, matrix: np.ndarray) -> np.ndarray:
        """(40,) 1 where all cells of a piece are in the field's columns."""
        inside = np.zeros((COLUMNS, ROTATIONS), np.int8)
        for turns in range(ROTATIONS):
            columns = np.flatnonzero(np.rot90(matrix, turns).any(0)) - matrix.shape[1] // 2
            inside[max(-columns[0], 0) : COLUMNS - max(columns[-1], 0), turns] = 1
        return inside.ravel()

    def act(self, action: Any) -> float:
        if not self.allowed[action]:
            return self.game.rewards.invalid_action
        swap, place = divmod(int(action), COLUMNS * ROTATIONS)
        column, turns = divmod(place, ROTATIONS)
        if swap:
            self.play(SWAP, gravity=False)
        piece = self.game.active_tetromino
        for _ in range(turns):
            piece = self.game.rotate(piece)
        self.game.active_tetromino = piece
        self.game.x = column + self.game.padding - piece.matrix.shape[1] // 2
        return self.play(DROP, gravity=False)


gym.register("Tetris-v0", "games.tetris:Tetris", max_episode_steps=2000)
gym.register("TetrisPlacements-v0", "games.tetris:TetrisPlacements", max_episode_steps=500)
