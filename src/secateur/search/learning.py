"""Strategies that learn a policy: AMC's agent, which walks over the layers, and a network over the layer graph."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..registry import register
from .ddpg import Agent, mlp
from .describe import scaled_facts
from .explore import Moves, Trial
from .space import Space, highest, project


def _deviation(values: Sequence[float]) -> float:
    """The standard deviation, by which steps become independent of the evaluation's unit; 1 where there is none."""
    found = float(torch.tensor(values, dtype=torch.float64).std()) if len(values) > 1 else 0.0
    return found if found > 0 else 1.0


class Walk:
    """The environment of AMC: what is left to spend while the layers are gone through in order."""

    def __init__(self, space: Space) -> None:
        self.space = space
        n = len(space)
        place = torch.arange(n, dtype=torch.float32)[:, None] / max(1, n - 1)
        self._static = torch.cat([place, scaled_facts([node.facts for node in space.nodes])], 1)
        most, least = space.most, space.least
        self._whole = space.cost(most)
        #: What each node can save at most, the others as they are.
        self.saves = [
            self._whole - space.cost((*most[:i], least[i], *most[i + 1 :])) for i in range(n)
        ]  # fmt: skip
        self.size = self._static.shape[1] + 3
        uniform = sorted(space.keeps(project(space, [1.0] * n)))[n // 2]
        #: keep = action^power, so that one half is the uniform keep at any target.
        self.power = max(1e-3, math.log(min(0.999, uniform)) / math.log(0.5))

    def state(self, index: int, chosen: Sequence[int]) -> Tensor:
        """Facts of a layer; what earlier layers saved, what later ones could, and the last action."""
        counts = (*chosen, *self.space.most[len(chosen) :])
        reduced = (self._whole - self.space.cost(counts)) / max(self._whole, 1e-12)
        rest = sum(self.saves[index + 1 :]) / max(self._whole, 1e-12)
        last = self.action(chosen[-1] / self.space.nodes[index - 1].units) if index else 1.0
        return torch.cat([self._static[index], torch.tensor([reduced, rest, last], dtype=torch.float32)])

    def keep(self, action: float) -> float:
        """What an action means: nothing stays at 0, all at 1, the uniform keep at one half."""
        return float(action**self.power)

    def action(self, keep: float) -> float:
        """The inverse of `keep`."""
        return float(keep ** (1 / self.power))

    def clip(self, index: int, chosen: Sequence[int], keep: float) -> int:
        """The largest size up to ``keep`` with which later layers, at their smallest, still meet the target."""
        node = self.space.nodes[index]
        counts = (*chosen, node.sizes[0], *self.space.least[index + 1 :])
        return min(node.floor(keep * node.units), highest(self.space, counts, index))


@register("search", paper="1802.03494", survey="C2.4")
def amc(
    space: Space,
    budget: int,
    generator: torch.Generator,
    trials: Sequence[Trial],
    *,
    warmup: float = 0.25,
    sigma: float = 0.5,
    decay: float = 0.95,
    hidden: int = 300,
    updates: int | None = None,
) -> Moves:
    """A DDPG agent goes through the layers, sees what each is and what is left to spend, and says what it keeps.

    :: s_t = (t, n, c, h, w, stride, k, FLOPs_t, reduced, rest, a_{t-1});  a_t ~ TN(mu(s_t), sigma^2, 0, 1);
    keep_t = a_t^p

    An episode is one evaluation; its value is the reward of every step (the paper's R_err: at a target that is met,
    the cost says nothing). Actions are cut so that the target can still be met. The first quarter of the budget is
    random, then ``sigma`` decays from episode to episode. ``updates`` steps of learning follow each layer's action:
    as many as make up the paper's 300 episodes, unless given.

    Choose it for networks with many layers, and budgets of some hundred evaluations.

    Beware: at a few dozen evaluations it is little more than its random start.

    Source: He et al., AMC, arXiv 1802.03494, section 3 and the official code (300 hidden units, Adam at 1e-4 and
    1e-3, tau 0.01, batches of 64). Unlike there ``p`` makes an action of one half the uniform keep (at one half it is
    1, as there), what an action leaves of the target is handed out again, the executed action is what is remembered,
    and rewards are divided by their deviation over the episodes so far.
    """
    walk = Walk(space)
    agent = Agent(walk.size, generator, hidden=hidden)
    n, start = len(space), max(2, round(warmup * budget))
    steps = updates if updates is not None else max(1, round(300 / max(1, budget - start)))
    values: list[float] = []

    def remember(counts: Sequence[int], keeps: Sequence[float], value: float) -> None:
        states = [walk.state(i, counts[:i]) for i in range(n)]
        for i, (state, keep) in enumerate(zip(states, keeps, strict=True)):
            agent.memory.add(state, walk.action(keep), value, states[min(i + 1, n - 1)], i < n - 1)
        values.append(value)

    for trial in trials:
        remember(trial.counts, trial.keeps, trial.value)
    episode = len(trials)
    while True:
        chosen: list[int] = []
        for i in range(n):
            if episode < start:
                action = float(torch.rand((), generator=generator))
            else:
                action = agent.act(walk.state(i, chosen), sigma * decay ** (episode - start))
            chosen.append(walk.clip(i, chosen, walk.keep(action)))
        trial = yield space.keeps(tuple(chosen))
        if trial.number < episode:
            continue  # known already: the noise shows another way
        remember(trial.counts, trial.keeps, trial.value)
        episode += 1
        if episode < start:
            continue
        for _ in range(steps * n):
            agent.learn(_deviation(values))


def normalized_adjacency(n: int, edges: Sequence[tuple[int, int]]) -> Tensor:
    """``D^-1/2 (A + I) D^-1/2`` of the undirected graph.

    >>> normalized_adjacency(2, [(0, 1)]).tolist()
    [[0.5, 0.5], [0.5, 0.5]]
    """
    a = torch.eye(n)
    for i, j in edges:
        a[i, j] = a[j, i] = 1.0
    root = a.sum(1).rsqrt()
    return torch.round(root[:, None] * a * root, decimals=6)


class GraphPolicy(nn.Module):
    """Two graph convolutions over the layers, and one number for each: the logarithm of its keep, up to a common one.

    Args:
        spread: the largest size of an output.
    """

    def __init__(self, features: int, hidden: int, adjacency: Tensor, spread: float) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(features, hidden), nn.Linear(hidden, hidden)
        self.head = mlp([hidden + features, hidden, 1])
        self.spread = spread
        self.adjacency = adjacency

    def forward(self, x: Tensor) -> Tensor:
        a = self.adjacency
        hidden = torch.tanh(a @ self.second(torch.tanh(a @ self.first(x))))
        found: Tensor = self.spread * torch.tanh(self.head(torch.cat([hidden, x], 1)).squeeze(1))
        return found


@register("search", paper="2102.03214", survey=("C2.3", "C2.4"))
def graph(
    space: Space,
    budget: int,
    generator: torch.Generator,
    trials: Sequence[Trial],
    *,
    hidden: int = 50,
    batch: int = 6,
    epochs: int = 20,
    rate: float = 3e-3,
    sigma: float = 0.7,
    clip: float = 0.2,
    spread: float = 2.5,
) -> Moves:
    """A graph network reads the layer graph and puts out all ratios at once; trained by clipped policy gradients.

    :: H' = tanh(D^-1/2 (A + I) D^-1/2 H W);  log keep = mu(H) + sigma z;  max of min(r A, clip(r, 1 -+ eps) A)

    Nodes are layers (or families of units) with the facts of AMC's state and their place; edges follow the data, as
    the dependency analysis finds them. ``batch`` trials are drawn, then the policy takes ``epochs`` steps of PPO on
    them, the advantage being a value less the mean of all so far, over their deviation. ``sigma`` falls to a third
    over the budget.

    Choose it where layers of one kind should be treated alike: what it learns of a layer it applies to its likes.

    Beware: needs an example input; a policy that cannot tell two layers apart gives them one ratio up to noise.

    Source: Yu et al., GNN-RL, arXiv 2102.03214, and its official code: a graph convolution encodes the network, PPO
    trains. Unlike there an episode is one step, since the projection meets the target; the graph is that of layers,
    not of operations in two stages; each node has its own output, where the code pools the graph.
    """
    n = len(space)
    place = torch.arange(n, dtype=torch.float32)[:, None] / max(1, n - 1)
    x = torch.cat([place, scaled_facts([node.facts for node in space.nodes])], 1)
    adjacency = normalized_adjacency(n, space.edges())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**31 - 1, (1,), generator=generator)))
        policy = GraphPolicy(x.shape[1], hidden, adjacency, spread)
    optimizer = torch.optim.Adam(policy.parameters(), lr=rate)
    values = [trial.value for trial in trials]
    count = len(trials)
    while True:
        drawn, gained = [], []
        width = sigma * (1 / 3) ** (count / budget)
        with torch.no_grad():
            mean = policy(x)
        for _ in range(batch):
            action = mean + width * torch.randn(n, generator=generator)
            trial = yield action.double().exp().tolist()
            drawn.append(action)
            gained.append(trial.value)
            count += 1
        values += gained
        advantage = (torch.tensor(gained, dtype=torch.float64) - sum(values) / len(values)) / _deviation(values)
        actions = torch.stack(drawn)
        before = log_density(actions, mean, width)
        for _ in range(epochs):
            ratio = (log_density(actions, policy(x), width) - before).exp()
            loss = -clipped(ratio, advantage.float(), clip).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def log_density(action: Tensor, mean: Tensor, sigma: float) -> Tensor:
    """Of normal actions, summed over nodes."""
    z = (action - mean) / sigma
    return (-0.5 * z.square() - math.log(sigma * math.sqrt(2 * math.pi))).sum(-1)


def clipped(ratio: Tensor, advantage: Tensor, eps: float) -> Tensor:
    """PPO's surrogate (Schulman et al., arXiv 1707.06347, equation 7).

    >>> clipped(torch.tensor([1.5, 0.5]), torch.tensor([1.0, -1.0]), 0.2).tolist()
    [1.2000000476837158, -0.800000011920929]
    """
    return torch.minimum(ratio * advantage, ratio.clamp(1 - eps, 1 + eps) * advantage)
