"""What --grad-heads of decoder_free.py lets through: gradients, name by name, and nothing else."""
import sys
from pathlib import Path

import pytest
import torch
from gymnasium.spaces import Box, Discrete

sys.path.insert(0, str(Path(__file__).resolve().parent))
import decoder_free
from test_variants import batch_of, make_agent, tiny  # noqa: F401, the fixture gives a tiny size

import dreamer

LOSSES = {"decoder": "rec", "barlow": "barlow", "reward": "rew", "cont": "con", "value": "repval"}
CHOICES = [(), *zip(LOSSES), tuple(LOSSES)]  # none, each alone, all

def losses_of(agent):
    """The losses of the heads, each (), of a random batch."""
    data = agent.training_data(batch_of(agent))
    states = agent.wm.observe(data, agent.learning_noise(data)["posterior"])
    losses, _ = agent.wm.losses(states, data)
    b, t = data["reward"].shape
    returns = torch.randn(b * t, 5)
    losses["repval"], _ = agent.judge_replay(states, data, returns)
    return {name: x.mean() for name, x in losses.items()}

def shaped(agent, loss):
    """Does the loss move the encoder? And the recurrence?"""
    parts = agent.wm.encoder.mlp[0][0].weight, agent.wm.rssm.gates.weight
    gradients = torch.autograd.grad(loss, parts, retain_graph=True, allow_unused=True)
    reached = {g is not None and bool(g.abs().sum() > 0) for g in gradients}
    assert len(reached) == 1  # both or none
    return reached.pop()

@pytest.mark.parametrize("probe", [False, True])
def test_the_loss_of_a_head_reaches_encoder_and_recurrence_exactly_if_the_head_is_named(probe):
    for named in CHOICES:
        losses = losses_of(agent := make_agent("decoder_free", grad_heads=named, probe=probe))
        exist = set(named) | {"reward", "cont", "value"} | ({"decoder"} if probe else set())
        assert {head for head, loss in LOSSES.items() if loss in losses} == exist
        for head in exist:
            assert shaped(agent, losses[LOSSES[head]]) == (head in named), (named, head)
        assert shaped(agent, losses["rep"])  # the KL shapes always

def test_a_head_that_is_not_named_learns_all_the_same():
    agent = make_agent("decoder_free", grad_heads=(), probe=True)
    losses = losses_of(agent)
    heads = {"rec": agent.wm.decoder, "rew": agent.wm.reward, "con": agent.wm.cont,
             "repval": agent.critic}
    for name, head in heads.items():
        gradients = torch.autograd.grad(losses[name], list(head.parameters()), retain_graph=True)
        assert any(g.abs().sum() > 0 for g in gradients), name

@pytest.mark.parametrize("space", [Box(-1, 1, (3,)), Box(0, 255, (48, 48, 3), "uint8")])
def test_with_a_decoder_in_place_of_barlow_it_is_dreamerv3_bit_by_bit(space):
    ours = make_agent("decoder_free", space, grad_heads=("decoder", "reward", "cont", "value"))
    base = dreamer.Dreamer(space, Discrete(4), ours.args)
    base.load_state_dict(ours.state_dict())
    batch = batch_of(ours)
    for _ in range(2):
        metrics, latents = ours.update(batch)
        same_metrics, same_latents = base.update(batch)
        assert metrics.keys() == same_metrics.keys()
        assert all(torch.equal(metrics[k], same_metrics[k]) for k in metrics)
        assert all(torch.equal(latents[k], same_latents[k]) for k in latents)
    assert all(map(torch.equal, ours.parameters(), base.parameters()))

def test_the_probe_changes_nothing_that_it_looks_at():
    without = make_agent("decoder_free")
    probed = make_agent("decoder_free", probe=True)
    start = {k: p.clone() for k, p in probed.named_parameters()}
    with torch.no_grad():
        for name, p in without.named_parameters():
            p.copy_(start[name])
    batch = batch_of(without)
    for _ in range(2):
        without.update(batch)
        metrics, _ = probed.update(batch)
    assert metrics["losses/rec"] > 0
    after = dict(probed.named_parameters())
    for name, p in without.named_parameters():
        assert torch.equal(p, after[name]), name
    moved = [k for k in after if "decoder" in k and not torch.equal(after[k], start[k])]
    assert moved  # while the decoder learns

def test_only_a_decoder_has_pictures_of_dreams():
    for values, expected in ((dict(), set()), (dict(probe=True), {"obs"}),
                             (dict(grad_heads=("decoder",)), {"obs"})):
        agent = make_agent("decoder_free", **values)
        data = agent.training_data(batch_of(agent))
        pictures = agent.wm.open_loop(data, 5, agent.learning_noise(data)["posterior"])
        assert set(pictures) == expected

def test_the_command_line_takes_any_number_of_names_and_refuses_others(capsys):
    def parse(*words):
        return dreamer.parse_args(["--env-id", "CartPole-v1", *words], decoder_free.Args)

    assert parse().grad_heads == ("barlow", "reward", "cont", "value")
    assert parse("--grad-heads", "decoder", "cont").grad_heads == ("decoder", "cont")
    assert parse("--grad-heads").grad_heads == ()
    with pytest.raises(SystemExit) as end:
        parse("--grad-heads", "rewards")
    assert end.value.code == 2
    with pytest.raises(dreamer.InputError, match="'rewards' does not exist: choose among decoder"):
        make_agent("decoder_free", grad_heads=("rewards",))
    with pytest.raises(dreamer.InputError, match="gamma"):  # the base's checks are made too
        make_agent("decoder_free", gamma=2.0)
