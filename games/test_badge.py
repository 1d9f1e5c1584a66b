"""The badge's exact values against enumeration and play, and a crowd that tells nothing."""
import itertools
from fractions import Fraction

import numpy as np
import pytest
from gymnasium.spaces import Box, Dict, Discrete

from games import badge

EPISODES = 400


@pytest.fixture(scope="module")
def played():
    """name → (EPISODES · 10, …) of the default game, with the script in the second seat and the
    first seat playing anything."""
    env, rng, rows = badge.parallel_env(), np.random.default_rng(5), []
    for episode in range(EPISODES):
        obs, _ = env.reset(seed=7 if episode == 0 else None)
        for _ in range(10):
            joint = {"player_0": rng.integers(4), "player_1": env.play("player_1", "badge")}
            row = {"badge": obs["player_0"]["badge"], "mine": obs["player_0"]["crowd"],
                   "yours": obs["player_1"]["crowd"], "joint": list(joint.values()),
                   "bayes": env.bayes("player_1", env.scripts)}
            assert obs["player_1"]["badge"] == row["badge"], "both see the same badge"
            obs, rewards, *_ = env.step(joint)
            rows.append(row | {"reward": list(rewards.values())})
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def expected_reward(policy, actions, epsilon):
    """Of a step, exactly, for policy: badge → action, summed over all that may be drawn: the badge,
    whether the script goes by it, and what it draws if it does not."""
    total = Fraction(0)
    for theta, drawn in itertools.product(range(actions), repeat=2):
        total += (1 - epsilon) * (policy[theta] == theta) + epsilon * (policy[theta] == drawn)
    return total / actions**2


@pytest.mark.parametrize("actions,length,epsilon", [(4, 10, Fraction(3, 10)), (2, 3, Fraction(1)),
                                                    (3, 1, Fraction(0)), (3, 7, Fraction(2, 3))])
def test_the_best_of_all_policies_earns_the_bayes_return_and_all_blind_ones_t_over_k(
        actions, length, epsilon):
    env = badge.parallel_env(actions=actions, length=length, epsilon=float(epsilon))
    policies = itertools.product(range(actions), repeat=actions)
    values = {policy: length * expected_reward(policy, actions, epsilon) for policy in policies}
    assert float(max(values.values())) == pytest.approx(env.bayes_return(env.scripts), abs=1e-12)
    for action in range(actions):
        assert values[(action,) * actions] == Fraction(length, actions)
    if (actions, length) == (4, 10):
        assert max(values.values()) == values[0, 1, 2, 3] == Fraction(775, 100)


def test_played_games_earn_7_75_by_the_badge_and_2_5_without_it(played):
    match = played["joint"][:, :1] == played["joint"][:, 1:]
    np.testing.assert_array_equal(played["reward"], np.repeat(match, 2, 1).astype(float))
    by_badge = 10 * (played["badge"] == played["joint"][:, 1]).mean()
    assert abs(by_badge - 7.75) < 4 * 10 * (0.775 * 0.225 / len(match)) ** 0.5
    for blind in (played["joint"][:, 0], 0, 3):
        mean = 10 * (blind == played["joint"][:, 1]).mean()
        assert abs(mean - 2.5) < 4 * 10 * (0.25 * 0.75 / len(match)) ** 0.5


def test_the_partner_costs_0_780_nats_to_who_sees_the_badge_and_1_386_to_who_does_not(played):
    did = played["joint"][:, 1]
    nats = -np.log(played["bayes"][np.arange(len(did)), did])
    assert abs(nats.mean() - 0.780) < 4 * nats.std() / len(nats) ** 0.5
    share = np.bincount(did, minlength=4) / len(did)
    assert abs(-(share * np.log(share)).sum() - 1.386) < 0.005
    p, q = 0.3 / 4, 0.7 + 0.3 / 4
    assert -q * np.log(q) - 3 * p * np.log(p) == pytest.approx(0.780, abs=5e-4)


@pytest.mark.parametrize("actions,epsilon", [(4, 0.3), (4, 0.0), (3, 1), (2, 0.5)])
@pytest.mark.parametrize("agent", ["player_0", "player_1"])
def test_the_script_plays_the_badge_on_show_as_often_as_the_ideal_observer_expects(
        agent, actions, epsilon):
    env = badge.parallel_env(actions=actions, epsilon=epsilon, crowd=0, length=1)
    counts, expected = np.zeros((2, actions, actions))
    obs, _ = env.reset(seed=1)
    for _ in range(4000):
        seen = obs[agent]["badge"]
        expected[seen] = env.bayes(agent, env.scripts)
        counts[seen, env.play(agent, "badge")] += 1
        obs, _ = env.reset()
    np.testing.assert_allclose(expected.sum(1), 1)
    total = counts.sum(1, keepdims=True)
    assert abs(total / 4000 - 1 / actions).max() < 0.03, "badges are equally likely"
    spread = (expected * (1 - expected) / total) ** 0.5
    assert (abs(counts / total - expected) <= 4 * spread).all()


def test_the_crowd_is_of_independent_signs_that_tell_of_nothing(played):
    crowds = played["mine"], played["yours"]
    n = len(played["badge"])
    for crowd in crowds:
        assert crowd.shape == (n, 96) and set(np.unique(crowd)) == {-10.0, 10.0}
    signs = np.concatenate(crowds, 1) / 10
    bound = 5.5 / n**0.5  # standard errors: among 60,000 correlations, none by chance
    assert abs(signs.mean(0)).max() < bound
    between = signs.T @ signs / n - np.eye(192)  # of all numbers of both players
    later = signs[1:].T @ signs[:-1] / n
    choices = np.concatenate([np.eye(4)[played["badge"]], np.eye(4)[played["joint"][:, 1]]], 1)
    choices = (choices - choices.mean(0)) / choices.std(0)
    with_choices = signs.T @ choices / n
    earlier_badge = choices[1:].T @ choices[:-1] / n
    for correlations in (between, later, with_choices, earlier_badge):
        assert abs(correlations).max() < bound


@pytest.mark.parametrize("actions,length,crowd", [(4, 10, 96), (3, 1, 1), (2, 4, 0)])
def test_it_keeps_the_contract_of_a_parallel_env_and_its_spaces(actions, length, crowd):
    env = badge.parallel_env(actions=actions, length=length, crowd=crowd)
    seen = {"badge": Discrete(actions)}
    if crowd:
        seen["crowd"] = Box(-10, 10, (crowd,), np.float32)
    for _ in range(3):
        obs, infos = env.reset()
        assert env.agents == env.possible_agents == list(infos)
        for t in range(length):
            for agent in env.agents:
                assert env.observation_space(agent) is env.observation_space(agent)
                assert env.observation_space(agent) == Dict(seen)
                assert env.action_space(agent) is env.action_space(agent)
                assert env.action_space(agent) == Discrete(actions)
                assert env.observation_space(agent).contains(obs[agent])
            actions_now = {agent: env.action_space(agent).sample() for agent in env.agents}
            obs, rewards, over, late, infos = env.step(actions_now)
            for part in (obs, rewards, over, late, infos):
                assert list(part) == env.possible_agents
            assert {type(reward) for reward in rewards.values()} == {float}
            assert set(over.values()) == {t == length - 1} and set(late.values()) == {False}
        assert env.agents == [] and env.observation_space("player_0").contains(obs["player_0"])
    env.close()


def test_it_passes_pettingzoos_own_test():
    pytest.importorskip("pettingzoo.test").parallel_api_test(badge.parallel_env(), 300)


def test_a_seed_fixes_all_that_happens_and_nothing_else_is_drawn_from():
    def trace(env, seed):
        obs, rows = env.reset(seed=seed)[0], []
        for _ in range(30):
            played = {agent: env.play(agent, "badge") for agent in env.possible_agents}
            rows += [obs["player_0"]["crowd"], obs["player_1"]["crowd"],
                     [obs["player_0"]["badge"], *played.values()]]
            obs = env.step(played)[0] if env.agents else env.reset()[0]
        return np.concatenate(rows)

    env = badge.parallel_env(length=5)
    np.random.seed(1)
    first = trace(env, 3)
    assert np.random.random() == np.random.RandomState(1).random()
    np.testing.assert_array_equal(first, trace(env, 3))
    np.testing.assert_array_equal(first, trace(badge.parallel_env(length=5), 3))
    assert (first != trace(env, 4)).any()


@pytest.mark.parametrize("kwargs,message", [
    ({"actions": 1}, "actions 1 must be a whole number, 2 or more"),
    ({"actions": "four"}, "actions 'four' must"), ({"length": 0}, "length 0 must .* 1 or more"),
    ({"length": 2.5}, "length 2.5 must"), ({"crowd": -1}, "crowd -1 must .* 0 or more"),
    ({"crowd": True}, "crowd True must"), ({"epsilon": 1.1}, "epsilon 1.1 must be a probability"),
    ({"epsilon": -0.1}, "epsilon -0.1 must"), ({"epsilon": "x"}, "epsilon 'x' must"),
    ({"epsilon": float("nan")}, "epsilon nan must"), ({"render_mode": "rgb_array"}, "no frames")])
def test_an_unusable_value_is_refused_in_one_sentence_that_names_it(kwargs, message):
    with pytest.raises(ValueError, match=f"games.badge.*{message}") as error:
        badge.parallel_env(**kwargs)
    assert "\n" not in str(error.value)


def test_an_unknown_keyword_is_a_type_error_and_an_unknown_script_a_key_error():
    with pytest.raises(TypeError, match="no_such_keyword"):
        badge.parallel_env(no_such_keyword=1)
    env = badge.parallel_env()
    env.reset()
    with pytest.raises(KeyError, match="no_such_script"):
        env.play("player_0", "no_such_script")
