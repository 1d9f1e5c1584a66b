"""A variational autoencoder (VAE): latents that say what is on an image, learned from images alone.

    python variants/vae.py                                   # CarRacing-v3, minutes on a CPU
    python variants/vae.py --env-id CartPole-v1 --pixels     # rendered frames
    python variants/vae.py --evaluate runs/CarRacing-v3__…   # test a saved one

Follows "Auto-Encoding Variational Bayes" (arXiv 1312.6114), with the CNN of dreamer.py.

Symbols   x image (H, W, C) in [0, 1], of n numbers · z, μ, σ, ε (L,) · N images
Model     An image is made in two steps: z ~ p(z) = N(0, I), then x ~ p(x | z) = N(x̂(z), I/2).
          The encoder infers the way back: q(z | x) = N(μ(x), σ(x)²), with noise ε ~ N(0, I):
              x ──▶ encoder ──▶ μ, σ ──▶ z = μ + σ·ε ──▶ decoder ──▶ x̂

ELBO      The images should be likely. But p(x) = ∫ p(x | z) p(z) dz runs over all latents, hardly
          any of which could have made x; the encoder knows where to look. For any q

              ln p(x) = E_q[ln p(x | z)] − KL(q(z | x) ‖ p(z)) + KL(q(z | x) ‖ p(z | x)).

          The last term cannot be computed, but it is never negative: the others are a lower bound
          of ln p(x), the ELBO. Raising it makes x likelier, or q more like p(z | x). The losses are
          its two terms, negated. rec asks z to say much about x; kl is the price of what it says.
              rec = ‖x − x̂‖²                       = −ln p(x | z) − n/2 · ln π
              kl  = ½ · Σᵢ (μᵢ² + σᵢ² − 1 − ln σᵢ²) = KL(q(z | x) ‖ p(z)), in nats

Gradient  z = μ + σ·ε is a sample of q, and a smooth function of μ and σ: so the gradient of rec
          reaches the encoder (reparameterisation).
Dreamer   has a VAE at every step of time. Its prior is learned and remembers: p(z | h). DreamerV1's
          z is Gaussian; DreamerV3's is categorical, with straight-through gradients.

It is no agent: its loop is its own, and not resumed. Measured: CarRacing-v3, 1,500 images, 6 epochs
(80 s): rec falls from 964.5 to 49.5 and kl from 81.8 to 5.7, on images that were not learned from.
"""
import dataclasses
import sys
import time
from pathlib import Path

import torch
import tyro
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import dreamer

@dataclasses.dataclass
class Args:
    env_id: str = "CarRacing-v3"  # Gymnasium id of an environment with images
    pixels: bool = False  # take rendered frames for images
    seed: int = 1  # seed of everything random
    evaluate: str = ""  # folder of a run to test, with the arguments that it had
    total_timesteps: int = 4_000  # images to learn from; a tenth as many others are for testing
    latents: int = 32  # L, numbers in z
    batch_size: int = 32  # images in a batch
    epochs: int = 10  # passes over the images
    learning_rate: float = 1e-3  # step size of Adam

class VAE(torch.nn.Module):
    """Images x are (N, H, W, C) bytes; networks and losses take x / 255."""
    def __init__(self, shape: tuple[int, int, int], latents: int, size: dreamer.Size):
        super().__init__()
        self.size = size._replace(deter=size.blocks)  # the smallest h, see `decode`
        self.encoder = dreamer.Encoder({"x": dreamer.ObsSpec("image", shape, shape[2])}, self.size)
        self.posterior = dreamer.Linear(self.encoder.size, 2 * latents)
        self.decoder = dreamer.Decoder(self.encoder, latents, self.size)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x → μ and ln σ, each (N, L)."""
        return self.posterior(self.encoder({"x": x})).chunk(2, -1)

    def decode(self, z: Tensor) -> Tensor:
        """z (N, L) → x̂ (N, H, W, C). Dreamer's decoder reads a memory h too. Here it is zeros."""
        return self.decoder(z.new_zeros(len(z), self.size.deter), z)["x"]

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """x, ε (N, L) → the losses rec and kl, each (N,)."""
        mean, log_std = self.encode(x)
        z = mean + log_std.exp() * noise
        rec = (x / 255 - self.decode(z)).square().flatten(1).sum(1)
        kl = 0.5 * (mean.square() + (2 * log_std).exp() - 1 - 2 * log_std).sum(1)
        return rec, kl

def collect(args: dreamer.Args, frames: int, purpose: str) -> Tensor:
    """Bytes (frames, H, W, C) that a random agent sees; each purpose has a seed of its own."""
    seed, = dreamer.derive_seeds(args.seed, purpose)
    env = dreamer.make_vector_env(args, 1, "", [seed])
    codec = dreamer.ObservationCodec(env.single_observation_space, args.image_size)
    images = [name for name, spec in codec.specs.items() if spec.kind == "image"]
    if not images:
        raise dreamer.InputError(f"{args.env_id} has no images: add --pixels for rendered frames")
    env.action_space.seed(seed)
    obs, _ = env.reset(seed=seed)
    x = []
    for t in range(frames):
        x.append(torch.from_numpy(codec(obs)[images[0]]))  # (1, H, W, C)
        if t % 8 == 0:  # an action is kept for a while, so that it leads somewhere
            action = env.action_space.sample()
        obs, *_ = env.step(action)
    env.close()
    return torch.cat(x)

@torch.no_grad()
def report(vae: VAE, x: Tensor, noise: Tensor, writer: SummaryWriter, epoch: int) -> None:
    """Logs the mean losses of images x. Draws M of them, x̂(μ) below each, and below that x̂(ε)."""
    for name, loss in zip(("rec", "kl"), vae(x, noise)):
        print(f"epoch {epoch}: {name} {loss.mean():.2f}")
        writer.add_scalar(f"losses/{name}", loss.mean(), epoch)
    x = x[:: len(x) // 10]
    mean, _ = vae.encode(x)
    rows = torch.stack([x / 255, vae.decode(mean), vae.decode(noise[: len(x)])])  # (3, M, H, W, C)
    rows = rows[..., [0, 1, 2] if x.shape[-1] >= 3 else [0, 0, 0]]
    picture = (255 * rows).byte().transpose(1, 2).flatten(2, 3).flatten(0, 1)  # (3·H, M·W, 3)
    dreamer.save_pictures({"vae": picture.numpy()}, writer, Path(writer.log_dir), epoch)

def main(args: Args) -> None:
    """Learns or loads, and reports on images that were not learned from."""
    if args.evaluate:
        saved = dreamer.load_file(args.evaluate, "vae.pt")
        args = Args(**saved["args"] | {"evaluate": args.evaluate})
    counts = args.total_timesteps, args.latents, args.batch_size, args.epochs
    if min(args.seed + 1, *counts) < 1 or not 0 < args.learning_rate <= 1:
        raise dreamer.InputError("numbers must be positive, and learning_rate at most 1")
    base = dreamer.Args(env_id=args.env_id, pixels=args.pixels, seed=args.seed)
    torch.manual_seed(dreamer.derive_seeds(args.seed, "vae")[0])
    test = collect(base, args.total_timesteps // 10 + 10, "test")
    noise = torch.randn(len(test), args.latents)
    vae = VAE(test.shape[1:], args.latents, dreamer.SIZES["1m"])
    run = Path("runs", f"{args.env_id}__vae__{args.seed}__{int(time.time())}".replace("/", "-"))
    with SummaryWriter(args.evaluate or str(run)) as writer:
        if args.evaluate:
            vae.load_state_dict(saved["vae"])
            return report(vae, test, noise, writer, args.epochs)
        x = collect(base, args.total_timesteps, "learn")
        optimizer = torch.optim.Adam(vae.parameters(), args.learning_rate)
        for epoch in range(args.epochs):
            report(vae, test, noise, writer, epoch)
            for batch in torch.randperm(len(x)).split(args.batch_size):
                loss = sum(vae(x[batch], torch.randn(len(batch), args.latents))).mean()  # −ELBO
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            dreamer.save_file(run / "vae.pt", {"vae": vae.state_dict(), "args": vars(args)})
        report(vae, test, noise, writer, args.epochs)

if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__.split("\n\n")[0]))
    except dreamer.InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
