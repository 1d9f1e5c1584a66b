"""Both interfaces of games.tetris against the package's own game and wrapper."""
import copy
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest

package = pytest.importorskip("tetris_gymnasium.envs.tetris")
from tetris_gymnasium.wrappers.grouped import GroupedActionsObservations

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import dreamer
from games import tetris

IDS = ("games.tetris:Tetris-v0", "games.tetris:TetrisPlacements-v0")
SINGLE = np.eye(8, dtype=np.int8)


def choose(env, obs, rng):
    """A random action, among the allowed ones where there is a mask."""
    if "action_mask" in obs:
        return int(rng.choice(np.flatnonzero(obs["action_mask"])))
    return rng.integers(0, 2, 8).astype(np.int8)


def play(env, steps, seed, watch=lambda *_: None):
    """[(observation, reward, terminated, info)] of a random policy; `watch` sees every step."""
    rng = np.random.default_rng(seed)
    obs, info = env.reset(seed=seed)
    rows = [(obs, 0.0, False, info)]
    for _ in range(steps):
        action = choose(env, obs, rng)
        before = obs
        obs, reward, terminated, truncated, info = env.step(action)
        watch(before, action, obs, reward, info)
        rows.append((obs, reward, terminated, info))
        if terminated or truncated:
            obs, info = env.reset()
            rows.append((obs, 0.0, False, info))
    return rows


def names(env):
    """The buttons that the package's game is given, with the gravity that it has then."""
    given = []
    step = env.game.step
    env.game.step = lambda button: (given.append((button, env.game.gravity_enabled)),
                                    step(button))[1]
    return given


@pytest.mark.parametrize("name", IDS)
def test_observations_lie_in_their_space_and_a_seed_zero_included_fixes_the_whole_game(name):
    games = []
    for seed in (0, 0, 5):
        env = gym.make(name)
        rows = play(env, 150, seed)
        assert all(env.observation_space.contains(row[0]) for row in rows)
        games.append([np.concatenate([np.ravel(x) for x in row[0].values()]) for row in rows])
    np.testing.assert_array_equal(games[0], games[1])
    assert len(games[0]) != len(games[2]) or not np.array_equal(games[0], games[2])


@pytest.mark.parametrize("name", IDS)
def test_the_observation_shows_the_packages_own_board_pieces_queue_and_holder(name):
    env = gym.make(name).unwrapped
    seen = set()

    def watch(before, action, obs, reward, info):
        own = package.Tetris._get_obs(env.game)
        if not env.game.game_over:  # then the package leaves the piece out
            board = env.game.crop_padding(own["board"]) > 0
            if obs["piece"].shape == (20, 10):
                np.testing.assert_array_equal(obs["board"] | obs["piece"], board)
                assert not (obs["board"] & obs["piece"]).any() and obs["piece"].sum() == 4
                box = env.game.crop_padding(own["active_tetromino_mask"])
                assert (obs["piece"] <= box).all()
                assert obs["swapped"] == env.game.has_swapped
            else:
                assert board.sum() == obs["board"].sum() + 4 and obs["piece"].sum() == 4
        pieces = np.split(own["queue"], 4, axis=1)
        assert obs["queue"].tolist() == [piece.max() - 2 for piece in pieces]
        holds = len(env.game.holder.get_tetrominoes())
        np.testing.assert_array_equal(obs["holder"], (own["holder"] > 0) * holds)
        seen.add(holds)

    play(env, 120, 1, watch)
    assert seen == {0, 1}


def test_with_one_button_a_step_is_the_packages_own():
    env, own = tetris.Tetris(), package.Tetris()
    rng = np.random.default_rng(0)
    env.reset(seed=3)
    own.reset(seed=1)
    own.queue, own.active_tetromino, own.x, own.y = copy.deepcopy(
        (env.game.queue, env.game.active_tetromino, env.game.x, env.game.y))
    for _ in range(150):
        button = int(rng.choice(8, p=[0.2, 0.2, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1]))
        obs, reward, terminated, _, _ = env.step(SINGLE[button])
        expected, own_reward, over, _, _ = own.step(button)
        assert (reward, terminated) == (own_reward, over)
        np.testing.assert_array_equal(env.game.board, own.board)
        if over:
            break
        both = obs["board"] | obs["piece"]
        np.testing.assert_array_equal(both, own.crop_padding(expected["board"]) > 0)
    assert over


@pytest.mark.parametrize("pressed, acting", [
    ("", "n"), ("n", "n"), ("lr", "n"), ("co", "n"), ("lrcon", "n"), ("ln", "l"), ("lrc", "c"),
    ("hs", "sh"), ("dlo", "old"), ("lrdcohsn", "sdh"), ("rcds", "scrd"), ("hlc", "clh")])
def test_opposite_buttons_cancel_out_nothing_gives_way_and_the_others_act_in_order(pressed, acting):
    letters = "lrdcohsn"  # in the order of the package
    env = tetris.Tetris()
    env.reset(seed=0)
    given = names(env)
    row = env.game.y
    env.step(np.array([letter in pressed for letter in letters], np.int8))
    assert "".join(letters[button] for button, _ in given) == acting
    gravity = [on for _, on in given]
    assert gravity == [False] * (len(given) - 1) + [True]  # one row, however many buttons
    if "h" not in pressed:
        assert env.game.y == row + 1 + ("d" in acting)


def test_placements_are_those_that_the_packages_wrapper_calls_legal_and_lead_where_it_says():
    env = tetris.TetrisPlacements()
    wrapper = GroupedActionsObservations(package.Tetris(gravity=False))
    counts = set()

    def legal(game):
        wrapper.env = game
        boards = wrapper.observation(package.Tetris._get_obs(game))
        return wrapper.legal_actions_mask, boards

    rng = np.random.default_rng(0)
    obs, _ = env.reset(seed=2)
    for _ in range(30):
        swapped = copy.deepcopy(env.game)
        swapped.gravity_enabled = False
        swapped.step(tetris.SWAP)
        mask, boards = zip(legal(env.game), legal(swapped))
        np.testing.assert_array_equal(obs["action_mask"], np.concatenate(mask))
        counts.add(int(obs["action_mask"].sum()))
        action = choose(env, obs, rng)
        obs, reward, terminated, _, _ = env.step(action)
        expected = np.concatenate(boards)[action]
        if reward and expected.any():  # a lost game is a board of zeros to the wrapper
            np.testing.assert_array_equal(env.game.board, expected)
        if terminated:
            obs, _ = env.reset()
    assert len(counts) > 3 and max(counts) <= 72


def test_a_choice_that_is_not_allowed_changes_nothing_and_costs_a_tenth():
    env = tetris.TetrisPlacements()
    obs, _ = env.reset(seed=0)
    forbidden = np.flatnonzero(obs["action_mask"] == 0)
    assert len(forbidden) >= 8
    for action in forbidden:
        after, reward, terminated, truncated, info = env.step(action)
        assert (reward, terminated, truncated, info["pieces"]) == (-0.1, False, False, 0)
        for key in obs:
            np.testing.assert_array_equal(after[key], obs[key])


def test_a_swapped_piece_without_room_to_fall_can_still_be_placed_aside():
    env = tetris.TetrisPlacements()
    env.reset(seed=0)
    env.game.board[2:20, 7:11] = 2  # a tower below the place where pieces come in
    obs = env.observe()
    action = 40 + int(np.flatnonzero(obs["action_mask"][40:])[0])
    after, reward, terminated, _, _ = env.step(action)
    new = after["board"] - obs["board"]
    assert (reward, terminated) == (1, False) and new.sum() == 4 and new[:, :3].sum() == 4


@pytest.mark.parametrize("name", IDS)
def test_lines_and_pieces_are_those_that_the_game_cleared_and_placed_and_pay(name, monkeypatch):
    env = gym.make(name).unwrapped
    counted = {"pieces": 0, "lines": 0}
    place, clear = package.Tetris.place_active_tetromino, package.Tetris.clear_filled_rows

    def counting_place(game):
        counted["pieces"] += game is env.game
        place(game)

    def counting_clear(game, board):
        board, lines = clear(game, board)
        counted["lines"] += int(lines) * (game is env.game)
        return board, lines

    monkeypatch.setattr(package.Tetris, "place_active_tetromino", counting_place)
    monkeypatch.setattr(package.Tetris, "clear_filled_rows", counting_clear)
    rng = np.random.default_rng(0)
    obs, _ = env.reset(seed=0)
    for _ in range(60):
        pieces, lines = counted["pieces"], counted["lines"]
        action = best(env, obs) if name == IDS[1] else choose(env, obs, rng)
        obs, reward, over, _, info = env.step(action)
        assert (info["lines"], info["pieces"]) == (counted["lines"], counted["pieces"])
        gain = counted["pieces"] - pieces + 10 * (counted["lines"] - lines) ** 2
        assert reward == (0 if over else gain)
        if over:
            obs, info = env.reset()
            counted.update(pieces=0, lines=0)
            assert info == counted
    assert name == IDS[0] or counted["lines"] >= 10  # random play would clear next to none
    obs, _ = env.reset()
    assert env.step(choose(env, obs, rng))[4]["lines"] == 0


def best(env, obs):
    """The allowed choice without swap that leaves the lowest stack and the fewest holes."""
    game = env.game
    scores = {}
    for action in np.flatnonzero(obs["action_mask"][:40]).tolist():
        piece = game.active_tetromino
        for _ in range(action % 4):
            piece = game.rotate(piece)
        x, y = action // 4 + 4 - piece.matrix.shape[1] // 2, 0
        while not game.collision(piece, x, y + 1):
            y += 1
        board = game.crop_padding(game.project_tetromino(piece, x, y)) > 0
        board = board[~board.all(1)]
        covered = np.maximum.accumulate(board, 0)
        scores[action] = 8 * (covered & ~board).sum() + (covered.sum(0) ** 2).sum() / 10
    return min(scores, key=scores.get)


@pytest.mark.parametrize("name, limit", [(IDS[0], 2000), (IDS[1], 500)])
def test_episodes_are_truncated_and_the_agents_codec_gives_back_every_board(name, limit):
    env = gym.make(name)
    assert env.spec.max_episode_steps == limit
    codec = dreamer.ObservationCodec(env.observation_space, 64)
    obs, _ = env.reset(seed=1)
    for _ in range(12):
        obs, *_ = env.step(choose(env, obs, np.random.default_rng(0)))
    encoded = codec({key: np.asarray(x)[None] for key, x in obs.items()})
    assert codec.specs["board"].classes == (2,) * 200
    assert codec.specs["queue"].classes == (7,) * 4
    np.testing.assert_array_equal(encoded["board"].reshape(20, 10), obs["board"])
    onehot = np.eye(2)[encoded["board"][0]]  # what a perfect decoder's logits are highest at
    np.testing.assert_array_equal(onehot.argmax(-1).reshape(20, 10), obs["board"])


def test_frames_are_drawn_and_another_render_mode_is_refused():
    env = gym.make(IDS[0], render_mode="rgb_array")
    env.reset(seed=0)
    frame = env.render()
    assert frame.shape == (200, 100, 3) and frame.dtype == np.uint8
    assert ((frame > 0).any(-1).sum()) == 4 * 100  # four cells of the falling piece
    with pytest.raises(gym.error.UnsupportedMode, match="rgb_array"):
        tetris.Tetris(render_mode="human")
    with pytest.raises(dreamer.InputError, match=f"{IDS[0]}.*cannot be made.*rgb_array"):
        dreamer.make_env(dreamer.Args(env_id=IDS[0], env_kwargs='{"render_mode": "ansi"}'), 0, False, "")()


def test_a_missing_package_is_an_input_error_that_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tetris_gymnasium.envs.tetris", None)
    monkeypatch.delitem(sys.modules, "games.tetris")
    args = dreamer.Args(env_id=IDS[0])
    with pytest.raises(dreamer.InputError, match="--no-deps tetris-gymnasium==0.3.1"):
        dreamer.make_env(args, 0, False, "x")()
