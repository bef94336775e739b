"""A Flower app as it is, with a curious server in its strategy's place: attacked, and reported, where it trains."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import Result, Strategy
from rich.console import Console
from torch import Tensor, nn

from adversaries.needs import Facts
from adversaries.refusals import applicable
from fedattack.config import Config, ModelConfig
from fedattack.errors import ConfigError, DataError, FedattackError
from fedattack.groundtruth import GroundTruth
from fedattack.models import dry_run, resolve
from fedattack.models.live import hold
from fedattack.observation import Auxiliary, Observation, Scenario
from fedattack.storage import RunFolder, save_observation, save_truth
from simulations.engine.app_grid import AppGrid
from simulations.engine.flower_internals import server_identity
from simulations.pipeline import RunResult, attack_folder, attackable, run_directory
from strategies import Eavesdropper

log = logging.getLogger("fedattack.flower")

Truth = Callable[[int, int], tuple[Any, Any]]
"""(round, client) -> the images, float (N, C, H, W) in [0, 1], and the labels, (N,), that it trained on."""


class EavesdroppedApp(Eavesdropper):
    """A strategy with somebody reading the replies; made by :func:`eavesdrop`.

    :meth:`start` trains as the wrapped strategy does, and then attacks what was seen. `result` is the report's
    content, None until then.
    """

    result: RunResult | None = None

    def __init__(
        self,
        strategy: Strategy,
        scenario: Scenario,
        config: Config,
        rounds: Sequence[int | str],
        victims: int,
        truth: Truth | None,
        auxiliary: Auxiliary | None,
    ) -> None:
        super().__init__(strategy, scenario, auxiliary=auxiliary, seed=config.seed, as_sent=True)
        self.on_observation, self.observe = self._note, self._wants
        self.folder = RunFolder.create(run_directory(config), config)
        output = config.output.model_copy(update={"run_dir": str(self.folder.path)})
        self.config = config.model_copy(update={"output": output})
        self._truth, self._rounds, self._victims = truth, tuple(rounds), victims
        self._seen: dict[int, list[tuple[int, int]]] = {}

    def start(self, grid: Grid, initial_arrays: Any, num_rounds: int = 3, *more: Any, **how: Any) -> Result:
        """Train as the wrapped strategy does, then write the report.

        Where the attacks fail, the training's result is returned all the same: the reason is logged as an error, and
        :meth:`report` raises it again. ConfigError where an attacked round is none of this training.
        """
        numbers = [num_rounds if number == "last" else int(number) for number in self._rounds]
        if late := [number for number in numbers if number > num_rounds]:
            raise ConfigError(f"setting 'rounds' = {late[0]}: the training has {num_rounds} round(s)")
        self._rounds = tuple(dict.fromkeys(numbers))
        result = super().start(grid, initial_arrays, num_rounds, *more, **how)
        try:
            self.report()
        except FedattackError as error:
            log.error("the federation was trained, and could not be attacked: %s", error)
        return result

    def report(self) -> RunResult:
        """Attack what was seen, write the run folder with its report, and print the headline; done once.

        Raises
        ------
        BadRequest, RunFailed
            As :func:`simulations.pipeline.attack_folder`; DataError where nothing was seen, or the truth is no truth.
        """
        if self.result is None:
            if not self._seen:
                raise DataError(
                    f"no update was seen in rounds {', '.join(map(str, self._rounds))}; the log has what was rejected"
                )
            self.result = attack_folder(
                self.folder.observations,
                self.config,
                console=Console(),
                truth=None if self._truth is None else self.folder.truth,
                command="a Flower app, wrapped by fedattack.eavesdrop",
            )
        return self.result

    def _wants(self, round: int, client: int) -> bool:
        """Whether this client is one of the round's victims: the first that are read."""
        return round in self._rounds and len(self._seen.get(round, ())) < self._victims

    def _note(self, observation: Observation) -> None:
        who = observation.round, observation.client
        self._seen.setdefault(observation.round, []).append(who)
        save_observation(self.folder.observations, observation)
        if self._truth is not None:
            save_truth(self.folder.truth, _checked_truth(observation, *self._truth(*who)))


def eavesdrop(
    strategy: Strategy,
    *,
    model: nn.Module | type[nn.Module] | Callable[..., nn.Module],
    image_shape: tuple[int, int, int],
    learning_rate: float,
    batch_size: int,
    local_epochs: int | None = None,
    local_steps: int = 1,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    attack: str | Sequence[str] = "ig",
    rounds: int | str | Sequence[int | str] = 1,
    victims: int = 8,
    samples: int | None = None,
    auxiliary: Tensor | None = None,
    truth: Truth | None = None,
    run_dir: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
) -> EavesdroppedApp:
    """Put a curious server in the place of a Flower app's strategy; the app is left as it is.

    In the app's server, ``strategy = FedAvg(...)`` becomes ``strategy = eavesdrop(FedAvg(...), ...)``. Clients send
    new weights as Flower's do, with "num-examples" among their metrics (or what the strategy weights by), and may
    declare "partition-id", by which they are then called; else a client is called by its node id. After
    ``strategy.start(...)`` what was seen has been attacked, and the run folder holds pictures, certificates, labels
    and a report.

    Parameters
    ----------
    strategy
        Any Flower strategy that does not replace ``start``.
    model
        What is trained: a module, its class, or a function that makes it. Its parameters have the names of the
        app's; it takes images as the app's clients give them to theirs.
    image_shape
        (channels, height, width) of one image; height and width are equal.
    learning_rate, batch_size, local_epochs, local_steps, momentum, weight_decay
        How the clients train, by SGD: passes over their samples, or so many steps. `batch_size` 0: all samples.
    mean, std
        What the app's data pipeline takes off images in [0, 1], and divides by.
    attack
        Names of reconstruction attacks (``fedattack list attacks``).
    rounds
        Numbers from 1, or "last": those whose updates are attacked.
    victims
        Most clients of a round that are attacked.
    samples
        Of the client that has most, where that is known: attacks that cannot read so many steps are refused before
        the training, else after it.
    auxiliary
        Public images, float (N, C, H, W) in [0, 1], that the adversary has.
    truth
        In a simulation, ``truth(round, client)`` -> (images, labels) that the client trained on, images (N, C, H, W)
        in [0, 1]; answers are then scored against it, beside their floors. It is shown to no attack.
    run_dir
        An empty or new folder; None: a new one below ``runs/``.
    settings
        Any further settings, by short or dotted names: ``{"ig.iterations": 200, "seed": 1}``. The engine is
        inline unless said otherwise.

    Raises
    ------
    ConfigError, NotApplicable
        If something of it cannot be, or no attack applies; before anything is trained.
    """
    if not isinstance(strategy, Strategy):
        raise ConfigError(
            f"the strategy is a {type(strategy).__name__}; a flwr.serverapp.strategy.Strategy is needed"
        )
    if type(strategy).start is not Strategy.start:
        raise ConfigError(
            f"strategy {type(strategy).__name__} replaces start(), in which the wrapped rounds would run; accepted: "
            "strategies that leave it as it is"
        )
    shape = tuple(image_shape)
    if len(shape) != 3 or shape[1] != shape[2] or min(shape) < 1:
        raise ConfigError(
            f"image_shape = {image_shape!r}: accepted: (channels, side, side), of square images"
        )
    asked = list((rounds,) if isinstance(rounds, int | str) else rounds)
    numbers = [1 if number == "last" else number for number in asked]
    if odd := [one for one in numbers if isinstance(one, bool) or not isinstance(one, int) or one < 1]:
        raise ConfigError(f"rounds = {odd[0]!r}: accepted: numbers from 1, and 'last'")
    config = Config.from_mapping(
        {
            "attack": [attack] if isinstance(attack, str) else list(attack),
            "protocol": "fedavg",
            "compressor": "none",
            "engine": "inline",
            "learning-rate": learning_rate,
            "batch-size": batch_size,
            "local-epochs": "" if local_epochs is None else local_epochs,
            "local-steps": local_steps,
            "training.momentum": momentum,
            "training.weight_decay": weight_decay,
            "attack-rounds": numbers,
            "rounds": max(map(int, numbers), default=1),
            "victims": victims,
            "clients": max(1, victims),
            "mean": "" if mean is None else mean,
            "std": "" if std is None else std,
            "run-dir": "" if run_dir is None else str(run_dir),
        }
        | dict(settings or {})
    )
    if config.federation.pretrain:
        raise ConfigError(
            f"setting 'federation.pretrain' = {config.federation.pretrain}: the app trains as it does; start it from "
            "a trained model, or give 'rounds' that come late"
        )
    named = attackable(config)
    if other := sorted(name for name, one in named.items() if one.family != "reconstruction"):
        raise ConfigError(f"attack {other[0]!r} rebuilds no images; accepted: reconstruction attacks")
    look = ModelConfig(name=hold(model), mean=config.data.mean, std=config.data.std)
    resolved = resolve(look, shape[0], shape[1], 1)
    training = config.training
    if samples is not None:
        training = training.model_copy(update={"local_steps": training.steps(samples)})
    scenario = Scenario(resolved, training, config.compression)
    dry_run(min(batch_size or 16, 16), scenario, config.seed)
    public = None if auxiliary is None else Auxiliary(_images("auxiliary", auxiliary, shape), source="given")
    facts = Facts(
        rounds=tuple(map(int, numbers)), auxiliary=0 if public is None else len(public), labelled=False
    )
    applicable(named, scenario, facts)
    config = config.model_copy(update={"model": resolved})
    return EavesdroppedApp(strategy, scenario, config, asked, victims, truth, public)


def run_flower_app(
    server_app: ServerApp,
    client_app: ClientApp,
    *,
    clients: int,
    run_config: Mapping[str, bool | int | float | str] | None = None,
) -> None:
    """Run an ordinary Flower app in this process, without a SuperLink: in a notebook, a test, a debugger.

    `run_config` is what ``[tool.flwr.app.config]`` would hold. A client that raises an exception answers with an
    error, as under Flower.
    """
    settings = dict(run_config or {})
    grid = AppGrid(client_app, clients, settings)
    try:
        with server_identity(grid.run_id):
            server_app(grid, Context(grid.run_id, 0, {}, RecordDict(), settings))
    finally:
        grid.close()


def _images(name: str, images: Any, shape: tuple[int, ...]) -> Tensor:
    """Images, float32 (N, C, H, W) in [0, 1]; DataError where they are none."""
    found = torch.as_tensor(images)
    if found.ndim != 4 or tuple(found.shape[1:]) != shape or not len(found) or not found.is_floating_point():
        raise DataError(
            f"{name}: {found.dtype} of shape {tuple(found.shape)}; float of shape (N, "
            f"{', '.join(map(str, shape))}) is needed"
        )
    found = found.detach().to("cpu", torch.float32)
    if not bool(found.isfinite().all()) or float(found.min()) < 0 or float(found.max()) > 1:
        raise DataError(f"{name}: pixels lie outside [0, 1]; give images before they are normalised")
    return found


def _checked_truth(observation: Observation, images: Any, labels: Any) -> GroundTruth:
    """What the caller says a client trained on; DataError where that cannot be."""
    name = f"truth({observation.round}, {observation.client})"
    found, told = _images(name, images, observation.scenario.image_shape), torch.as_tensor(labels)
    if told.shape != (len(found),) or told.is_floating_point():
        raise DataError(f"{name}: labels of shape {tuple(told.shape)} for {len(found)} images")
    if len(found) != observation.num_examples:
        raise DataError(
            f"{name}: {len(found)} images, and the client declares {observation.num_examples} examples"
        )
    ids = tuple(range(len(found)))
    return GroundTruth(observation.round, observation.client, found, told.cpu().long(), ids)


__all__ = ["EavesdroppedApp", "eavesdrop", "run_flower_app"]
