"""Environments for several agents that no package brings ready, each in a module that stands alone.

    from games import prisoners_dilemma

    env = prisoners_dilemma.parallel_env(q=0.5)
    observations, infos = env.reset(seed=1)
    while env.agents:
        actions = {agent: env.action_space(agent).sample() for agent in env.agents}
        observations, rewards, terminations, truncations, infos = env.step(actions)

`tetris` is for one player, and registers Gymnasium ids: see its docstring. Every other module has a
function `parallel_env(**kwargs)`, which returns an environment with the methods and attributes of a
PettingZoo `ParallelEnv`; PettingZoo itself is not needed. All agents stay until the episode ends,
and `agents` is empty from then on. `reset(seed)` fixes all that happens after it, the scripted
policies included; `reset()` goes on with the same stream of random numbers.

Beyond a ParallelEnv an environment may offer the following. A user has to ask for each with
`getattr` or `hasattr`.

    scripts               names of the policies that come with the environment
    unusual               those of them that are met only if asked for by name
    play(agent, script)   the action that such a policy takes now in the place of `agent`; call it
                          at most once a step for an agent, because a policy may have a memory
    bayes(agent, scripts) probabilities (A,) of the next action of `agent` to an ideal observer of
                          all actions so far, who knows that `agent` plays one of `scripts`, each
                          equally likely at first; None where no script explains what it did
    bayes_return(scripts) what an ideal observer earns in an episode, on average over these scripts;
                          None where that is not known
    reset(options={"steps": n})
                          where a part of the reward fades, n tells how many steps this environment
                          has made in earlier runs; `math.inf` leaves that part out

Errors: a missing package is an ImportError that says what to install, a value that cannot be used
is a ValueError, an unknown keyword is a TypeError, an unknown script is a KeyError.
"""
