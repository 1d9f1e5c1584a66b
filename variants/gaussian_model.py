"""DreamerV3 with an older world model: Gaussian latents and rewards, and a GRU or LSTM.

    python variants/gaussian_model.py --env-id CartPole-v1       # takes every flag of dreamer.py

The model is that of PlaNet (arXiv 1811.04551), with which DreamerV1 dreams (dreamer_v1.py): z is a
Gaussian with as many dimensions as dreamer.py has categoricals; h is the state of torch's GRU, or
output and cell of its LSTM, together twice as wide; a reward is the mean of a Gaussian of variance
1, so its loss is a squared error. All else is DreamerV3.

Deviations from the paper: layers, encoder, decoder and the KL losses are those of dreamer.py.

Measured: that each part computes what it should (test_dreamer_v1.py). No learning result.
"""
import dataclasses
import sys
from pathlib import Path
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import dreamer

@dataclasses.dataclass
class Args(dreamer.Args):
    exp_name: str = "gaussian_model"  # name of the experiment, part of the run's name
    core: Literal["gru", "lstm"] = "gru"  # the recurrent network

class Gaussian(dreamer.Normal):
    """S Gaussians (…, S, 1). A sample carries the gradient of mean and deviation."""
    def kl(self, other: "Gaussian") -> Tensor:
        """KL(self ‖ other), in nats (…, S)."""
        ratio = (self.std / other.std).square()
        distance = ((self.mean - other.mean) / other.std).square()
        # ½ · (σ₁²/σ₂² + (μ₁ − μ₂)²/σ₂² − 1 − ln(σ₁²/σ₂²))
        return 0.5 * (ratio + distance - 1 - ratio.log()).sum(-1)

class Number(dreamer.Normal):
    """A number (…), predicted as the mean (…, 1) of a Gaussian."""
    def pred(self) -> Tensor:
        return self.mean[..., 0]

    def loss(self, *targets: Tensor) -> Tensor:
        """Sum of −ln p(target) (…)."""
        return -sum(self.log_prob(target[..., None]) for target in targets)

class NumberHead(dreamer.MLP):
    """feat → Number of variance 1. It begins by predicting 0."""
    def __init__(self, inputs: int, units: int, layers: int):
        super().__init__(inputs, units, layers, outputs=1, outscale=0.0)

    def forward(self, feat: Tensor) -> Number:
        mean = super().forward(feat)
        return Number(mean, torch.ones_like(mean))

class RSSM(dreamer.RSSM):
    """h_t = GRU(h_{t-1}, [z_{t-1}, a_{t-1}]). z has S dimensions, z and a each a layer of their own
    in front of the GRU."""
    def __init__(self, tokens: int, actions: int, size: dreamer.Size, core: str):
        super().__init__(tokens, actions, size)
        for name in ("deter_in", "hidden", "hidden_norm", "gates"):  # of the block GRU
            delattr(self, name)
        if core == "lstm":
            self.cell = nn.LSTMCell(2 * size.hidden, size.deter // 2)
        else:
            self.cell = nn.GRUCell(2 * size.hidden, size.deter)

    def latent_shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        return (self.size.latents, 1), (self.size.latents, 2)

    def latent(self, logits: Tensor) -> Gaussian:
        """(…, S, 2), means and raw deviations → distribution of z, of a deviation above 0.1."""
        return Gaussian(logits[..., :1], F.softplus(logits[..., 1:]) + 0.1)

    def latent_spec(self) -> tuple[tuple[int, ...], torch.dtype]:
        return (self.size.latents,), torch.float32

    def pack(self, stoch: Tensor) -> Tensor:
        """(…, S, 1) → (…, S), for the replay."""
        return stoch[..., 0]

    def unpack(self, stored: Tensor) -> Tensor:
        return stored[..., None]

    def sequence(self, deter: Tensor, stoch: Tensor, action: Tensor) -> Tensor:
        x = torch.cat([self.stoch_in(stoch.flatten(1)), action], -1)  # (B, 2 · hidden)
        if isinstance(self.cell, nn.LSTMCell):
            return torch.cat(self.cell(x, deter.chunk(2, -1)), -1)
        return self.cell(x, deter)

class WorldModel(dreamer.WorldModel):
    def make_rssm(self, tokens: int, actions: int) -> RSSM:
        if self.args.core == "lstm":
            self.size = self.size._replace(deter=2 * self.size.deter)
        return RSSM(tokens, actions, self.size, self.args.core)

    def make_heads(self, feat: int, units: int) -> None:
        super().make_heads(feat, units)
        self.reward = NumberHead(feat, units, layers=1)

class GaussianDreamer(dreamer.Dreamer):
    def make_world_model(self) -> WorldModel:
        return WorldModel(self.observations.specs, self.actions.size, self.args)

if __name__ == "__main__":
    dreamer.command_line(Args, GaussianDreamer)
