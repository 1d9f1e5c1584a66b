"""What all games have in common, and the known values of the prisoner's dilemma. A test that takes
`packages` runs with the stand-ins of conftest.py and with the packages that are installed."""
import sys

import numpy as np
import pytest

from games.conftest import PACKAGES, make

GAMES = ["prisoners_dilemma", "overcooked", "foraging", "hockey"]


def trace(env, steps):
    """(steps, …) what is played, seen and earned; scripts play by turns, or action 5 is taken."""
    rows, scripts = [], getattr(env, "scripts", ())
    for t in range(steps):
        if not env.agents:
            env.reset()
        actions = dict.fromkeys(env.agents, 5)
        for i, agent in enumerate(env.agents if scripts else ()):
            actions[agent] = env.play(agent, scripts[(i + t // 20) % len(scripts)])
        obs, rewards, *flags, _ = env.step(actions)
        parts = [x for part in (actions, obs, rewards, *flags) for x in part.values()]
        rows.append(np.concatenate([np.ravel(x) for x in parts]).astype(float))
    return np.array(rows)


# ------------------------------------------------------------------------------------ every game


@pytest.mark.parametrize("name", GAMES)
def test_every_game_keeps_the_contract_of_a_parallel_env(packages, name):
    env = make(name, packages)
    for _ in range(3):
        obs, infos = env.reset()
        assert env.agents == env.possible_agents and list(infos) == env.possible_agents
        while env.agents:
            for agent in env.agents:
                assert env.observation_space(agent) is env.observation_space(agent)
                assert env.action_space(agent) is env.action_space(agent)
                assert env.observation_space(agent).contains(obs[agent])
            actions = {agent: env.action_space(agent).sample() for agent in env.agents}
            obs, rewards, terminated, truncated, infos = env.step(actions)
            for part in (obs, rewards, terminated, truncated, infos):
                assert list(part) == env.possible_agents
            assert {type(reward) for reward in rewards.values()} == {float}
            ends = [terminated[a] + truncated[a] for a in env.possible_agents]
            assert ends == [0 if env.agents else 1] * len(ends)
    env.close()


@pytest.mark.parametrize("name", GAMES)
@pytest.mark.filterwarnings("error")
def test_every_game_passes_pettingzoos_own_test(packages, name):
    pytest.importorskip("pettingzoo.test").parallel_api_test(make(name, packages), 300)


@pytest.mark.parametrize("name", GAMES)
def test_a_seed_fixes_the_game_and_its_scripts_and_nothing_else_is_drawn_from(packages, name):
    kwargs, runs = {"q": 0.5} if name == "prisoners_dilemma" else {}, []
    env, used = make(name, packages, **kwargs), make(name, packages, **kwargs)
    used.reset(seed=9)
    trace(used, 3)
    for env, seed, state in ((env, 3, 1), (used, 3, 2), (env, 4, 1)):
        np.random.seed(state)
        env.reset(seed=seed)
        runs.append(trace(env, 450 if packages == "real" else 60))
        assert np.random.random() == np.random.RandomState(state).random()
    np.testing.assert_array_equal(runs[0], runs[1])
    assert packages == "stand-in" and name == "foraging" or (runs[0] != runs[2]).any()


@pytest.mark.parametrize("name,kwargs,message", [
    ("prisoners_dilemma", {"q": 1.1}, "q 1.1"), ("prisoners_dilemma", {"q": -1}, "q -1"),
    ("prisoners_dilemma", {"length": 0}, "length 0"), ("overcooked", {"encoding": "x"}, "lossless"),
    ("overcooked", {"layout": "x"}, "'x'.* cramped_room"),
    ("overcooked", {"layout": "crowd"}, "two"), ("overcooked", {"layout": "tomato"}, "onion"),
    ("prisoners_dilemma", {"q": "1"}, "q '1'"), ("prisoners_dilemma", {"length": 2.5}, "length 2.5"),
    ("overcooked", {"horizon": 0}, "horizon 0"),
    ("overcooked", {"shaping_steps": -1}, "shaping_steps -1"),
    ("foraging", {"env_id": "x"}, "'x'.*Foraging-8x8"), ("foraging", {"penalty": -1}, "negative"),
    ("foraging", {"env_id": "CartPole-v1"}, "another game"),
    ("hockey", {"shaping_steps": -1}, "shaping_steps -1"), ("hockey", {"repeat": 0}, "repeat 0"),
    ("hockey", {"repeat": 2.5}, "repeat 2.5"),
    ("hockey", {"render_mode": "x"}, "'x'"),
    *((name, {"render_mode": "rgb_array"}, "no frames") for name in GAMES if name != "hockey")])
def test_an_unusable_value_is_a_value_error_that_names_it(stand_ins, name, kwargs, message):
    with pytest.raises(ValueError, match=message):
        make(name, **kwargs)


@pytest.mark.parametrize("name", GAMES)
def test_an_unknown_keyword_is_a_type_error_and_an_unknown_script_a_key_error(packages, name):
    with pytest.raises(TypeError, match="no_such_keyword"):
        make(name, packages, no_such_keyword=1)
    env = make(name, packages)
    env.reset()
    if name != "foraging":
        with pytest.raises(KeyError, match="no_such_script"):
            env.play(env.possible_agents[0], "no_such_script")


@pytest.mark.parametrize("name,line", [
    ("overcooked", "pip install overcooked-ai==1.1.0 scipy"),
    ("foraging", "pip install lbforaging==2.0.0"), ("hockey", "pip install Box2D==2.3.10 pygame")])
def test_a_missing_package_is_an_import_error_that_says_what_to_install(monkeypatch, name, line):
    monkeypatch.setitem(sys.modules, PACKAGES[name], None)
    with pytest.raises(ImportError, match=f"games.{name} needs .*: {line}"):
        make(name)


# ------------------------------------------------------------------------- the prisoner's dilemma


def theirs(script, mine, t):
    """The definition of the scripts: their move in round t against the moves `mine` before it."""
    tit_for_tat = mine[t - 1] if t else 0
    return {"cooperate": 0, "defect": 1, "tit_for_tat": tit_for_tat, "alternate": t % 2}[script]


def test_best_responses_earn_30_5_if_told_the_type_29_25_if_not_and_26_without_memory():
    env, played = make("prisoners_dilemma"), {}
    plans = [tuple(plan >> t & 1 for t in range(10)) for plan in range(2**10)]
    for script in env.scripts:
        for plan in plans:
            env.reset()
            moves, gains = [], []
            for action in plan:
                moves.append(env.play("player_1", script))
                gains.append(env.step({"player_0": action, "player_1": moves[-1]})[1]["player_0"])
            played[script, plan] = moves, gains
    best = {script: max(sum(played[script, plan][1]) for plan in plans) for script in env.scripts}
    assert best == {"cooperate": 50, "defect": 10, "tit_for_tat": 32, "alternate": 30}
    assert np.mean(list(best.values())) == 30.5

    def value(scripts, plan):
        """Best sum over `scripts` of what is still to be earned after the actions of `plan`."""
        t, options = len(plan), []
        for action in (0, 1) if t < 10 else ():
            longer = (*plan, action)
            runs = {s: played[s, longer + (0,) * (9 - t)] for s in scripts}
            groups = [[s for s in scripts if runs[s][0][t] == move] for move in (0, 1)]
            now = sum(gains[t] for _, gains in runs.values())
            options.append(now + sum(value(group, longer) for group in groups if group))
        return max(options, default=0)

    assert value(env.scripts, ()) / 4 == 29.25
    assert max(sum(sum(played[s, (a,) * 10][1]) for s in env.scripts) / 4 for a in (0, 1)) == 26.0


@pytest.mark.parametrize("agent,other", [("player_0", "player_1"), ("player_1", "player_0")])
def test_scripts_play_as_defined_and_the_ideal_observer_weighs_those_that_fit_so_far(agent, other):
    env, rng = make("prisoners_dilemma"), np.random.default_rng(3)
    for script in env.scripts * 3:
        env.reset()
        mine, seen = rng.integers(2, size=10).tolist(), []
        for t in range(10):
            fits = [s for s in env.scripts if [theirs(s, mine, u) for u in range(t)] == seen]
            share = np.mean([theirs(s, mine, t) for s in fits])
            np.testing.assert_allclose(env.bayes(agent, env.scripts), [1 - share, share])
            seen.append(env.play(agent, script))
            assert seen[-1] == theirs(script, mine, t)
            env.step({agent: seen[-1], other: mine[t]})
    env.reset()
    env.step({agent: 1, other: 0})
    assert env.bayes(agent, ("cooperate", "alternate")) is None  # nobody but "defect" begins so


@pytest.mark.parametrize("q,length", [(0.0, 10), (0.4, 3), (1.0, 1)])
def test_the_last_action_is_shown_with_probability_q_and_the_last_round_terminates(q, length):
    env, rng, shown = make("prisoners_dilemma", q=q, length=length), np.random.default_rng(0), []
    env.reset(seed=1)
    for _ in range(2000 // length):
        assert env.reset()[0] == {"player_0": 2, "player_1": 2}
        for t in range(length):
            mine, others = rng.integers(2, size=2)
            obs, _, over, late, _ = env.step({"player_0": mine, "player_1": others})
            assert obs["player_0"] in (2, others) and obs["player_1"] in (2, mine)
            shown.append([x != 2 for x in obs.values()])
            assert set(over.values()) == {t == length - 1} and set(late.values()) == {False}
    assert abs(np.mean(shown) - q) < 0.05
    assert abs(np.mean(np.all(shown, 1)) - q * q) < 0.05  # for each player alone
