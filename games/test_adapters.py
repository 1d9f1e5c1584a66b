"""What the adapters make of their packages: with the stand-ins of conftest.py anywhere, and in the
tests named "real" with the packages themselves where they are installed."""
import math
import sys

import numpy as np
import pytest

from games.conftest import make


def test_overcooked_pays_soup_to_both_and_to_each_its_own_shaping_which_fades(stand_ins):
    env = make("overcooked", shaping_steps=4, horizon=3)
    for start, weights in ((math.inf, (0, 0, 0)), (0, (1, 0.75, 0.5)), (None, (0.25, 0, 0))):
        env.reset(options=None if start is None else {"steps": start})
        for t, weight in enumerate(weights):
            soup = 20 * (t == 1)
            obs, rewards, terminated, truncated, _ = env.step({"cook_0": 0, "cook_1": 4})
            assert rewards == {"cook_0": soup + 3 * weight, "cook_1": soup + 5 * weight}
            assert set(truncated.values()) == {t == 2} and set(terminated.values()) == {False}
    np.testing.assert_array_equal(obs["cook_0"], -obs["cook_1"])
    lossless = make("overcooked", encoding="lossless")
    assert lossless.observation_space("cook_0").shape == (30,)
    env = make("overcooked")
    env.reset()
    assert env.step({"cook_0": 0, "cook_1": 4})[1] == {"cook_0": 0, "cook_1": 0}


def test_real_greedy_cooks_deliver_soup_within_400_steps_and_shaping_pays_3_or_5():
    env, soups, shaped = make("overcooked", "real", shaping_steps=1000), 0, set()
    env.reset(seed=0)
    for t in range(400):
        delivered = env.game.game_stats["cumulative_sparse_rewards_by_agent"].sum()
        _, rewards, _, truncated, _ = env.step({a: env.play(a, "greedy") for a in env.agents})
        soup = env.game.game_stats["cumulative_sparse_rewards_by_agent"].sum() - delivered
        soups += soup
        shaped |= {round((r - soup) / (1 - t / 1000), 6) for r in rewards.values()}
    assert not env.agents and all(truncated.values())
    assert soups >= 100 and soups % 20 == 0 and shaped == {0, 3, 5}
    lossless = make("overcooked", "real", encoding="lossless")
    assert lossless.observation_space("cook_0").shape == (5 * 4 * 26,)


@pytest.mark.parametrize("eaten,steps,terminal", [(2, 2, True), (5, 5, True), (9, 5, False)])
def test_foraging_terminates_when_all_is_eaten_and_is_truncated_by_time(
        stand_ins, monkeypatch, eaten, steps, terminal):
    monkeypatch.setattr(sys.modules["lbforaging.foraging"].ForagingEnv, "eaten", eaten)
    env = make("foraging")
    env.reset()
    for t in range(1, steps + 1):
        _, rewards, terminated, truncated, _ = env.step({"player_0": 5, "player_1": 5})
        assert rewards == {"player_0": 0.25, "player_1": 0}
        assert set(terminated.values()) == {terminal and t == steps}
        assert set(truncated.values()) == {not terminal and t == steps}
    assert not env.agents


def test_real_foraging_terminates_when_all_is_eaten_and_is_truncated_by_time():
    easy = {"max_food_level": 1, "max_episode_steps": 3000}  # one player alone can load any food
    env = make("foraging", "real", env_id="Foraging-5x5-2p-1f-v3", **easy)
    rng, total = np.random.default_rng(0), 0.0
    env.reset(seed=0)
    while env.agents:
        _, rewards, terminated, truncated, _ = env.step({a: rng.integers(6) for a in env.agents})
        total += sum(rewards.values())
    assert total == 1 and all(terminated.values()) and not any(truncated.values())
    for limit in (20, 70):  # the package's usual limit is 50
        env = make("foraging", "real", max_episode_steps=limit)
        env.reset(seed=0)
        for _ in range(limit):
            assert env.agents
            _, _, terminated, truncated, _ = env.step({a: 0 for a in env.agents})
        assert not env.agents and all(truncated.values()) and not any(terminated.values())


@pytest.mark.parametrize("winner", [1, -1, 0])
def test_hockey_pays_the_winner_truncates_draws_and_shows_each_player_its_own_side(
        stand_ins, monkeypatch, winner):
    monkeypatch.setattr(sys.modules["hockey.hockey_env"].HockeyEnv, "winner", winner)
    env, gains = make("hockey", shaping_steps=4), []
    env.reset(options={"steps": math.inf})
    assert list(env.step({a: np.zeros(4) for a in env.agents})[1].values()) == [0, 0]
    obs, _ = env.reset(seed=0, options={"steps": 0})
    while env.agents:
        np.testing.assert_allclose(obs["player_1"], -obs["player_0"])
        bots = {agent: env.play(agent, script) for agent, script in zip(env.agents, env.scripts)}
        for i, (agent, bot) in enumerate(bots.items()):
            np.testing.assert_allclose(bot[:3], [obs[agent][1] / 10, 1, 1 - i], atol=1e-6)
            assert env.action_space(agent).contains(bot)
        obs, rewards, terminated, truncated, _ = env.step(bots)
        np.testing.assert_allclose(env.game.action, [*bots["player_0"], *bots["player_1"]])
        gains.append(list(rewards.values()))
    fade = np.array([1, 0.75, 0.5])[:, None] * [-0.25, -0.5]
    np.testing.assert_allclose(gains, fade + [[0, 0], [0, 0], [10 * winner, -10 * winner]])
    assert set(terminated.values()) == {winner != 0} and set(truncated.values()) == {winner == 0}
    assert env.render().dtype == np.uint8


def test_in_hockey_a_held_action_meets_scripts_that_act_at_every_frame(stand_ins):
    env = make("hockey", repeat=2, shaping_steps=10)
    env.reset(seed=0, options={"steps": 0})
    own, frames, seen = np.full(4, 0.5), [], env.game.step
    env.game.step = lambda joint: frames.append(joint) or seen(joint)
    rewards = env.step({"player_0": own, "player_1": env.play("player_1", "weak")})[1]
    assert list(rewards.values()) == [-0.5, -1] and env.agents  # two frames of shaping
    env.game.t = 1
    obs, rewards, terminated, _, _ = env.step({"player_0": own, "player_1": own})
    fade = 0.9 * 2 * np.array([-0.25, -0.5])
    np.testing.assert_allclose(list(rewards.values()), fade + [10, -10])  # the game's third ends it
    assert all(terminated.values()) and len(frames) == 4
    np.testing.assert_allclose([frame[:4] for frame in frames], [own] * 4)
    puck = env.game.puck  # which a script sees move, and who plays by itself does not use
    script = [frame[4] for frame in frames]
    np.testing.assert_allclose(script, [-puck / 10, -(puck + 1) / 10, 0.5, 0.5], atol=1e-6)


@pytest.mark.parametrize("keep_mode,size", [(True, 18), (False, 16)])
def test_in_hockey_who_starts_is_drawn_and_alternates_from_then_on(packages, keep_mode, size):
    env, first = make("hockey", packages, keep_mode=keep_mode), set()
    place = 12 if packages == "real" else 0  # where the puck lies, from the side of player_0
    for seed in range(8):
        sides = [env.reset(seed=s)[0]["player_0"] for s in (seed, None, None, None)]
        assert sides[0].shape == (size,) == env.observation_space("player_0").shape
        for agent, script in zip(env.agents, env.scripts):
            assert env.action_space(agent).contains(env.play(agent, script))
        signs = [float(np.sign(side[place])) for side in sides]
        assert signs == [signs[0], -signs[0]] * 2
        first.add(signs[0])
    assert first == {1, -1}


def test_real_hockey_ends_by_goals_or_after_251_steps_and_nobody_keeps_the_puck():
    env = make("hockey", "real")
    obs, _ = env.reset(seed=0)
    for t in range(251):
        assert env.agents
        _, rewards, terminated, truncated, _ = env.step({a: np.zeros(4) for a in env.agents})
    assert all(truncated.values()) and not any(terminated.values()) and not any(rewards.values())
    env.game.player1_has_puck = env.game.player2_has_puck = 9  # as if they held it when time was up
    np.testing.assert_array_equal(env.reset(seed=0)[0]["player_0"], obs["player_0"])
    goals = set()
    for seed in range(12):
        env.reset(seed=seed)
        while env.agents:
            strong, weak = env.play("player_0", "strong"), env.play("player_1", "weak")
            _, rewards, terminated, _, _ = env.step({"player_0": strong, "player_1": weak})
        goals.add((rewards["player_0"], rewards["player_1"], terminated["player_0"]))
    assert (10, -10, True) in goals and goals <= {(10, -10, True), (-10, 10, True), (0, 0, False)}
