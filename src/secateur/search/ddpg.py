"""Deep deterministic policy gradient as AMC uses it: actor, critic, replay, soft targets, truncated normal noise."""

from __future__ import annotations

import copy
import itertools
import math

import torch
from torch import Tensor, nn


def mlp(sizes: list[int], last: nn.Module | None = None) -> nn.Sequential:
    """Linear layers with ReLU between them."""
    steps: list[nn.Module] = []
    for k, (i, o) in enumerate(itertools.pairwise(sizes)):
        steps += [nn.ReLU()] if k else []
        steps.append(nn.Linear(i, o))
    return nn.Sequential(*steps, *([last] if last is not None else []))


class Critic(nn.Module):
    """The value of an action in a state; both enter the first hidden layer by a matrix of their own."""

    def __init__(self, states: int, hidden: int) -> None:
        super().__init__()
        self.state, self.action = nn.Linear(states, hidden), nn.Linear(1, hidden)
        self.rest = mlp([hidden, hidden, 1])

    def forward(self, state: Tensor, action: Tensor) -> Tensor:
        found: Tensor = self.rest(torch.relu(self.state(state) + self.action(action)))
        return found


@torch.no_grad()
def soft_update(target: nn.Module, source: nn.Module, tau: float) -> None:
    """Move a target network a little: ``target = (1 - tau) target + tau source``."""
    torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), tau)


def truncated_normal(mean: float, sigma: float, generator: torch.Generator) -> float:
    """One draw of a normal distribution cut off outside [0, 1], by the inverse of its distribution function.

    >>> truncated_normal(0.3, 1e-9, torch.Generator().manual_seed(0))
    0.3
    """

    def below(x: float) -> float:
        return 0.5 * (1 + math.erf((x - mean) / (sigma * math.sqrt(2))))

    low, high = below(0.0), below(1.0)
    uniform = low + (high - low) * float(torch.rand((), generator=generator, dtype=torch.float64))
    uniform = min(max(uniform, 1e-12), 1 - 1e-12)
    value = mean + sigma * float(torch.special.ndtri(torch.tensor(uniform, dtype=torch.float64)))
    return round(min(1.0, max(0.0, value)), 8)


class Replay:
    """The last transitions, of which batches are drawn without replacement."""

    def __init__(self, states: int, capacity: int) -> None:
        self._states = states
        self._rows = torch.zeros(capacity, 2 * states + 3)
        self._count = 0

    def __len__(self) -> int:
        return min(self._count, len(self._rows))

    def add(self, state: Tensor, action: float, reward: float, following: Tensor, more: bool) -> None:
        """Remember a transition in place of the oldest; ``more`` is false at the end of an episode."""
        row = torch.cat([state, following, torch.tensor([action, reward, float(more)])])
        self._rows[self._count % len(self._rows)] = row
        self._count += 1

    def sample(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """States, actions, rewards, next states and continuations, a row each; all rows while there are fewer."""
        chosen = self._rows[torch.randperm(len(self), generator=generator)[:count]]
        state, following, rest = chosen.split([self._states, self._states, 3], 1)
        return state, rest[:, :1], rest[:, 1:2], following, rest[:, 2:]


class Agent:
    """Actor and critic with their targets.

    Args:
        rates: learning rates of the actor and the critic.
        discount: of the next state's value.
    """

    def __init__(
        self, states: int, generator: torch.Generator, *, hidden: int = 300, capacity: int = 2000, batch: int = 64,
        tau: float = 0.01, rates: tuple[float, float] = (1e-4, 1e-3), discount: float = 1.0,
    ) -> None:  # fmt: skip
        self._generator, self.batch, self.tau, self.discount = generator, batch, tau, discount
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**31 - 1, (1,), generator=generator)))
            self.actor = mlp([states, hidden, hidden, 1], nn.Sigmoid())
            self.critic = Critic(states, hidden)
        self.slow_actor, self.slow_critic = copy.deepcopy(self.actor), copy.deepcopy(self.critic)
        self._actor_step = torch.optim.Adam(self.actor.parameters(), lr=rates[0], fused=True)
        self._critic_step = torch.optim.Adam(self.critic.parameters(), lr=rates[1], fused=True)
        self.memory = Replay(states, capacity)
        self.baseline: float | None = None

    @torch.no_grad()
    def act(self, state: Tensor, sigma: float) -> float:
        """The actor's keep with noise of the given width."""
        mean = float(self.actor(state[None]))
        return truncated_normal(mean, sigma, self._generator) if sigma > 0 else mean

    def learn(self, scale: float = 1.0) -> None:
        """One step of critic, actor and targets on a batch; rewards are less their moving average over batches.

        Args:
            scale: that rewards are divided by.
        """
        states, actions, rewards, following, more = self.memory.sample(self.batch, self._generator)
        rewards = rewards / scale
        mean = float(rewards.mean())
        self.baseline = mean if self.baseline is None else self.baseline + 0.5 * (mean - self.baseline)
        with torch.no_grad():
            ahead = self.slow_critic(following, self.slow_actor(following))
            goal = rewards - self.baseline + self.discount * more * ahead
        error = nn.functional.mse_loss(self.critic(states, actions), goal)
        self._critic_step.zero_grad()
        error.backward()
        self._critic_step.step()
        self.critic.requires_grad_(False)  # the actor's step needs no gradient of its weights
        gain = self.critic(states, self.actor(states)).mean()
        self._actor_step.zero_grad()
        (-gain).backward()
        self.critic.requires_grad_(True)
        self._actor_step.step()
        soft_update(self.slow_actor, self.actor, self.tau)
        soft_update(self.slow_critic, self.critic, self.tau)
