"""Behavioural cloning: a network that imitates the greedy oracle without knowing the truth."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from cbm_lightning.interventions.policies.base import Gather, Policy
from cbm_lightning.interventions.policies.greedy import GreedyOracle
from cbm_lightning.interventions.state import State
from cbm_lightning.randomness import step_generator


class BehaviouralCloning(Policy):
    """Imitates the greedy oracle, learned on the training split (Espinosa Zarlenga et al., NeurIPS 2023, appendix).

    A ReLU network on what the head reads and on the mask of corrected concepts chooses the unit that `GreedyOracle`
    would choose. It trains on training samples with random numbers of units asked before.

    Args:
        hidden: Widths of the hidden layers.
        num_samples: Decisions to learn from.
        epochs: Passes over them.
        lr: Learning rate of SGD, whose momentum is 0.9.
        batch_size: Decisions a step.
        seed: Seed of weights, masks and order.
        adaptive: Ask the network again after each correction.
        label: Name in logs and figures.

    Raises:
        ValueError: A number is not positive.
    """

    name = "cloning"
    fits_on = "train"

    def __init__(
        self,
        hidden: Sequence[int] = (256, 128),
        num_samples: int = 5000,
        epochs: int = 100,
        lr: float = 0.01,
        batch_size: int = 64,
        seed: int = 0,
        *,
        adaptive: bool = True,
        label: str | None = None,
    ) -> None:
        super().__init__(adaptive=adaptive, label=label)
        for field, value in {"num_samples": num_samples, "epochs": epochs, "lr": lr, "batch_size": batch_size}.items():
            if not value > 0:
                raise ValueError(f"{field}: expected a positive number, got {value}")
        self.hidden = list(hidden)
        self.num_samples, self.epochs, self.lr, self.batch_size, self.seed = num_samples, epochs, lr, batch_size, seed
        self.network: nn.Module | None = None

    def score(self, state: State) -> Tensor:
        """The network's scores."""
        if self.network is None:
            raise RuntimeError("the policy 'cloning' was never fitted; call fit, or let InterventionEvaluation do")
        scores: Tensor = self.network.to(state.probs.device)(seen(state))
        return scores

    def fit(self, states: Sequence[State], gather: Gather) -> None:
        """Collect decisions of the oracle, then learn them."""
        inputs, targets = [], []
        wanted, rounds = self.num_samples, 0
        while wanted > 0:
            decided = [self._decisions(state, f"cloning {self.seed} {rounds}") for state in states]
            # once a round, in which processes may have different numbers of blocks
            found, chosen, lots, index = (gather(torch.cat(column)) for column in zip(*decided, strict=True))
            # in an order drawn by sample: the same for any number of processes, and no class comes first
            order = index.argsort(stable=True)
            order = order[lots[order].argsort(stable=True)]
            found, chosen = found[order], chosen[order]
            if len(found) == 0:
                raise ValueError("policies: 'cloning' found no sample with a concept to correct in the training split")
            inputs.append(found)
            targets.append(chosen)
            wanted, rounds = wanted - len(found), rounds + 1
        self._imitate(
            torch.cat(inputs)[: self.num_samples], torch.cat(targets)[: self.num_samples], len(states[0].units)
        )

    @staticmethod
    def _decisions(state: State, stream: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What the network sees of partly corrected samples, what the oracle asks about next, a lot and the index."""
        state = _partly_corrected(state, stream)
        scores = GreedyOracle().score(state)
        rows = state.counted & scores.isfinite().any(-1)
        lots = state.randomness.uniform(f"{stream} order", 1)[:, 0].to(scores)
        return seen(state)[rows], scores[rows].argmax(-1), lots[rows], state.randomness.index.to(rows.device)[rows]

    def _imitate(self, inputs: Tensor, targets: Tensor, units: int) -> None:
        generator = step_generator(self.seed)
        # Lightning evaluates in inference mode, in which nothing can be learned
        with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            widths = [inputs.shape[1], *self.hidden]
            layers: list[nn.Module] = []
            for before, after in pairwise(widths):
                layers += [nn.Linear(before, after), nn.ReLU()]
            network = nn.Sequential(*layers, nn.Linear(widths[-1], units)).to(inputs.device)
            inputs, targets = inputs.detach().clone(), targets.clone()
            optimizer = torch.optim.SGD(network.parameters(), lr=self.lr, momentum=0.9)
            for _ in range(self.epochs):
                order = torch.randperm(len(inputs), generator=generator).to(inputs.device)
                for rows in order.split(self.batch_size):
                    optimizer.zero_grad()
                    cross_entropy(network(inputs[rows]), targets[rows]).backward()
                    optimizer.step()
            self.network = network.requires_grad_(False)


def seen(state: State) -> Tensor:
    """``[B, F]`` what the network sees: the head's input (the concepts, where it has axes beside) and the mask."""
    values = state.output.values if state.output.values.ndim == 2 else state.probs
    return torch.cat([values.to(state.probs), state.mask.to(state.probs)], -1)


def _partly_corrected(state: State, stream: str) -> State:
    """The samples after a random number of random units was corrected, at least one of them left."""
    units = len(state.units)
    draws = state.randomness.uniform(stream, units + 1).to(state.probs)
    asked = draws[:, :units].argsort(-1).argsort(-1) < (draws[:, units:] * units).long()
    taken = state.units.expand(asked) & state.open
    return state.corrected(taken).without(taken)
