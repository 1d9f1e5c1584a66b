"""dreamer.py with the encoder and decoder of vectors that the published runs from vectors had: five layers of 1024
units, whatever the size of the rest. Flags are those of dreamer.py.

    PYTHONPATH=benchmark python benchmark/wide.py --env-id repeat2:dm_control/reacher-easy-repeat2-v0 …

Their author says so in https://github.com/danijar/dreamerv3/issues/86.
"""
import sys
from pathlib import Path

from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import dreamer  # noqa: E402

UNITS, LAYERS = 1024, 5


class Encoder(dreamer.Encoder):
    def __init__(self, specs, size):
        super().__init__(specs, size)
        self.mlp = dreamer.MLP(sum(specs[name].width for name in self.vectors), UNITS, LAYERS)
        self.size += UNITS - size.units


class Decoder(dreamer.Decoder):
    def __init__(self, encoder, stoch, size):
        super().__init__(encoder, stoch, size)
        self.mlp = dreamer.MLP(size.deter + stoch, UNITS, LAYERS)
        self.outputs = nn.ModuleList([dreamer.Linear(UNITS, self.specs[name].width) for name in self.vectors])


dreamer.Encoder, dreamer.Decoder = Encoder, Decoder

if __name__ == "__main__":
    dreamer.command_line()
