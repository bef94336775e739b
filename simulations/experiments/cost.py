"""What a run will cost, before it starts: time from timed steps, memory from the shapes of what is held.

Memory is counted on a copy of the model without data (torch's device "meta"), so that asking what does not fit takes
none. Times are of single steps of the real model on this machine, times the number of steps: what the run takes where
nothing else computes beside it, to a third or so.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import psutil
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from adversaries.base import Attack, Effort
from adversaries.inversion.gradients import BatchNormMode
from adversaries.inversion.gradients.autograd import twice_differentiable
from adversaries.inversion.gradients.products import Network
from fedattack.config import Config, ModelConfig
from fedattack.data import World
from fedattack.errors import ConfigError, NotApplicable
from fedattack.models import MODELS, build_model
from fedattack.observation import Scenario, Update
from fedattack.reporting import formats
from fedattack.task import objective, task_of, trained_parameters
from fedattack.training import training_mode
from simulations.engine.environment import cpu_threads
from simulations.experiments.executor import choose_device

LARGE_SIDE = 64
"""Side of an image, in pixels, above which a run's cost is looked at."""

LARGE_MODEL = 16_000_000
"""Parameters above which it is."""

WORTH_SAYING = 300.0
"""Seconds above which an attack's cost is said before it starts."""

_COPIES_TRAINING = 20
"""Tensors of the model's size that a federation in one process comes to hold, what the allocator keeps included."""

_COPIES_ATTACK = 14
"""Those that an attack by second derivatives adds: runs on a ResNet-18 and a ViT-S took 28 to 46 in all."""

_GRAPH = 1.5
"""What is held beside the tensors that a graph saves, in units of these."""


@dataclass(frozen=True)
class Footprint:
    """Bytes of a model's parameters, of what one gradient of a batch saves, and of what second derivatives save."""

    parameters: int
    gradient: int
    second: int

    @property
    def training(self) -> int:
        """Bytes that a client's training takes at its peak, and the federation around it in the same process."""
        return _COPIES_TRAINING * self.parameters + int(_GRAPH * self.gradient)

    def attack(self, effort: Effort) -> int:
        """Bytes that an attack takes at its peak beside what the federation holds."""
        graph = self.second if effort.second_order else self.gradient
        return _COPIES_ATTACK * self.parameters + int(_GRAPH * graph)


@dataclass(frozen=True)
class Cost:
    """What an attack will cost.

    Attributes
    ----------
    name : str
        The attack's.
    seconds : float or None
        Of all victims, one after another; None: not known beforehand.
    memory : int or None
        Bytes at the peak, beside what the process holds already; None: not known.
    work : str
        What is done in this time, in words.
    """

    name: str
    seconds: float | None
    memory: int | None
    work: str = ""

    @property
    def told(self) -> str:
        """Both in words."""
        parts = []
        if self.seconds is not None:
            parts.append(f"about {formats.seconds(self.seconds)} ({self.work}), one after another")
        if self.memory is not None:
            parts.append(f"about {formats.size(self.memory)} of memory beside what is held")
        return "; ".join(parts) or "not known beforehand"


@dataclass(frozen=True)
class Steps:
    """Seconds of one step of each kind; see :class:`adversaries.base.Effort`."""

    gradient: float
    slope: float
    product: float

    def of(self, effort: Effort) -> float:
        """Seconds of an effort."""
        return effort.gradients * self.gradient + effort.slopes * self.slope + effort.products * self.product


def free_memory() -> int:
    """Bytes that this process may still take: the machine's, or what is left of its control group's limit."""
    free = int(psutil.virtual_memory().available)
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            free = min(free, int(Path(limit).read_text()) - int(Path(used).read_text()))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return max(0, free)


@lru_cache(maxsize=8)
def footprint(model: ModelConfig, images: int, batch_norm: BatchNormMode = "train") -> Footprint | None:
    """Bytes of a resolved model with a batch of `images`, counted without data; None where it cannot be."""
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            module = training_mode(build_model(model).to("meta"), batch_norm)
        parameters = list(trained_parameters(module).values())
        own = {one.untyped_storage()._cdata for one in module.parameters()}
        size = sum(one.numel() * one.element_size() for one in module.state_dict().values())
        held: dict[int, Tensor] = {}

        def save(tensor: Tensor) -> Tensor:
            if tensor.untyped_storage()._cdata not in own:
                held[tensor.untyped_storage()._cdata] = tensor
            return tensor

        def saved() -> int:
            return sum(tensor.untyped_storage().nbytes() for tensor in held.values())

        channels, side, _ = model.resolved
        pixels = torch.empty(images, channels, side, side, device="meta", requires_grad=True)
        labels = torch.empty(images, dtype=torch.int64, device="meta")
        with saved_tensors_hooks(save, lambda tensor: tensor), twice_differentiable():
            loss = objective(module, module(pixels), labels)
            first = saved()
            # Kept, for what it saves lives as long as it.
            kept = torch.autograd.grad(loss, [pixels, *parameters], create_graph=True, materialize_grads=True)
        del kept
        return Footprint(size, first, saved())
    except Exception:  # what asks for values, or is bound to a device, is not counted
        return None


def is_large(scenario: Scenario) -> bool:
    """Whether a run's cost is looked at unasked: for small models that would take longer than it is worth."""
    if scenario.image_shape[1] > LARGE_SIDE or MODELS.family(scenario.model.name) is not None:
        return True
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        module = build_model(scenario.model)
    return sum(one.numel() for one in module.parameters()) > LARGE_MODEL


def _images(config: Config, world: World) -> tuple[int, int]:
    """Images in the largest batch of a client, and of a victim."""
    size = config.training.batch_size
    sizes = [len(part) for part in world.partitions] or [1]
    victims = sizes[: config.victims] or [1]
    largest, of_victim = max(sizes), max(victims)
    return (min(size, largest), min(size, of_victim)) if size else (largest, of_victim)


def _effort(attack: Attack, config: Config, world: World) -> tuple[Effort | None, int]:
    """What an attack spends on the largest victim, and the images of one of its passes."""
    victims = [len(part) for part in world.partitions][: config.victims]
    training, batch = world.scenario.training, max(1, _images(config, world)[1])
    of_update = max(batch, min(max(victims, default=1), batch * training.local_steps))
    effort = attack.effort(world.scenario, of_update)
    return effort, of_update if effort is not None and effort.whole else batch


def require_memory(config: Config, world: World) -> None:
    """Refuse (ConfigError) a model whose training would not fit into this machine's free memory."""
    if task_of(world.scenario).kind != "classify" or not is_large(world.scenario):
        return
    images = max(1, _images(config, world)[0])
    found = footprint(world.scenario.model, images, world.scenario.training.batch_norm)
    if found is None:
        return
    at_once = config.engine.actors if config.engine.name == "ray" else 1
    needed, free = found.training * at_once, free_memory()
    if needed > free:
        model, side = world.scenario.model, world.scenario.image_shape[1]
        raise ConfigError(
            f"setting 'model.name' = {model.name!r} has {found.parameters // 4:,} numbers at {side}x{side} pixels: "
            f"training it on {images} image(s){f' in {at_once} actors' if at_once > 1 else ''} takes about "
            f"{formats.size(needed)} of memory, and {formats.size(free)} are free; use a smaller model, --image-size "
            "or --batch-size, or fewer --actors"
        )


def refuse_too_large(config: Config, world: World, attack: Attack) -> None:
    """Refuse (NotApplicable) an attack that would not fit into this machine's free memory."""
    scenario = world.scenario
    if not (attack.inverts and task_of(scenario).kind == "classify" and is_large(scenario)):
        return
    effort, images = _effort(attack, config, world)
    found = footprint(scenario.model, images, scenario.training.batch_norm)
    if effort is None or found is None:
        return
    needed, free = found.attack(effort), free_memory()
    if needed > free:
        raise NotApplicable(
            f"model.name = {scenario.model.name!r}: second derivatives of a batch of {images} take about "
            f"{formats.size(needed)} of memory, and {formats.size(free)} are free; use a smaller model, --image-size "
            "or --batch-size"
        )


@lru_cache(maxsize=8)
def timed_steps(
    model: ModelConfig, batch_norm: BatchNormMode, images: int, device: str, threads: int
) -> Steps:
    """Seconds of single steps of a resolved model on noise; asking takes ten to fifty gradients' time."""
    channels, side, _ = model.resolved
    place = choose_device(device)
    with torch.random.fork_rng(devices=[]), cpu_threads(threads):
        torch.manual_seed(0)
        module = build_model(model).train(batch_norm == "train")
        labels = torch.zeros(images, dtype=torch.int64)
        noise, other = torch.rand(2, images, channels, side, side)
        trained = trained_parameters(module)
        slopes = torch.autograd.grad(
            objective(module, module(noise), labels), list(trained.values()), materialize_grads=True
        )
        shapes = tuple(tuple(one.shape) for one in slopes)
        update = Update(tuple(trained), shapes, None, torch.cat([one.flatten() for one in slopes]))
        network = Network(model, module.state_dict(), update, labels, batch_norm, place)
        other = other.to(place)
        clock = _Clock(place)
        found: list[tuple[float, float, float]] = []
        while len(found) < _MOST_TRIES and clock.total < _LONG_ENOUGH:
            clock()
            network.rms(other)
            gradient = clock()
            at = network.linearise(other, 0.1)
            graph = clock()
            back = at.pull(at.residual)
            pull = clock()
            at.push(back)
            found.append((gradient, graph + pull, (pull + clock()) / 2))
    # The first is slower than any other.
    return Steps(*(min(kind) for kind in zip(*found, strict=True)))


_MOST_TRIES = 5
_LONG_ENOUGH = 2.0
"""Tries of each step, and seconds after which there is no further one."""


class _Clock:
    """Seconds since it was last asked: of the CPU, so that neighbours do not count, or of a finished device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._alone = device.type == "cpu" and torch.get_num_threads() == 1
        self._begun = self._last = self._now()

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.process_time() if self._alone else time.perf_counter()

    def __call__(self) -> float:
        now = self._now()
        spent, self._last = now - self._last, now
        return spent

    @property
    def total(self) -> float:
        """Seconds since it was made."""
        return self._last - self._begun


def attack_costs(config: Config, world: World, attacks: Mapping[str, Attack]) -> list[Cost]:
    """What each attack will cost, in their order.

    Parameters
    ----------
    config : Config
        The run's settings.
    world : World
        Its data and scenario (:func:`fedattack.data.build_world`).
    attacks : mapping of str to Attack
        Those that apply.

    Returns
    -------
    list of Cost
        Seconds and memory are None where they are not known beforehand: of attacks that count no steps, and of models
        that cannot be looked at without training them. Asking takes seconds, on a large model half a minute.
    """
    scenario, costs = world.scenario, list[Cost]()
    classifies = task_of(scenario).kind == "classify"
    victims = config.victims * max(1, len(config.attack.rounds))
    batch_norm = scenario.training.batch_norm
    for name, attack in attacks.items():
        effort, images = _effort(attack, config, world) if classifies else (None, 0)
        if effort is None:
            costs.append(Cost(name, None, None))
            continue
        held = footprint(scenario.model, images, batch_norm)
        single = _steps(scenario, images, config.engine.device, config.engine.threads)
        seconds = None if single is None else victims * single.of(effort)
        memory = None if held is None else held.attack(effort)
        costs.append(Cost(name, seconds, memory, f"{victims} victim(s), {_in_words(effort)} each"))
    return costs


def _steps(scenario: Scenario, images: int, device: str, threads: int) -> Steps | None:
    try:
        return timed_steps(scenario.model, scenario.training.batch_norm, images, device, threads)
    except NotApplicable:  # a model that draws random numbers, or a gradient of zeros
        return None


def _in_words(effort: Effort) -> str:
    named: tuple[tuple[int, str], ...] = (
        (effort.gradients, "gradient(s)"),
        (effort.slopes, "gradients with their slope"),
        (effort.products, "Jacobian products"),
    )
    return " and ".join(f"{formats.count(count)} {what}" for count, what in named if count)


def notes(config: Config, world: World, attacks: Mapping[str, Attack]) -> list[str]:
    """What a person should hear of the cost before attacks on a large model start."""
    mine = {name: attack for name, attack in attacks.items() if attack.inverts}
    if not mine or task_of(world.scenario).kind != "classify" or not is_large(world.scenario):
        return []
    costs = attack_costs(config, world, mine)
    return [f"{cost.name}: {cost.told}" for cost in costs if (cost.seconds or 0.0) > WORTH_SAYING]
