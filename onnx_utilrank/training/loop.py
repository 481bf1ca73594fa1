"""The training loop: schedule, optimizer, early stopping, checkpoints."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from onnx_utilrank.calibration.cache import CHECKPOINT_SECONDS, Cache
from onnx_utilrank.calibration.collect import Progress
from onnx_utilrank.runtime.sessions import Feed
from onnx_utilrank.training.history import History, Look
from onnx_utilrank.training.objective import Objective
from onnx_utilrank.training.student import Student
from onnx_utilrank.training.weights import scale_of

__all__ = ["Batch", "Batches", "Hook", "Recipe", "Trainer"]

# Share of the running mean of the weights that stays at each step, at most.
AVERAGED = 0.98
# Steps that are timed before their number is settled, and ones before them that do not count.
TIMED, UNTIMED = 5, 2


@dataclass(frozen=True, slots=True)
class Batch:
    """One run to train on, with what the original gives for it."""

    feed: Feed
    wanted: Mapping[str, np.ndarray]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How to train.

    Attributes:
        steps: Steps of the optimizer.
        learning_rate: The highest; of each tensor's own size where `relative`.
        relative: Whether a step is a share of the root mean square of what it changes.
        warm_up: Share of the steps over which the rate rises; afterwards it falls as a cosine.
        clip: Largest norm of the gradient; None for any.
        decay: Of AdamW.
        looks: How often the student is judged.
        patience: After so many judgements without a better one the training ends, and the best
            student is kept; None keeps the last one.
        averaged: Whether what is judged and kept are running means of the weights: steps on few
            samples stray about what they aim at.
    """

    steps: int
    learning_rate: float
    relative: bool = True
    warm_up: float = 0.05
    clip: float | None = 1.0
    decay: float = 0.0
    looks: int = 20
    patience: int | None = None
    averaged: bool = False

    def rate(self, step: int) -> float:
        """The learning rate of a step: a rise, then half a cosine."""
        rising = max(1, round(self.warm_up * self.steps))
        if step < rising:
            return self.learning_rate * (step + 1) / rising
        done = (step - rising) / max(1, self.steps - rising)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


class Batches(Protocol):
    """The runs of each step."""

    def at(self, step: int) -> Sequence[Batch]:
        """Those of one step; steps come in order, from any first one."""
        ...


class Hook(Protocol):
    """What happens to a student between steps."""

    def __call__(self, step: int, student: Student, optimizer: torch.optim.Optimizer) -> None:
        """Change parts, and what the optimizer keeps of them, if it is time to."""
        ...

    def catch_up(self, done: int, student: Student) -> None:
        """Bring a new student into the form that it had after so many steps."""
        ...


class Trainer:
    """Takes a student through its steps and leaves it as it was at its best."""

    def __init__(
        self,
        student: Student,
        objective: Objective,
        batches: Batches,
        judge: Callable[[Student], float],
        recipe: Recipe,
        *,
        progress: Progress,
        hook: Hook | None = None,
        cache: Cache | None = None,
        key: tuple[object, ...] = (),
    ) -> None:
        """Prepare.

        Args:
            student: What is trained.
            objective: What is to become small.
            batches: What it is trained on.
            judge: Lower is better; on samples that no batch holds.
            recipe: How.
            progress: Called with the steps that are done.
            hook: Called before each step.
            cache: Where checkpoints are kept.
            key: What tells this training from others of the same model and data.
        """
        self.student, self.objective, self.batches = student, objective, batches
        self.judge, self.recipe, self.progress, self.hook = judge, recipe, progress, hook
        self.history = History()
        self._cache, self._key = cache or Cache(), ("training", recipe, *key)
        self._optimizer = self._new_optimizer()
        self._best = self._weights()
        self._mean, self._averaged = self._weights(), 0
        self._losses: list[float] = []

    def run(self) -> History:
        """Train.

        Raises:
            ModelError: A node cannot be computed.
            ConfigError: A checkpoint cannot be written.
        """
        recipe, every = self.recipe, math.ceil(self.recipe.steps / self.recipe.looks)
        first = self._resumed()
        if not self.history.looks:
            self._look(0)
        start = saved = time.monotonic()
        before = self.history.seconds
        for step in range(first, recipe.steps):
            if recipe.patience is not None and self.history.since_best >= recipe.patience:
                break  # a run that goes on from a checkpoint may have lost patience there
            if self.hook:
                self.hook(step, self.student, self._optimizer)
            self._step(step)
            done = step + 1
            if done % every == 0 or done == recipe.steps:
                self._look(done)
            self.history.seconds = before + time.monotonic() - start
            if time.monotonic() - saved > CHECKPOINT_SECONDS:
                self._keep(done)
                saved = time.monotonic()
            self.progress("training", done, recipe.steps, self._detail())
        self.progress("training", recipe.steps, recipe.steps, self._detail())
        if recipe.patience is not None:
            self._restore(self._best)
        return self.history

    def settled(self, minutes: float) -> int:
        """How many steps fit a time, by a few that are timed and then undone.

        Where there is a cache the answer is kept: a run that goes on has to take as many as the
        one that was killed.

        Raises:
            ModelError: A node cannot be computed.
            ConfigError: The cache cannot be written.
        """
        key = ("steps", minutes, *self._key)
        if (held := self._cache.load(*key)) is not None:
            return int(held["steps"])
        weights, times = self._weights(), []
        for step in range(UNTIMED + TIMED):
            start = time.monotonic()
            self._step(step)
            times.append(time.monotonic() - start)
        self._restore(weights)
        steps = max(1, int(60 * minutes / float(np.median(times[UNTIMED:]))))
        self._cache.save({"steps": np.array(steps)}, *key)
        return steps

    def _step(self, step: int) -> None:
        """One step of the optimizer over the mean loss of its runs."""
        runs = self.batches.at(step)
        tensors = [t for part in self.student.parts for t in part.trained]
        self._optimizer.zero_grad()
        total = 0.0
        for batch in runs:
            with torch.enable_grad():
                made = self.student.forward(batch.feed, self.objective.values)
                loss = self.objective(batch.feed, made, batch.wanted) / len(runs)
                if loss.requires_grad:
                    loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        if not all(t.grad is None or bool(torch.isfinite(t.grad).all()) for t in tensors):
            self.history.dropped += 1
            return
        self._losses.append(total)
        if self.recipe.clip is not None:
            torch.nn.utils.clip_grad_norm_(tensors, self.recipe.clip)
        rate = self.recipe.rate(step)
        for group in self._optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        self._optimizer.step()
        if self.recipe.averaged:
            # Early on the mean is of few steps, so that it forgets where it began.
            share = min(AVERAGED, (1 + self._averaged) / (10 + self._averaged))
            self._averaged += 1
            for name, now in self._state():
                self._mean[name].lerp_(now, 1 - share)

    def _look(self, step: int) -> None:
        """Judge the student; remember it if it is the best so far."""
        now = self._weights()
        if self.recipe.averaged:
            self._restore(self._mean)
        look = Look(
            step=step,
            loss=float(np.mean(self._losses)) if self._losses else math.nan,
            divergence=self.judge(self.student),
            trained=self.student.trained,
            rank=self.student.rank,
        )
        self._losses.clear()
        self.history.looks.append(look)
        if self.recipe.patience is not None and self.history.best is look:
            self._best = self._weights()
        if self.recipe.averaged:
            self._restore(now)

    def _detail(self) -> str:
        look = self.history.looks[-1]
        loss = f"loss {look.loss:.3g}, " if math.isfinite(look.loss) else ""
        rank = f", rank {look.rank:,}" if look.rank else ""
        return f"{loss}held {look.divergence:.3g}, {look.trained:,} trained{rank}"

    def _new_optimizer(self) -> torch.optim.AdamW:
        relative = self.recipe.relative
        groups = [
            {"params": [tensor], "scale": scale_of(tensor) if relative else 1.0}
            for part in self.student.parts
            for tensor in part.trained
        ]
        rate, decay = self.recipe.learning_rate, self.recipe.decay
        return torch.optim.AdamW(groups, lr=rate, weight_decay=decay)

    def _state(self) -> Iterator[tuple[str, torch.Tensor]]:
        for k, part in enumerate(self.student.parts):
            for name, tensor in part.state().items():
                yield f"{k} {name}", tensor

    def _weights(self) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in self._state()}

    def _restore(self, weights: Mapping[str, torch.Tensor]) -> None:
        for k, part in enumerate(self.student.parts):
            own = (name for name in weights if name.startswith(f"{k} "))
            part.restore({name.removeprefix(f"{k} "): weights[name] for name in own})

    def _keep(self, done: int) -> None:
        """Write a checkpoint."""
        groups = self._optimizer.param_groups
        state = {
            "done": np.array([done, self.history.dropped, self._averaged]),
            "seconds": np.array(self.history.seconds),
            "looks": np.array([dataclasses.astuple(look) for look in self.history.looks]),
            "losses": np.array(self._losses),
            "scales": np.array([group["scale"] for group in groups]),
        }
        for kind, held in (("now", self._weights()), ("best", self._best), ("mean", self._mean)):
            state |= {f"{kind} {name}": tensor.numpy(force=True) for name, tensor in held.items()}
        for k, group in enumerate(groups):
            adam = self._optimizer.state.get(group["params"][0], {})
            state |= {f"adam {k} {name}": value.numpy(force=True) for name, value in adam.items()}
        self._cache.save(state, *self._key)

    def _resumed(self) -> int:
        """Go on from a checkpoint; how many steps it had done."""
        state = self._cache.load(*self._key)
        if state is None:
            return 0
        done, self.history.dropped, self._averaged = map(int, state["done"])
        if self.hook:
            self.hook.catch_up(done, self.student)
        device = next(self._state())[1].device
        now, self._best, self._mean = (
            {
                name.removeprefix(kind): torch.from_numpy(array.copy()).to(device)
                for name, array in state.items()
                if name.startswith(kind)
            }
            for kind in ("now ", "best ", "mean ")
        )
        self._restore(now)
        self.history.seconds = float(state["seconds"])
        self.history.looks = [
            Look(
                step=int(step),
                loss=float(loss),
                divergence=float(lost),
                trained=int(trained),
                rank=int(rank),
            )
            for step, loss, lost, trained, rank in state["looks"]
        ]
        self._losses = [float(loss) for loss in state["losses"]]
        self._optimizer = self._new_optimizer()
        for k, group in enumerate(self._optimizer.param_groups):
            group["scale"] = float(state["scales"][k])
            prefix = f"adam {k} "
            (tensor,) = group["params"]
            held = {
                name.removeprefix(prefix): torch.from_numpy(value)
                for name, value in state.items()
                if name.startswith(prefix)
            }
            if held:
                self._optimizer.state[tensor] = {
                    name: value if name == "step" else value.to(tensor)
                    for name, value in held.items()
                }
        return done
