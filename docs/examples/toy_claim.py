"""PCPO's claim on a toy, in minutes: Stable Diffusion's own grid, 64 dimensions, a small MLP.

    python docs/examples/toy_claim.py              # 10 seeds of each method: a table
    python docs/examples/toy_claim.py --seeds 3

The data are eight clusters. A "prompt" asks for one of them, and half of the data have a prompt
drawn at random: the base model does as it is told about half of the time. The reward is how near a
sample is to the cluster that was asked for. Each method trains all weights on 50 DDIM steps, all
with noise, by two updates an iteration; the baseline is DDPO's (densities, PPO's clip), and its
control the same without the last three steps, whose weights are the largest. All are measured with
one sampler, DDPM's, on the same noise.
"""

from __future__ import annotations

import argparse
import copy
import time
from dataclasses import dataclass

import torch
from comfyui_pcpo.pcpo import (
    RATIOS,
    ClipRange,
    Ddim,
    Exact,
    GroupAdvantage,
    LogHinge,
    Native,
    ObjectiveOnly,
    Plan,
    PpoClip,
    Published,
    Relative,
    WeightedLoss,
    ddim_grid,
    noise_streams,
    plan_diffusion,
    rollout,
    scaled_linear_alpha_bars,
)
from torch import Tensor, nn

WIDTH, PROMPTS, IMAGES = 64, 8, 16
GRID = ddim_grid(50)
ALPHA_BARS = scaled_linear_alpha_bars().float()
CENTRES = torch.randn(PROMPTS, WIDTH, generator=torch.Generator().manual_seed(1))
SPREAD = 0.3
"""Standard deviation of a cluster."""


@dataclass(frozen=True)
class Method:
    """What is compared: the sampler with its credit, the log ratio and the objective."""

    credit: object
    ratio: str = "epsilon_matching"
    objective: object = LogHinge(ClipRange(1e-3, 1e-3))
    drop_last: int = 0


PPO = PpoClip(ClipRange(1e-3, 1e-3))
METHODS = {
    "baseline (DDPO)": Method(Native(), "density", PPO),
    "without 3 steps": Method(Native(), "density", PPO, drop_last=3),
    "published": Method(Published(solve_weight=4.5)),
    "objective_only": Method(ObjectiveOnly()),
    "relative": Method(Relative()),
    "exact": Method(Exact()),
    "weighted_loss": Method(WeightedLoss(), "density"),
}


class Network(nn.Module):
    """Predicts the noise from a latent, its timestep and its prompt.

    The layers guess a cluster's centre; what is known of a latent near a centre is given.
    """

    def __init__(self, hidden: int = 128) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Linear(WIDTH + 16 + PROMPTS, hidden), nn.SiLU()),
            *(nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, WIDTH)),
        )

    def forward(self, x: Tensor, timestep: Tensor, prompt: Tensor) -> Tensor:
        """The noise in x."""
        angle = timestep.expand(len(x))[:, None] / 1000 * 2.0 ** torch.arange(8)
        asked = nn.functional.one_hot(prompt, PROMPTS).to(x.dtype)
        centre = self.layers(torch.cat([x, angle.sin(), angle.cos(), asked], dim=1))
        kept = ALPHA_BARS[timestep.long()].expand(len(x))[:, None]
        gain = kept.sqrt() * SPREAD**2 / (kept * SPREAD**2 + 1 - kept)
        clean = centre + gain * (x - kept.sqrt() * centre)
        return (x - kept.sqrt() * clean) / (1 - kept).sqrt()


def base_model(steps: int = 1500) -> Network:
    """A model of the data, trained by denoising."""
    torch.manual_seed(0)
    network = Network()
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    for _ in range(steps):
        prompt = torch.randint(PROMPTS, (256,))
        shown = torch.where(torch.rand(256) < 0.5, prompt, torch.randint(PROMPTS, (256,)))
        clean = CENTRES[shown] + SPREAD * torch.randn(256, WIDTH)
        i, noise = torch.randint(len(GRID.timesteps), (256,)), torch.randn(256, WIDTH)
        kept = GRID.alpha_bar.float()[i, None]
        seen = network(
            kept.sqrt() * clean + (1 - kept).sqrt() * noise, GRID.timesteps[i].float(), prompt
        )
        optimizer.zero_grad()
        (seen - noise).square().mean().backward()
        optimizer.step()
    return network


def reward(clean: Tensor, prompt: Tensor) -> Tensor:
    """How near the asked cluster a sample is, in (0, 1]."""
    return torch.exp(-(clean - CENTRES[prompt]).square().mean(dim=1))


def sampled(network: Network, reference: Network, plan: Plan, prompt: Tensor, key: tuple):
    """Trajectories, each with noise of its own."""
    noise = noise_streams([(*key, i) for i in range(len(prompt))], len(plan), (WIDTH,))
    return rollout(
        lambda x, t: network(x, t, prompt),
        plan,
        noise,
        reference=None if plan.scale is None else lambda x, t: reference(x, t, prompt),
    )


def train(base: Network, method: Method, seed: int, iterations: int, rate: float) -> list[float]:
    """The reward before training and after each iteration, of DDPM's sampler."""
    plan = plan_diffusion(GRID, Ddim(), method.credit, drop_last=method.drop_last).to("cpu")
    common = plan_diffusion(GRID, Ddim(), Native()).to("cpu")
    network, advantage = copy.deepcopy(base), GroupAdvantage(1e-4, 0, 5.0)
    optimizer = torch.optim.Adam(network.parameters(), rate)
    prompt = torch.arange(PROMPTS).repeat_interleave(IMAGES)
    curve = [evaluate(network, base, common)]
    for iteration in range(iterations):
        drawn = sampled(network, base, plan, prompt, (seed, iteration))
        values = reward(drawn.final, prompt)
        advantages = advantage(values, [str(int(p)) for p in prompt])
        order = torch.randperm(len(prompt), generator=torch.Generator().manual_seed(iteration))
        for part in order.chunk(2):
            update(network, method, plan, drawn, prompt, advantages, part, optimizer)
        curve.append(evaluate(network, base, common))
    return curve


def update(network, method, plan, drawn, prompt, advantages, part, optimizer) -> None:
    """One optimizer step on all steps of some of the images."""
    image = part.repeat_interleave(int(plan.trained.sum()))
    step = plan.trained.nonzero().flatten().repeat(len(part))
    seen = network(drawn.x[image, step], plan.timesteps[step], prompt[image])
    reference = None if drawn.reference is None else drawn.reference[image, step]
    batch = plan.step_batch(
        step, *(part[image, step] for part in (drawn.x, drawn.prediction, drawn.noise))
    )
    log_ratio = RATIOS[method.ratio](plan.policy(step, seen, reference), batch)
    weight = 1.0 if plan.loss is None else plan.loss[step]
    optimizer.zero_grad()
    (weight * method.objective(log_ratio, advantages[image]).loss).mean().backward()
    nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    optimizer.step()


@torch.no_grad()
def evaluate(network: Network, base: Network, plan: Plan, images: int = 16) -> float:
    """Mean reward on noise that is the same for every model."""
    prompt = torch.arange(PROMPTS).repeat_interleave(images)
    return reward(sampled(network, base, plan, prompt, ("held out",)).final, prompt).mean().item()


def main() -> None:
    """Train every method at every seed, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--iterations", type=int, default=30)
    parser.add_argument("--lr", type=float, default=3e-3)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    started, base = time.monotonic(), base_model()
    at = [asked.iterations * k // 3 for k in (1, 2, 3)]
    print(f"base model {time.monotonic() - started:.0f} s")
    print(f"{'mean reward after':18} {'  '.join(f'{i:>6}' for i in (0, *at))}   above the baseline")
    curves: dict[str, Tensor] = {}
    for name, method in METHODS.items():
        runs = [train(base, method, s, asked.iterations, asked.lr) for s in range(asked.seeds)]
        curves[name] = torch.tensor(runs)
        means = "  ".join(f"{curves[name][:, i].mean():.4f}" for i in (0, *at))
        won = (curves[name] > curves["baseline (DDPO)"]).sum(dim=0)
        told = " ".join(f"{int(won[i])}/{asked.seeds}" for i in at)
        print(f"{name:18} {means}   {told}", flush=True)
    print(f"{time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
