"""DreamerV3 without a decoder: what a state says about an observation is learned by decorrelation.

    python variants/decoder_free.py --env-id CartPole-v1       # takes every flag of dreamer.py

Follows R2-Dreamer (arXiv 2603.18202). The reconstruction loss is replaced: a linear map of
feat = [h, z] has to predict every number of the encoder's tokens, and numbers that differ must not
be correlated, as in Barlow Twins (arXiv 2103.03230). There is neither a decoder nor augmentation.
Weights of the loss and of its second term are those of the paper's code. Reward and continue heads
shape the representation as before.

Deviations from the paper: it learns from images; here tokens may come from vectors too. It learns
its initial state; here that is zero, as in DreamerV3.

Measured: that it runs, saves, resumes and is evaluated (test_variants.py). No learning result yet.
"""
import dataclasses
import sys
from pathlib import Path
from typing import Any

from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import dreamer
from dreamer import Tensors

@dataclasses.dataclass
class Args(dreamer.Args):
    exp_name: str = "decoder_free"  # name of the experiment, part of the run's name
    barlow_scale: float = 0.05  # weight of the loss that takes the place of the reconstruction
    redundancy: float = 5e-4  # weight of the correlations between different numbers

def barlow_loss(x: Tensor, y: Tensor, redundancy: float) -> Tensor:
    """Two descriptions (N, E) of the same N things → loss (): 0 where number i of x is perfectly
    correlated with number i of y, and with no other one (Barlow Twins, equation 1)."""
    x = (x - x.mean(0)) / (x.std(0) + 1e-8)
    y = (y - y.mean(0)) / (y.std(0) + 1e-8)
    correlation = x.T @ y / len(x)  # (E, E)
    same = correlation.diagonal()
    # Σᵢ (1 − cᵢᵢ)² + λ · Σᵢ Σ_{j≠i} cᵢⱼ²
    different = correlation.square().sum() - same.square().sum()
    return (1 - same).square().sum() + redundancy * different

class WorldModel(dreamer.WorldModel):
    def make_heads(self, feat: int, units: int) -> None:
        super().make_heads(feat, units)
        self.decoder = None
        self.projector = dreamer.Linear(feat, self.encoder.size)

    def reconstruction(self, states: Tensors, data: dict[str, Any]) -> Tensors:
        return {}

    def extra_losses(self, states: Tensors, data: dict[str, Any]) -> Tensors:
        """The loss "barlow" () over all states of a batch. As targets, tokens have no gradient:
        else the encoder could make them easy to predict."""
        feat = dreamer.features(states).flatten(0, 1)  # (B·T, D + S·C)
        tokens = states["tokens"].detach().flatten(0, 1)  # (B·T, E)
        predicted = self.projector(feat)
        return {"barlow": barlow_loss(predicted.float(), tokens.float(), self.args.redundancy)}

    def open_loop(self, data: dict[str, Any], context: int, noise: Tensor) -> Tensors:
        """Without a decoder there are no pictures of dreams."""
        return {}

class DecoderFree(dreamer.Dreamer):
    def make_world_model(self) -> WorldModel:
        return WorldModel(self.observations.specs, self.actions.size, self.args)

if __name__ == "__main__":
    dreamer.command_line(Args, DecoderFree)
