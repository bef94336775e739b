"""The client: one ClientApp object for every engine, inline, on Ray actors and under ``flwr run``."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from numpy.typing import NDArray
from torch import Tensor, nn

from adversaries import ATTACKS
from adversaries.seats import ClientView, MaliciousClient, Oracle
from fedattack.canaries import Canaries, choose_canaries
from fedattack.compression import Compressor, Memory, build_compressor, encode
from fedattack.compression.carrier import to_array
from fedattack.config import Config, EngineConfig
from fedattack.defenses import ClientDefenses, Defense, build_defenses
from fedattack.errors import ConfigError, DataError, RunFailed
from fedattack.models import build_model
from fedattack.observation import Candidates, Scenario, UnlearningRequest
from fedattack.registry import build_plugin
from fedattack.rng import adversary_seed, numpy_rng, torch_rng
from fedattack.task import GradientStep, LocalResult, LocalRound, Task, task_of, trained_parameters
from fedattack.training import (
    DIVERGED,
    HOPELESS_LOSS,
    batches_without,
    evaluate,
    load_weights,
    local_update,
    objective_step,
    remaining_positions,
    sample_logits,
)
from fedattack.unlearning.requests import Registered
from simulations.experiments.executor import choose_device
from strategies import messages as wire
from strategies.forgetting import deletion_records
from strategies.light_records import HeldArray, LightArrays, LightMetrics, LightRecords

if TYPE_CHECKING:
    from fedattack.data import World

_MEMORY = "memory"
_TASK_MEMORY = "memory of the task"
_ATTACK_MEMORY = "memory of {attack}"
_UNUSED = torch.Generator()

app = ClientApp()


@dataclass(eq=False)
class Workplace:
    """What all clients of one process share: settings, the data as stored, one model that is used again and again.

    `images` are the whole data set, uint8 (N, C, S, S), read-only where they lie in Ray's shared memory, `labels`
    int64 (N,), `partitions` the sample ids of each client.
    """

    config: Config
    scenario: Scenario
    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    partitions: tuple[NDArray[np.int64], ...]

    def __post_init__(self) -> None:
        self._latest: tuple[ArrayRecord, dict[str, Tensor]] | None = None
        self._registered: dict[int, Registered] = {}

    @classmethod
    def of(cls, config: Config, world: World) -> Workplace:
        """The workplace of a world."""
        return cls(
            config, world.scenario, world.dataset.images, world.dataset.labels, tuple(world.partitions)
        )

    @cached_property
    def device(self) -> torch.device:
        """Where clients compute."""
        return client_device(self.config.engine)

    @cached_property
    def model(self) -> nn.Module:
        """Scratch space of all clients."""
        return build_model(self.scenario.model).to(self.device)

    @cached_property
    def compressor(self) -> Compressor:
        """The agreed compressor."""
        sent = trained_parameters(build_model(self.scenario.model))
        shapes = [tuple(parameter.shape) for parameter in sent.values()]
        return build_compressor(self.scenario.compression, list(sent), shapes)

    @cached_property
    def task(self) -> Task:
        """What is trained and measured."""
        return task_of(self.scenario)

    def drawing(self, forgetting: bool) -> Config:
        """The settings by whose seed clients draw: in rounds of forgetting another one, where draws are anew."""
        return self._anew if forgetting and self.config.unlearning.draws == "anew" else self.config

    @cached_property
    def _anew(self) -> Config:
        seed = int(numpy_rng(self.config.seed, "draws of forgetting").integers(2**31))
        return self.config.model_copy(update={"seed": seed})

    @cached_property
    def one_gradient(self) -> Scenario:
        """The agreed training cut down to one gradient, sent as the update."""
        one = {"protocol": "fedsgd", "local_steps": 1, "local_epochs": None}
        return replace(self.scenario, training=self.scenario.training.model_copy(update=one))

    @cached_property
    def defenses(self) -> tuple[Defense, ...]:
        """The agreed defences, in their order."""
        return tuple(build_defenses(self.scenario.defense).values())

    @cached_property
    def canaries(self) -> Canaries | None:
        """What is planted among the clients to measure their noise."""
        sizes = [len(ids) for ids in self.partitions]
        return choose_canaries(self.config, sizes, self.scenario.model.resolved[2])

    @cached_property
    def attackers(self) -> dict[str, MaliciousClient]:
        """What the run's malicious clients carry out, by name."""
        options = self.config.attack
        own, shared = options.options, options.shared_options
        built = {
            name: build_plugin(ATTACKS.get(name), name, own.get(name, {}), shared) for name in options.names
        }
        return {name: attack for name, attack in built.items() if isinstance(attack, MaliciousClient)}

    @property
    def stateful(self) -> bool:
        """Whether clients keep anything from round to round."""
        hostile = any(one.keeps_memory for one in self.attackers.values())
        return self.compressor.stateful or hostile or self.task.keeps_memory(self.scenario)

    def weights(self, record: ArrayRecord) -> dict[str, Tensor]:
        """The broadcast as tensors, opened once for all clients that got the same one."""
        if self._latest is None or self._latest[0] is not record:
            self._latest = record, wire.to_tensors(record)
        return self._latest[1]

    def samples(self, client: int, positions: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Images float32 (n, C, S, S) in [0, 1] and labels int64 (n,) at `positions` of a client's partition.

        What a malicious client planted stands in the place of its own.
        """
        if client in self.planted:
            images, labels = self.planted[client]
            return images[positions], labels[positions]
        return self.own(client, positions)

    def own(self, client: int, positions: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """The same, of what the client was dealt, whatever it planted later."""
        ids = self.partitions[client][positions]
        images = torch.from_numpy(self.images[ids]).float().div_(255.0)
        return images, torch.from_numpy(self.labels[ids])

    @cached_property
    def planted(self) -> dict[int, tuple[Tensor, Tensor]]:
        """Malicious client -> all samples that it trains on, where it planted any."""
        found: dict[int, tuple[Tensor, Tensor]] = {}
        for client in sorted(set(self.config.attack.malicious_clients)):
            for name, attack in self.attackers.items():
                if type(attack).plant is MaliciousClient.plant:
                    continue
                before = found.get(client) or self.own(client, np.arange(len(self.partitions[client])))
                named = dict(zip(("images", "labels"), before, strict=True))
                after = attack.plant(self.planting(name, client), *before)
                changed = _alike(attack, named, dict(zip(named, after, strict=True)))
                found[client] = changed["images"], changed["labels"]
        return found

    def registered(self, client: int) -> Registered:
        """What a client registers of its samples before the first round, under a salt of its own."""
        if client not in self._registered:
            salt = numpy_rng(self.config.seed, "registration", client).bytes(16)
            samples = self.samples(client, np.arange(len(self.partitions[client])))
            self._registered[client] = Registered.of(*samples, salt)
        return self._registered[client]

    def planting(self, name: str, client: int) -> ClientView:
        """What attack `name` has before it when it plants."""
        seed = adversary_seed(self.config.seed, f"plant of {name}", client)
        return ClientView(0, client, self.scenario, {}, seed, {}, self.config.attack.requests)


def client_device(engine: EngineConfig) -> torch.device:
    """Where clients compute. Under "auto": on CUDA if `gpus_per_actor` grants them a share of one, else on the CPU.

    The rule does not ask what the machine has, so that the engine cannot change a result.
    """
    if engine.device != "auto":
        return choose_device(engine.device)
    return choose_device("cuda") if engine.gpus_per_actor > 0 else torch.device("cpu")


_PLACES: dict[int, Workplace] = {}


def open_workplace(run_id: int, place: Workplace) -> None:
    """Use `place` for the clients of run `run_id` in this process."""
    _PLACES[run_id] = place


def close_workplace(run_id: int) -> None:
    """Forget the workplace of a run."""
    _PLACES.pop(run_id, None)


def _workplace(context: Context) -> Workplace:
    """The run's workplace; under ``flwr run`` nobody opened one, and each process builds its own."""
    if context.run_id in _PLACES:
        return _PLACES[context.run_id]
    return _built(Config.from_mapping(context.run_config).model_dump_json())


@lru_cache(maxsize=1)
def _built(settings: str) -> Workplace:
    from fedattack.data import build_world

    torch.set_num_threads(1)
    config = Config.model_validate_json(settings)
    return Workplace.of(config, build_world(config))


# ---------------------------------------------------------------------- who, when, which samples


def _identity(message: Message, context: Context) -> tuple[int, ConfigRecord]:
    client = context.node_config[wire.PARTITION]
    assert isinstance(client, int)
    config = message.content[wire.CONFIG]
    assert isinstance(config, ConfigRecord)
    return client, config


def round_batches(
    config: Config, size: int, round: int, client: int, excluded: Collection[int] = ()
) -> list[NDArray[np.int64]]:
    """Positions in the client's partition of each local step's batch; a pure function, also for the auditor.

    Without the `excluded` positions, as ``unlearning.draws`` says (:func:`fedattack.training.batches_without`).
    """
    draws = config.unlearning.draws
    return batches_without(size, config.training, config.seed, round, client, excluded, draws)


def used_positions(batches: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    """The distinct positions that a round's batches hold, in the order in which the client reads them."""
    return batches[0] if len(batches) == 1 else np.unique(np.concatenate(batches))


def share_of(share: float, steps: int) -> int:
    """How many of a round's steps a share of them is: at least one."""
    return max(1, int(share * steps + 0.5))


def drops_out(config: Config, round: int, client: int) -> bool:
    """Whether a drawn client does not answer in this round."""
    chance = config.federation.dropout
    return chance > 0 and float(numpy_rng(config.seed, "dropout", round, client).random()) < chance


def _excluded(config: ConfigRecord) -> list[int]:
    positions = config.get(wire.EXCLUDED, [])
    assert isinstance(positions, list)
    return [int(position) for position in positions]


def exclusion_settings(excluded: Mapping[int, Collection[int]]) -> dict[int, dict[str, Any]]:
    """Client -> the entry of its own instructions that tells it what it no longer trains on."""
    return {
        client: {wire.EXCLUDED: sorted(int(p) for p in positions)}
        for client, positions in sorted(excluded.items())
        if positions
    }


# ---------------------------------------------------------------------- what it answers


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train on the round's batches and answer with the compressed update."""
    place = _workplace(context)
    client, settings = _identity(message, context)
    round = settings[wire.ROUND]
    assert isinstance(round, int)
    if drops_out(place.config, round, client):
        return Message(Error(wire.DROPPED_OUT, "dropped out"), reply_to=message)
    arrays = message.content[wire.ARRAYS]
    assert isinstance(arrays, ArrayRecord)
    excluded, size = _excluded(settings), len(place.partitions[client])
    forgetting = bool(settings.get(wire.FORGETTING, False))
    drawing = place.drawing(forgetting)
    asked_for = settings.get(wire.OBJECTIVE)
    assert asked_for is None or isinstance(asked_for, str)
    whole = [remaining_positions(size, excluded)]
    if excluded and not len(whole[0]):
        return Message(Error(wire.DROPPED_OUT, "all of its samples were deleted"), reply_to=message)
    batches = whole if asked_for else round_batches(drawing, size, round, client, excluded)
    share = settings.get(wire.SHARE, 1.0)
    assert isinstance(share, float)
    # A step whose whole batch was deleted moves nothing, by weight decay neither.
    batches = [batch for batch in batches[: share_of(share, len(batches))] if len(batch)]
    if not batches:
        return Message(Error(wire.DROPPED_OUT, "all of this round's batches were deleted"), reply_to=message)
    used = used_positions(batches)
    images, labels = place.samples(client, used) if round > 0 else place.own(client, used)
    weights = place.weights(arrays)
    seats = _seats(place, context, round, client, weights, message.content, forgetting)
    for attack, view in seats.values():
        attack.see(view)
        poisoned = attack.poison(view, images, labels)
        own = {"images": images, "labels": labels}
        images, labels = _alike(attack, own, dict(zip(own, poisoned, strict=True))).values()
    steps = [np.arange(len(used))] if len(batches) == 1 else [np.searchsorted(used, b) for b in batches]
    mu = float(settings.get("proximal-mu", 0.0))
    draws = torch_rng(drawing.seed, "training", round, client)
    plain = (
        objective_step(asked_for)
        if asked_for not in (None, "loss")
        else place.task.step(place.scenario, draws)
    )
    planted = place.canaries.step if place.canaries else None
    if place.canaries:
        labels = place.canaries.coded(client, used, labels)
    defended = ClientDefenses(place.defenses, drawing.seed, round, client, plain, planted)
    shown = defended.images(images)
    if mu == 0.0 or len(steps) == 1:  # the proximal term has no gradient at the received weights
        known, step = _recalled(context, _TASK_MEMORY), defended.gradient
        scenario = place.one_gradient if asked_for else place.scenario
        given = LocalRound(weights, shown, labels, steps, scenario, step, draws, known)
        result = place.task.train(place.model, given)
    elif not place.task.proximal:
        raise ConfigError(no_proximal_term(place.config))
    else:
        result = _train_proximal(place, weights, shown, labels, steps, mu, defended.gradient)
    if round < 1 and place.task.kind == "classify" and not result.loss < HOPELESS_LOSS:
        raise RunFailed(f"{DIVERGED}: its loss became {result.loss:.3g}")
    trained = place.canaries.update(client, result.update) if place.canaries else result.update
    update = defended.update(trained)
    for attack, view in seats.values():
        update = _alike(attack, update, attack.reply(view, update))
    random = place.compressor.draws
    generator = torch_rng(drawing.seed, "compression", round, client) if random else _UNUSED
    packet, memory = place.compressor.compress(update, Memory(_recalled(context, _MEMORY)), round, generator)
    _remember(context, _MEMORY, memory.tensors)
    _remember(context, _TASK_MEMORY, result.memory)
    for name, (attack, view) in seats.items():
        if view.memory and not attack.keeps_memory:
            why = "keeps memory and does not say so: set 'keeps_memory' of its class"
            raise ConfigError(f"attack {name!r} {why}")
        _remember(context, _ATTACK_MEMORY.format(attack=name), view.memory)
    reply = {wire.PACKED: to_array(encode(packet), place.compressor.numel)}
    for name, buffer in result.buffers.items():
        reply[name] = HeldArray(buffer.cpu().numpy())
    metrics = LightMetrics(
        {wire.NUM_EXAMPLES: result.num_examples, wire.TRAIN_LOSS: result.loss, wire.PARTITION: client}
    )
    answer: dict[str, Any] = {wire.UPDATE: LightArrays(reply), wire.METRICS: metrics}
    asking = {name: seat for name, seat in seats.items() if seat[0].asks_in(seat[1])}
    answer |= _asked(place, client, asking, weights, excluded)
    return Message(LightRecords(answer), reply_to=message)


def no_proximal_term(config: Config) -> str:
    """Why a task whose clients do not minimise one loss cannot have FedProx's term."""
    return (
        f"setting 'federation.strategy' = {config.federation.strategy!r}: adds a proximal term to one loss, and task "
        f"{config.training.task!r} has two; use fedavg or a server optimiser"
    )


def _train_proximal(
    place: Workplace,
    weights: dict[str, Tensor],
    images: Tensor,
    labels: Tensor,
    batches: list[NDArray[np.int64]],
    mu: float,
    step: GradientStep,
) -> LocalResult:
    """SGD on the loss plus ``mu / 2 * |w - received|^2`` (Li et al., FedProx, 2020), one plain step at a time."""
    training = place.scenario.training
    if training.momentum:
        raise ConfigError(
            f"setting 'training.momentum' = {training.momentum}: strategy 'fedprox' needs 0 here"
        )
    received = {name: weights[name].to(place.device) for name in trained_parameters(place.model)}
    drift = {name: torch.zeros_like(tensor) for name, tensor in received.items()}
    current = dict(weights)
    losses: list[float] = []
    for batch in batches:
        result = local_update(place.model, current, images, labels, [batch], training, step)
        losses.append(result.loss)
        current |= result.buffers
        for name, tensor in received.items():
            drift[name] = drift[name] + result.update[name] - training.learning_rate * mu * drift[name]
            current[name] = tensor + drift[name]
    return replace(result, update=drift, loss=float(np.mean(losses)), num_examples=len(images))


def _recalled(context: Context, key: str) -> dict[str, Tensor]:
    record = context.state.get(key)
    if not isinstance(record, ArrayRecord):
        return {}
    return {name: torch.from_numpy(_writable(array)) for name, array in record.items()}


def _writable(array: Any) -> NDArray[Any]:
    """What a client keeps, as memory that torch accepts: Ray's store and the journal are read-only."""
    value = array.view() if isinstance(array, HeldArray) else array.numpy()
    return value if value.flags.writeable else value.copy()


def _remember(context: Context, key: str, tensors: dict[str, Tensor]) -> None:
    if tensors:
        context.state[key] = wire.to_record(tensors)


def _seats(
    place: Workplace,
    context: Context,
    round: int,
    client: int,
    weights: dict[str, Tensor],
    told: RecordDict | None = None,
    forgetting: bool = False,
) -> dict[str, tuple[MaliciousClient, ClientView]]:
    """What a malicious client carries out, by name, each with its view; nothing for an honest one.

    `told`: the instruction, which may hold questions. Before round 1 all are honest.
    """
    if round < 1 or client not in place.config.attack.malicious_clients:
        return {}
    seats, requests = {}, place.config.attack.requests
    gone = tuple(_excluded(told.config_records[wire.CONFIG])) if told else ()
    for name, attack in place.attackers.items():
        seed = adversary_seed(place.config.seed, f"client seat of {name}", round, client)
        memory = _recalled(context, _ATTACK_MEMORY.format(attack=name))
        tag = wire.tag_of(place.config.seed, name)
        asked = told.array_records.get(wire.QUESTION_OF.format(tag=tag)) if told else None
        question = _question(asked) if asked is not None else None
        shown = dict(weights) if attack.access == "weights" else {}
        view = ClientView(round, client, place.scenario, shown, seed, memory, requests, question)
        seats[name] = attack, replace(view, forgetting=forgetting, excluded=gone)
    return seats


def asking(
    model: nn.Module, attack: MaliciousClient, view: ClientView, weights: dict[str, Tensor]
) -> ClientView:
    """The view of a client that asks for deletions, with the access to the global model that its attack has.

    `model` is scratch space: it takes the weights.
    """
    if attack.access == "none":
        return view
    load_weights(model, weights)
    model.eval()
    if attack.access == "weights":
        return replace(view, model=model)

    def answered(images: Tensor) -> Tensor:
        return sample_logits(model, model.state_dict(), images).softmax(1)

    return replace(view, oracle=Oracle(answered, attack.query_limit()))


def _question(record: ArrayRecord) -> Candidates:
    tensors = wire.to_tensors(record)
    return Candidates(tensors["images"], tensors["labels"])


def _alike(attack: MaliciousClient, before: dict[str, Tensor], after: dict[str, Tensor]) -> dict[str, Tensor]:
    """`after`, which is to hold tensors of the same names, shapes and types as `before`."""
    kinds = [{name: (t.shape, t.dtype) for name, t in tensors.items()} for tensors in (before, after)]
    if kinds[0] != kinds[1]:
        raise ConfigError(
            f"attack {type(attack).__name__} must leave {', '.join(before)} their number, shapes and types"
        )
    return after


@app.evaluate()
def evaluate_global(message: Message, context: Context) -> Message:
    """Loss and accuracy of the global model on the client's own samples, without those that it is told to exclude."""
    place = _workplace(context)
    client, settings = _identity(message, context)
    arrays = message.content[wire.ARRAYS]
    assert isinstance(arrays, ArrayRecord)
    left = remaining_positions(len(place.partitions[client]), _excluded(settings))
    images, labels = place.samples(client, left)
    figures = evaluate(place.model, place.weights(arrays), images, labels, task=place.task)
    metrics = MetricRecord({wire.NUM_EXAMPLES: len(labels), **figures})
    return Message(RecordDict({wire.METRICS: metrics}), reply_to=message)


@app.query("whoami")
def whoami(message: Message, context: Context) -> Message:
    """Which client of the federation this node is."""
    client, _ = _identity(message, context)
    return Message(RecordDict({wire.METRICS: MetricRecord({wire.PARTITION: client})}), reply_to=message)


@app.query("answer")
def answer(message: Message, context: Context) -> Message:
    """What a malicious client's attack says of the samples it is asked about.

    The instruction's configuration has the attack's tag, its arrays :data:`QUESTION` are the samples.
    """
    place = _workplace(context)
    client, settings = _identity(message, context)
    round, tag = settings[wire.ROUND], settings[wire.TAG]
    arrays, asked = message.content[wire.ARRAYS], message.content[wire.QUESTION]
    assert isinstance(round, int)
    assert isinstance(arrays, ArrayRecord)
    assert isinstance(asked, ArrayRecord)
    seats = _seats(place, context, round, client, place.weights(arrays))
    attack, view = next(seat for name, seat in seats.items() if wire.tag_of(place.config.seed, name) == tag)
    answers = attack.answer(view, _question(asked))
    return Message(RecordDict({wire.UPDATE: wire.to_record(answers)}), reply_to=message)


@app.query("unlearn")
def unlearn(message: Message, context: Context) -> Message:
    """Ask the server to forget: a malicious client what its attacks choose, all others nothing."""
    place = _workplace(context)
    client, settings = _identity(message, context)
    round, arrays = settings[wire.ROUND], message.content[wire.ARRAYS]
    assert isinstance(round, int)
    assert isinstance(arrays, ArrayRecord)
    weights, times = place.weights(arrays), settings.get(wire.TIMES, 0)
    assert isinstance(times, int)
    seats = {
        name: (attack, replace(view, times=times, invited=True))
        for name, (attack, view) in _seats(place, context, round, client, weights).items()
    }
    asked = _asked(place, client, seats, weights, _excluded(settings))
    return Message(RecordDict(asked), reply_to=message)


def _asked(
    place: Workplace,
    client: int,
    seats: Mapping[str, tuple[MaliciousClient, ClientView]],
    weights: dict[str, Tensor],
    excluded: Collection[int],
) -> dict[str, Any]:
    """The deletion requests of a client's attacks, as records."""
    if not seats:
        return {}
    left = remaining_positions(len(place.partitions[client]), excluded)
    if not len(left):
        raise DataError(f"client {client} has no samples left to forget")
    requests: list[tuple[str, UnlearningRequest]] = []
    for name, (attack, view) in seats.items():
        own, tag = range(len(left)), wire.tag_of(place.config.seed, name)
        view = asking(place.model, attack, view, weights)
        for request in attack.asked(view, *place.samples(client, left)):
            positions = [int(left[p]) if isinstance(p, int) and p in own else p for p in request.positions]
            requests.append((tag, replace(request, positions=tuple(positions))))
    return deletion_records(requests)
