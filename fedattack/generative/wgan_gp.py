"""WGAN-GP as a client's task (Gulrajani et al., Improved Training of Wasserstein GANs, 2017, algorithm 1)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch.func import functional_call

from fedattack.config import GanConfig, ModelConfig
from fedattack.errors import ConfigError, RunFailed
from fedattack.generative.nets import Gan, initialise
from fedattack.observation import Scenario
from fedattack.task import GradientStep, LocalResult, LocalRound, LossAndGradient, Task, trained_parameters
from fedattack.training import load_weights


def critic_loss(
    critic: nn.Module, real: Tensor, fake: Tensor, alpha: Tensor, penalty: float
) -> tuple[Tensor, Tensor]:
    """``mean D(fake) - mean D(real) + penalty * gp``, and gp, the mean of ``(|grad D(x)| - 1)^2``; scalars.

    x = real + alpha (fake - real), `alpha` in [0, 1], (n,); the norm is over all entries of a sample.
    """
    shape = (-1, *[1] * (real.dim() - 1))
    between = (real + alpha.reshape(shape) * (fake - real)).requires_grad_(True)
    (slope,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
    gp = (slope.flatten(1).norm(dim=1) - 1).square().mean()
    return critic(fake).mean() - critic(real).mean() + penalty * gp, gp


def generator_loss(critic: nn.Module, fake: Tensor) -> Tensor:
    """``-mean D(fake)``, a scalar."""
    return -critic(fake).mean()


def energy_distance(one: Tensor, other: Tensor) -> float:
    """``2 E|x - y| - E|x - x'| - E|y - y'|`` of pixels, of two samples (n, ...), (m, ...), n and m at least 2.

    Zero where both come from one distribution, and for no others (Székely and Rizzo, Energy statistics, 2013).
    """
    one, other = (images.flatten(1).cpu().double() for images in (one, other))  # not every device has float64
    within = [torch.cdist(x, x).sum() / (len(x) * (len(x) - 1)) for x in (one, other)]
    return float(2 * torch.cdist(one, other).mean() - sum(within))


@dataclass(frozen=True)
class CriticStep:
    """The critic's loss and gradient on a batch, :func:`critic_loss`, latents and alpha from `draws`.

    The gradient is in the order of the critic's parameters.
    """

    penalty: float
    draws: Generator

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor) -> LossAndGradient:
        """Of the batch."""
        critic, fake, alpha = self._drawn(model, images)
        loss, _ = critic_loss(critic, images, fake, alpha, self.penalty)
        return loss, torch.autograd.grad(loss, list(critic.parameters()))

    def per_sample(self, model: nn.Module, images: Tensor, labels: Tensor) -> LossAndGradient:
        """Of each image, with one generated image and one alpha of its own: (n,), and (n, ...) per parameter."""
        critic, fake, alpha = self._drawn(model, images)
        weights = {name: parameter.detach() for name, parameter in critic.named_parameters()}

        def score(state: dict[str, Tensor], image: Tensor) -> Tensor:
            found: Tensor = functional_call(critic, state, (image[None],))
            return found.sum()

        def loss(state: dict[str, Tensor], real: Tensor, made: Tensor, share: Tensor) -> Tensor:
            slope = torch.func.grad(score, argnums=1)(state, real + share * (made - real))
            gp = (slope.norm() - 1).square()
            return score(state, made) - score(state, real) + self.penalty * gp

        each = torch.func.vmap(torch.func.grad_and_value(loss), in_dims=(None, 0, 0, 0))
        gradients, losses = each(weights, images, fake, alpha)
        return losses, tuple(gradients[name] for name in weights)

    def _drawn(self, model: nn.Module, images: Tensor) -> tuple[nn.Module, Tensor, Tensor]:
        """The critic, as many generated images, and the alphas, (n,)."""
        assert isinstance(model, Gan)
        with torch.no_grad():
            fake = model.sample(len(images), self.draws)
        return model.critic, fake, torch.rand(len(images), generator=self.draws).to(images.device)


class WganGp(Task):
    """Make images like the clients': a generator, and a critic whose gradient is held near length 1.

    A local step is one of the critic's, on one batch; after every :attr:`GanConfig.critic_steps` of them the
    generator takes one. Both use Adam, whose state starts anew in each round. What is measured, "loss", is
    the energy distance between held-out images and as many generated ones.
    """

    kind = "generate"
    called = ("energy distance", "critic's loss")

    def check(self, scenario: Scenario) -> None:
        """Refuse a protocol, or a number of steps, with which no generator is trained."""
        training, steps = scenario.training, scenario.gan.critic_steps
        if training.protocol != "fedavg":
            raise ConfigError(
                f"setting 'training.protocol' = {training.protocol!r}: task 'wgan-gp' needs 'fedavg'"
            )
        for name in ("momentum", "weight_decay"):
            if getattr(training, name):
                raise ConfigError(
                    f"setting 'training.{name}' = {getattr(training, name)}: task 'wgan-gp' uses Adam; needs 0 here, "
                    "see gan.beta1 and gan.beta2"
                )
        if training.local_epochs is not None:
            raise ConfigError(
                f"setting 'training.local_epochs' = {training.local_epochs}: task 'wgan-gp' counts steps of the "
                f"critic; use training.local_steps, a multiple of gan.critic_steps = {steps}"
            )
        if training.local_steps % steps:
            raise ConfigError(
                f"setting 'training.local_steps' = {training.local_steps}: accepted under task 'wgan-gp': a multiple "
                f"of gan.critic_steps = {steps}, after which the generator takes one step"
            )

    def model(self, model: ModelConfig, gan: GanConfig) -> ModelConfig:
        """With what is sent."""
        if not model.name.startswith("wgan-gp"):
            raise ConfigError(
                f"setting 'model.name' = {model.name!r}: task 'wgan-gp' trains a generator and a critic; accepted: "
                "wgan-gp-mlp, wgan-gp"
            )
        if model.activation != "relu":
            raise ConfigError(
                f"setting 'model.activation' = {model.activation!r}: task 'wgan-gp' has nets with their own (ReLU, "
                "LeakyReLU); leave it open"
            )
        return model.model_copy(update={"nets": gan.share})

    def keeps_memory(self, scenario: Scenario) -> bool:
        """Critics stay at home."""
        return scenario.gan.share == "generator"

    def step(self, scenario: Scenario, draws: Generator) -> GradientStep:
        """The critic's; the gradient is in the order of its parameters."""

        return CriticStep(scenario.gan.penalty, draws)

    def stepped(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The critic's parameters, none where it stays at home."""
        assert isinstance(model, Gan)
        critic = {id(parameter) for parameter in model.critic.parameters()}
        return {name: one for name, one in trained_parameters(model).items() if id(one) in critic}

    def train(self, model: nn.Module, given: LocalRound) -> LocalResult:
        """The change of the nets that are sent; a critic that stays at home is in the memory."""
        assert isinstance(model, Gan)
        training, gan = given.scenario.training, given.scenario.gan
        load_weights(model, given.weights)
        model.train()
        device, home = next(model.parameters()).device, gan.share == "generator"
        critic = model.critic.to(device)
        if home and given.memory:
            load_weights(critic, given.memory)
        elif home:
            initialise(critic, given.draws)
        nets = [list(net.parameters()) for net in (critic, model.generator)]
        settings = {"lr": training.learning_rate, "betas": (gan.beta1, gan.beta2)}
        for_critic, for_generator = (torch.optim.Adam(part, **settings) for part in nets)  # type: ignore[arg-type]
        losses: list[Tensor] = []
        for number, batch in enumerate(given.batches, start=1):
            index = torch.from_numpy(batch)
            shown = given.images[index].to(device), given.labels[index].to(device)
            loss, slope = given.step(model, *shown)
            losses.append(loss.detach())
            _move(for_critic, nets[0], slope)
            if number % gan.critic_steps == 0:
                cost = generator_loss(critic, model.sample(len(batch), given.draws))
                _move(for_generator, nets[1], torch.autograd.grad(cost, nets[1]))
        loss_now = float(torch.stack(losses).mean())
        if not math.isfinite(loss_now):
            raise RunFailed(
                f"local training diverged: the critic's loss became {loss_now} (learning_rate "
                f"{training.learning_rate}, {len(given.batches)} steps); lower 'training.learning_rate'"
            )
        update = {
            name: parameter.detach() - given.weights[name].to(device)
            for name, parameter in trained_parameters(model).items()
        }
        kept = {name: tensor.detach().clone() for name, tensor in critic.state_dict().items()} if home else {}
        seen = int(np.unique(np.concatenate(given.batches)).size)
        return LocalResult(update, {}, loss_now, seen, kept)

    def measure(self, model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, float]:
        """Energy distance between the images and as many generated ones, times their number; at least 2."""
        assert isinstance(model, Gan)
        made = model.sample(max(2, len(images)), torch.Generator().manual_seed(0))
        distance = energy_distance(images, made) if len(images) > 1 else math.nan
        return {"loss": distance * len(images)}

    def output(self, model: ModelConfig) -> tuple[int, ...]:
        """The critic's score."""
        return (1,)


def _move(
    optimiser: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], slope: Sequence[Tensor]
) -> None:
    """One step along given gradients."""
    for parameter, part in zip(parameters, slope, strict=True):
        parameter.grad = part
    optimiser.step()
