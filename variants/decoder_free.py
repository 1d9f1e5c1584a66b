"""DreamerV3 of which one flag chooses what shapes the representation; at first without a decoder.

    python variants/decoder_free.py --env-id CartPole-v1       # takes every flag of dreamer.py
    python variants/decoder_free.py --grad-heads decoder reward cont value       # plain DreamerV3
    python variants/decoder_free.py --grad-heads reward cont value               # rewards and ends
    python variants/decoder_free.py --grad-heads barlow --probe                  # see below

Heads     learn from states (h, z). Those named by --grad-heads shape the states too:

          decoder  reconstructs the observation
          barlow   describes the observation without reconstructing it
          reward   predicts the reward            ┐
          cont     predicts whether x_t is an end ├ from a detached state where they are not named
          value    the critic on replayed steps   ┘

          The last three are needed by dreams, and always exist. The first two serve nothing but the
          representation, and exist only if named. The two KL losses always shape the states, and
          with no name at all nothing else does. --probe adds the decoder where it is not named. Then
          it reads a detached state: "losses/rec" measures how much of the observation the state
          still holds, and dreams have pictures.

Barlow    follows R2-Dreamer (arXiv 2603.18202). A linear map of feat = [h, z] has to predict every
          number of the encoder's tokens, and numbers that differ must not be correlated, as in
          Barlow Twins (arXiv 2103.03230). There is neither a decoder nor augmentation. Weights of
          the loss and of its second term are those of the paper's code.

Deviations from the paper: it learns from images; here tokens may come from vectors too. It learns
its initial state; here that is zero, as in DreamerV3. With --accumulate, correlations are those of
a part of the batch, so that the update is not that of one pass.

Measured: without a decoder as good as with one in Pendulum-v1 (three seeds); in CartPole-v1 seeds
differ more (500, 479, 234; with one 500, 328, 500). Rewards and ends alone shape no state that
either can be learned from (three seeds). Tables in benchmark/README.md.
"""
import dataclasses
import sys
from pathlib import Path
from typing import Any, Literal, get_args

import torch.nn as nn
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import dreamer
from dreamer import Tensors

Head = Literal["decoder", "barlow", "reward", "cont", "value"]

@dataclasses.dataclass
class Args(dreamer.Args):
    exp_name: str = "decoder_free"  # name of the experiment, part of the run's name
    # heads whose losses shape the representation; the others read a detached state
    grad_heads: tuple[Head, ...] = ("barlow", "reward", "cont", "value")
    probe: bool = False  # keep a decoder that reads a detached state, if it is not named above
    barlow_scale: float = 0.05  # weight of the loss that takes the place of the reconstruction
    redundancy: float = 5e-4  # weight of the correlations between different numbers

    def check(self) -> None:
        super().check()
        for name in set(self.grad_heads) - set(get_args(Head)):
            raise dreamer.InputError(f"grad_heads {name!r} does not exist: choose among "
                                     f"{', '.join(get_args(Head))}")

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

def detach_inputs(head: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Called with what a head is about to read."""
    return tuple(x.detach() for x in inputs)

class WorldModel(dreamer.WorldModel):
    def make_heads(self, feat: int, units: int) -> None:
        super().make_heads(feat, units)
        named = self.args.grad_heads
        if "decoder" not in named and not self.args.probe:
            self.decoder = None
        self.projector = dreamer.Linear(feat, self.encoder.size) if "barlow" in named else None
        for name in ("decoder", "reward", "cont"):
            head = getattr(self, name)
            if head is not None and name not in named:
                head.register_forward_pre_hook(detach_inputs)

    def reconstruction(self, states: Tensors, data: dict[str, Any]) -> Tensors:
        return super().reconstruction(states, data) if self.decoder is not None else {}

    def extra_losses(self, states: Tensors, data: dict[str, Any]) -> Tensors:
        """The loss "barlow" () over all states of a batch. As targets, tokens have no gradient:
        else the encoder could make them easy to predict."""
        if self.projector is None:
            return {}
        feat = dreamer.features(states).flatten(0, 1)  # (B·T, D + S·C)
        tokens = states["tokens"].detach().flatten(0, 1)  # (B·T, E)
        predicted = self.projector(feat)
        return {"barlow": barlow_loss(predicted.float(), tokens.float(), self.args.redundancy)}

    def open_loop(self, data: dict[str, Any], context: int, noise: Tensor) -> Tensors:
        """Without a decoder there are no pictures of dreams."""
        return super().open_loop(data, context, noise) if self.decoder is not None else {}

class DecoderFree(dreamer.Dreamer):
    def make_world_model(self) -> WorldModel:
        return WorldModel(self.observations.specs, self.actions.size, self.args)

    def judge_replay(self, states: Tensors, data: dict[str, Any], returns: Tensor):
        """As in the base, from detached states where --grad-heads does not name the value."""
        if "value" not in self.args.grad_heads:
            states = {name: x.detach() for name, x in states.items()}
        return super().judge_replay(states, data, returns)

if __name__ == "__main__":
    dreamer.command_line(Args, DecoderFree)
