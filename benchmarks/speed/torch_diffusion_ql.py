"""Diffusion-QL in PyTorch, with the networks and the update of its authors' release, for timing.

After arXiv:2208.06193 and its released code: an actor of three mish layers of 256 with a sinusoidal
embedding of the level, two critics alike, T = 5 levels of the variance-preserving schedule. An
update regresses the critics onto the averaged actor's next action, then takes the actor down the
denoising loss and the value of an action sampled through the whole chain. Needs nothing of qscore.
"""

import copy
import math
import time
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from torch import nn  # pyright: ignore[reportMissingImports]
from torch.nn import functional  # pyright: ignore[reportMissingImports]

LEVELS = 5
HIDDEN = 256
BATCH = 256
DISCOUNT = 0.99
RATE = 0.005  # of the target critics and the averaged actor
AVERAGE_EVERY = 5
LARGEST_NORM = 9.0
CAPACITY = 100_000


def mlp(inputs: int, outputs: int) -> nn.Sequential:
    """Three hidden layers of mish."""
    layers: list[nn.Module] = []
    for size in (inputs, HIDDEN, HIDDEN):
        layers += [nn.Linear(size, HIDDEN), nn.Mish()]
    return nn.Sequential(*layers, nn.Linear(HIDDEN, outputs))


class Embedding(nn.Module):
    """Sines and cosines of the level, `size` of them."""

    def __init__(self, size: int):
        super().__init__()
        self.size = size

    def forward(self, level):
        half = self.size // 2
        scale = torch.exp(torch.arange(half) * (-math.log(10_000) / (half - 1)))
        phase = level[:, None] * scale[None]
        return torch.cat([phase.sin(), phase.cos()], dim=-1)


class Denoiser(nn.Module):
    """The noise in a noised action."""

    def __init__(self, obs_size: int, action_size: int, embedding: int = 16):
        super().__init__()
        self.level = nn.Sequential(
            Embedding(embedding),
            nn.Linear(embedding, 2 * embedding),
            nn.Mish(),
            nn.Linear(2 * embedding, embedding),
        )
        self.net = mlp(obs_size + action_size + embedding, action_size)

    def forward(self, action, level, obs):
        return self.net(torch.cat([action, self.level(level), obs], dim=1))


class Actor(nn.Module):
    """The diffusion model of actions."""

    def __init__(self, obs_size: int, action_size: int):
        super().__init__()
        self.denoiser, self.action_size = Denoiser(obs_size, action_size), action_size
        step = np.arange(1, LEVELS + 1)
        low, high = 0.1, 10.0
        alpha = np.exp(-low / LEVELS - 0.5 * (high - low) * (2 * step - 1) / LEVELS**2)
        bar = np.cumprod(alpha)
        before = np.append(1.0, bar[:-1])
        tables = {
            "signal": np.sqrt(bar),
            "noise": np.sqrt(1 - bar),
            "recip": np.sqrt(1 / bar),
            "recip_noise": np.sqrt(1 / bar - 1),
            "on_clean": (1 - alpha) * np.sqrt(before) / (1 - bar),
            "on_noised": (1 - before) * np.sqrt(alpha) / (1 - bar),
            "log_variance": np.log(np.maximum((1 - alpha) * (1 - before) / (1 - bar), 1e-20)),
        }
        for name, table in tables.items():
            self.register_buffer(name, torch.tensor(table, dtype=torch.float32))

    def at(self, name: str, level):
        """A table's entries, a column."""
        return getattr(self, name)[level][:, None]

    def forward(self, obs):
        """One action per observation, through the whole chain."""
        rows = obs.shape[0]
        action = torch.randn(rows, self.action_size)
        for t in reversed(range(LEVELS)):
            level = torch.full((rows,), t, dtype=torch.long)
            noise = self.denoiser(action, level, obs)
            clean = self.at("recip", level) * action - self.at("recip_noise", level) * noise
            clean = clean.clamp(-1.0, 1.0)
            mean = self.at("on_clean", level) * clean + self.at("on_noised", level) * action
            spread = (0.5 * self.at("log_variance", level)).exp()
            alive = (level > 0).float()[:, None]
            action = mean + alive * spread * torch.randn_like(action)
        return action.clamp(-1.0, 1.0)

    def loss(self, action, obs):
        """How well the noise in noised actions is told."""
        level = torch.randint(0, LEVELS, (action.shape[0],))
        noise = torch.randn_like(action)
        noised = self.at("signal", level) * action + self.at("noise", level) * noise
        return functional.mse_loss(self.denoiser(noised, level, obs), noise)


class Critics(nn.Module):
    """Two values of an observation and an action."""

    def __init__(self, obs_size: int, action_size: int):
        super().__init__()
        self.first, self.second = (mlp(obs_size + action_size, 1) for _ in range(2))

    def forward(self, obs, action):
        x = torch.cat([obs, action], dim=-1)
        return self.first(x), self.second(x)


class DiffusionQL:
    """What `contestant.py` times."""

    def __init__(self, task: str, warmup: int):
        import gymnasium as gym

        torch.manual_seed(0)
        self.env: Any = gym.make(task)
        low, high = self.env.action_space.low, self.env.action_space.high
        self.center, self.half = (high + low) / 2, (high - low) / 2
        n, m = self.env.observation_space.shape[0], len(low)
        self.data = [np.zeros((CAPACITY, k), np.float32) for k in (n, m, n, 1, 1)]
        self.size, self.updates = 0, 0
        self.rng = np.random.default_rng(0)
        self.actor, self.critics = Actor(n, m), Critics(n, m)
        self.average, self.target = copy.deepcopy(self.actor), copy.deepcopy(self.critics)
        self.actor_adam = torch.optim.Adam(self.actor.parameters(), lr=3e-4)
        self.critics_adam = torch.optim.Adam(self.critics.parameters(), lr=3e-4)
        self.obs, _ = self.env.reset(seed=0)
        for _ in range(warmup):
            self._step(self.rng.uniform(-1.0, 1.0, m).astype(np.float32))
        start = time.perf_counter()
        self.update(1)
        self.compile_seconds = time.perf_counter() - start

    def update(self, count: int) -> None:
        """`count` updates on batches from the replay buffer."""
        for _ in range(count):
            self._update()

    def act(self, count: int) -> None:
        """`count` actions for one observation each."""
        obs = torch.as_tensor(self.data[0][:1])
        for _ in range(count):
            with torch.no_grad():
                self.actor(obs).numpy()

    def loop(self, count: int) -> None:
        """`count` steps of acting, environment, replay and update."""
        for _ in range(count):
            with torch.no_grad():
                obs = torch.as_tensor(self.obs[None], dtype=torch.float32)
                action = self.actor(obs).numpy()[0]
            self._step(action)
            self._update()

    def _step(self, action: np.ndarray) -> None:
        after, reward, terminated, truncated, _ = self.env.step(self.center + self.half * action)
        row = (self.obs, action, after, reward, 1.0 - terminated)
        for table, value in zip(self.data, row, strict=True):
            table[self.size % CAPACITY] = value
        self.size += 1
        self.obs = self.env.reset()[0] if terminated or truncated else after

    def _update(self) -> None:
        index = self.rng.integers(0, min(self.size, CAPACITY), BATCH)
        obs, action, after, reward, alive = (torch.as_tensor(table[index]) for table in self.data)

        next_value = torch.min(*self.target(after, self.average(after)))
        target = (reward + alive * DISCOUNT * next_value).detach()
        first, second = self.critics(obs, action)
        loss = functional.mse_loss(first, target) + functional.mse_loss(second, target)
        self._descend(loss, self.critics, self.critics_adam)

        cloning = self.actor.loss(action, obs)
        values = self.critics(obs, self.actor(obs))
        i = int(self.rng.integers(2))
        value = -values[i].mean() / values[1 - i].abs().mean().detach()
        self._descend(cloning + value, self.actor, self.actor_adam)

        self.updates += 1
        follow(self.critics, self.target)
        if self.updates % AVERAGE_EVERY == 0:
            follow(self.actor, self.average)

    def _descend(self, loss: Any, network: nn.Module, adam: torch.optim.Optimizer) -> None:
        adam.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), max_norm=LARGEST_NORM, norm_type=2)
        adam.step()


def follow(network: nn.Module, average: nn.Module) -> None:
    """Move the average's parameters towards the network's."""
    for new, old in zip(network.parameters(), average.parameters(), strict=True):
        old.data.copy_(RATE * new.data + (1.0 - RATE) * old.data)
