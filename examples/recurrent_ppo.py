"""Recurrent PPO on a maze that asks for memory: a sign at the entrance, a junction at the end.

    python examples/recurrent_ppo.py [--updates N] [--forgets]

A sign says left or right, and is seen once. Then comes a corridor of 30 to 60 steps, whose length
nothing shows, and a junction: the side of the sign pays 1, the other -1, and a bump into a wall
-0.02. Who forgets the sign earns 0 on average at best, who remembers it 1. Rollouts have a fixed
length, so episodes begin in the middle of them: `resets` say where, and the state of the last step
goes on into the next rollout.

Expected: +0.999 per maze after 120 updates, in 16 seconds of one core of a CPU; with a memory that
is reset at every step (`--forgets`) about 0. More in docs/results/examples.md.
"""

import argparse
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Categorical

import pararnn

MAZES, STEPS = 64, 128  # side by side, steps of a rollout
SHORTEST, LONGEST = 30, 60  # corridors
AHEAD, LEFT, RIGHT = range(3)  # actions
SIGHTS = 4  # sign for left, sign for right, corridor, junction
EPOCHS, PARTS, CLIP, DISCOUNT, TRACE = 4, 4, 0.2, 0.99, 0.95  # of PPO


class Mazes:
    """Mazes side by side; one that ends is followed by a new one."""

    def __init__(self) -> None:
        self.sign, self.left, self.tries = (torch.zeros(MAZES, dtype=torch.long) for _ in range(3))
        self.begin(torch.ones(MAZES, dtype=torch.bool))

    def begin(self, new: Tensor) -> None:
        """Put new mazes where `new` is true; the first step in each shows the sign."""
        count = int(new.sum())
        self.sign[new] = torch.randint(2, (count,))
        self.left[new] = torch.randint(SHORTEST, LONGEST + 1, (count,))  # steps to the junction
        self.tries[new] = 0

    def look(self) -> Tensor:
        """What is seen now, (mazes, sights)."""
        seen = torch.where(self.left > 0, 2, 3)
        return F.one_hot(torch.where(self.tries == 0, self.sign, seen), SIGHTS).float()

    def act(self, action: Tensor) -> tuple[Tensor, Tensor]:
        """Rewards, and which mazes have ended; those begin anew."""
        at_junction, ahead = self.left == 0, action == AHEAD
        chosen = at_junction & ~ahead
        right = action == torch.where(self.sign == 0, LEFT, RIGHT)
        reward = torch.where(chosen, torch.where(right, 1.0, -1.0), -0.02 * (ahead == at_junction))
        self.left -= (ahead & ~at_junction).long()
        self.tries += 1
        ended = chosen | (self.tries >= 4 * LONGEST)
        self.begin(ended)
        return reward, ended


class Agent(nn.Module):
    """Logits of the actions and the value of a state of the memory."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.inputs = nn.Linear(SIGHTS, width)
        cell = pararnn.cells.ParaGRUCell(width, width, max_timescale=LONGEST)
        self.memory = pararnn.RNN(cell)
        self.heads = nn.Linear(width, 4)

    def forward(
        self, seen: Tensor, state: Tensor, resets: Tensor
    ) -> tuple[Categorical, Tensor, Tensor]:
        """Policy and values at all steps of a rollout, (mazes, steps), and the last state."""
        y, state = self.memory(self.inputs(seen), state, resets)
        out = self.heads(y)
        return Categorical(logits=out[..., :3]), out[..., 3], state


@dataclass
class Rollout:
    """What the agent saw and did; all (mazes, steps, ...) but the state before the first step."""

    state: Tensor
    seen: Tensor
    resets: Tensor
    action: Tensor
    log_probability: Tensor
    advantage: Tensor
    returns: Tensor  # what the values should be
    mean_return: float  # of the mazes that ended


@torch.no_grad()
def play(
    agent: Agent, mazes: Mazes, state: Tensor, new: Tensor, forgets: bool
) -> tuple[Rollout, Tensor, Tensor]:
    """Act for `STEPS` steps; the rollout, the state after it, and where it must be reset."""
    first, columns = state, []
    for _ in range(STEPS):
        seen = mazes.look()
        policy, value, state = agent(seen.unsqueeze(1), state, new.unsqueeze(1))
        action = policy.sample()
        reward, ended = mazes.act(action[:, 0])
        columns.append(
            (seen, new, action[:, 0], policy.log_prob(action)[:, 0], value[:, 0], reward, ended)
        )
        new = ended | forgets
    seen, resets, action, log_probability, value, reward, ended = (
        torch.stack(column, 1) for column in zip(*columns, strict=True)
    )
    after = agent(mazes.look().unsqueeze(1), state, new.unsqueeze(1))[1]  # the next step's value
    advantage = advantages(reward, torch.cat([value, after], 1), ended)
    rollout = Rollout(
        first,
        seen,
        resets,
        action,
        log_probability,
        advantage,
        advantage + value,
        reward.sum().item() / max(1, int(ended.sum())),
    )
    return rollout, state, new


def advantages(reward: Tensor, value: Tensor, ended: Tensor) -> Tensor:
    """Generalised advantage estimation (Schulman et al. 2016), (mazes, steps).

    Args:
        reward: (mazes, steps).
        value: (mazes, steps + 1).
        ended: Boolean (mazes, steps): nothing after this step counts.
    """
    goes_on = (~ended).to(reward.dtype)
    surprise = reward + DISCOUNT * goes_on * value[:, 1:] - value[:, :-1]
    found = torch.zeros_like(value)
    for t in reversed(range(reward.shape[1])):
        found[:, t] = surprise[:, t] + DISCOUNT * TRACE * goes_on[:, t] * found[:, t + 1]
    return found[:, :-1]


def losses(agent: Agent, rollout: Rollout, rows: Tensor) -> Tensor:
    """The loss of PPO (Schulman et al. 2017) on some mazes, all their steps at once."""
    policy, value, _ = agent(rollout.seen[rows], rollout.state[rows], rollout.resets[rows])
    ratio = (policy.log_prob(rollout.action[rows]) - rollout.log_probability[rows]).exp()
    gain = rollout.advantage[rows]
    gain = (gain - gain.mean()) / (gain.std() + 1e-6)
    kept = torch.minimum(ratio * gain, ratio.clamp(1 - CLIP, 1 + CLIP) * gain).mean()
    return F.mse_loss(value, rollout.returns[rows]) / 2 - kept - 0.01 * policy.entropy().mean()


def main() -> None:
    """Play and learn in turns."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--updates", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--forgets", action="store_true", help="reset the memory at every step")
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    agent, mazes = Agent(), Mazes()
    optimizer = torch.optim.Adam(agent.parameters(), lr=1e-3)
    state, new = torch.zeros(MAZES, agent.memory.hidden_size), torch.ones(MAZES, dtype=torch.bool)
    earned, begin = [], time.process_time()
    for update in range(1, arguments.updates + 1):
        rollout, state, new = play(agent, mazes, state, new, arguments.forgets)
        earned.append(rollout.mean_return)
        for _ in range(EPOCHS):
            for rows in torch.randperm(MAZES).chunk(PARTS):
                optimizer.zero_grad()
                losses(agent, rollout, rows).backward()
                nn.utils.clip_grad_norm_(agent.parameters(), 0.5)
                optimizer.step()
        if update % 10 == 0 or update == arguments.updates:
            last = sum(earned[-10:]) / len(earned[-10:])
            print(f"update {update}: {last:+.3f} per maze, {time.process_time() - begin:.0f} s")


if __name__ == "__main__":
    main()
