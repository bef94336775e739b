"""Models that are no configuration: live modules, classes and factories, called with what their signature takes."""

from __future__ import annotations

import copy
import hashlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fedattack.config import ModelConfig
from fedattack.errors import ConfigError
from fedattack.files import content_hash
from fedattack.models.registry import MODELS
from fedattack.rng import torch_rng

PREFIX = "live:"
"""What the name of a model that only this process knows begins with."""

CONTRACT = (
    "a model is an nn.Module, or a class or function that makes one from what it asks for: config (a ModelConfig), "
    "classes, channels, image_size, or nothing"
)

_GIVEN: dict[str, tuple[str, ...]] = {
    "classes": ("classes", "num_classes", "n_classes", "num_labels", "out_features"),
    "channels": ("channels", "in_channels", "in_chans", "num_channels", "input_channels"),
    "image_size": ("image_size", "img_size", "input_size"),
    "width": ("width",),
    "activation": ("activation",),
}
"""Field of the configuration -> what a parameter that takes it may be called."""

_CONFIG = ("config", "model_config", "cfg")

# Operations that nn.Modules and functions alike come down to.
_ACTIVATIONS = {
    "relu": "relu",
    "sigmoid": "sigmoid",
    "tanh": "tanh",
    "gelu": "gelu",
    "softplus": "softplus",
}
_OTHERS = {"silu", "elu", "leaky_relu", "hardtanh", "hardswish", "hardsigmoid", "mish", "prelu", "celu", "selu",
           "log_sigmoid_forward", "_prelu_kernel", "rrelu", "rrelu_with_noise", "threshold", "glu"}  # fmt: skip


class Live:
    """A builder of fresh copies of a live module, or of what a class or factory makes.

    `known` are the weights of an instance, or None.
    """

    def __init__(self, source: Any) -> None:
        self.known = isinstance(source, nn.Module)
        self._source = _copied(source) if self.known else source

    def __call__(self, model: ModelConfig) -> nn.Module:
        """A module of its own, float32."""
        if isinstance(self._source, nn.Module):
            return copy.deepcopy(self._source)
        made = called(self._source, model)
        # A factory may hand out the same module each time.
        return made.float() if isinstance(self._source, type) else _copied(made)

    def digest(self) -> str:
        """What tells this model from others: its class, layers and weights, or its source; hexadecimal digits."""
        source = self._source
        if isinstance(source, nn.Module):
            texts = [type(source).__module__, type(source).__qualname__, str(source)]
            texts.append(str([parameter.requires_grad for parameter in source.parameters()]))
            texts += [_plain(part) for part in source.modules()]
            if not any(isinstance(part, nn.modules.lazy.LazyModuleMixin) for part in source.modules()):
                texts.append(content_hash(source.state_dict()))
        else:
            texts = [getattr(source, "__module__", ""), getattr(source, "__qualname__", repr(type(source)))]
            try:
                texts.append(inspect.getsource(source))
            except (OSError, TypeError):  # typed in a shell
                texts.append(repr(getattr(source, "__code__", source)))
        return hashlib.sha256("\n".join(texts).encode()).hexdigest()


def _plain(part: nn.Module) -> str:
    """What a module has beside its weights and parts, as far as it can be told from one process to the next."""
    own = {name: value for name, value in vars(part).items() if not name.startswith("_")}
    return str(
        sorted(
            (name, getattr(value, "__qualname__", None) or repr(value))
            for name, value in own.items()
            if isinstance(value, int | float | str | tuple | list | None) or hasattr(value, "__qualname__")
        )
    )


def hold(model: nn.Module | type[nn.Module] | Callable[..., nn.Module], name: str | None = None) -> str:
    """Make a model known to :data:`fedattack.models.MODELS` in this process, and answer its name there.

    The name ends in a digest of the model, so that the same one is found again and another is not taken for it.

    Parameters
    ----------
    model
        A module, which is copied now: its weights, of any number type, are the first ones, in float32, and what is
        frozen (``requires_grad`` False) stays so. Or a class or function that makes one, called with what its
        signature takes (the configuration, classes, channels, image_size, or nothing); its own draws are the first
        weights.
    name : str, optional
        What it is called; None: its class.

    Raises
    ------
    ConfigError
        If it is neither, or cannot be copied.
    """
    if isinstance(model, nn.Module):
        while isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
    elif not callable(model):
        raise ConfigError(f"the model is a {type(model).__name__}; {CONTRACT}")
    said = str(name or getattr(model, "__name__", type(model).__name__))
    held = Live(model)
    said = "".join(letter if letter.isalnum() or letter in "_.-" else "_" for letter in said).lstrip(".")
    key = f"{PREFIX}{said}-{held.digest()[:8]}"
    MODELS.add(key, held)
    return key


@contextmanager
def held(model: nn.Module | type[nn.Module] | Callable[..., nn.Module]) -> Iterator[str]:
    """The name by which a model is known inside the block, and after it where it was known before."""
    before = set(MODELS)
    name = hold(model)
    try:
        yield name
    finally:
        if name not in before:
            MODELS.discard(name)


def called(builder: Callable[..., Any], model: ModelConfig) -> nn.Module:
    """What a class or function makes, given what its signature takes; ConfigError where that is no module."""
    refusal = f"setting 'model.name' = {model.name!r}:"
    if isinstance(builder, nn.Module):
        return _copied(builder)
    if not callable(builder):
        raise ConfigError(f"{refusal} it is a {type(builder).__name__}; {CONTRACT}")
    try:
        positional, named = _arguments(builder, model, refusal)
        made = builder(*positional, **named)
    except TypeError as error:
        raise ConfigError(f"{refusal} cannot be made: {error}; {CONTRACT}") from error
    if not isinstance(made, nn.Module):
        what = f"the class {made.__name__}" if isinstance(made, type) else f"a {type(made).__name__}"
        raise ConfigError(f"{refusal} it makes {what}; {CONTRACT}")
    return made


def _arguments(
    builder: Callable[..., Any], model: ModelConfig, refusal: str
) -> tuple[list[Any], dict[str, Any]]:
    """Positional and keyword arguments that a builder takes of a configuration."""
    if isinstance(builder, Live):
        return [model], {}
    try:
        signature = inspect.signature(builder)
    except (TypeError, ValueError):  # written in C
        return [], {}
    positional: list[Any] = []
    named: dict[str, Any] = {}
    fields = {alias: field for field, aliases in _GIVEN.items() for alias in aliases}
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = [n for n, p in signature.parameters.items() if p.default is p.empty and p.kind not in kinds]
    alone = needed[0] if len(needed) == 1 and needed[0] not in fields else None  # whatever it is called
    for name, parameter in signature.parameters.items():
        required = parameter.default is parameter.empty
        if parameter.kind in kinds:
            continue
        hint = str(parameter.annotation)
        if name in _CONFIG or "ModelConfig" in hint or name == alone:
            value: Any = model
        elif name in fields and (found := getattr(model, fields[name])) is not None:
            if not required and fields[name] in ("width", "activation", "image_size"):
                continue  # its own default is meant
            value = found
        elif required:
            raise ConfigError(f"{refusal} it asks for {name!r}, which nobody gives; {CONTRACT}")
        else:
            continue
        if parameter.kind is parameter.POSITIONAL_ONLY:
            positional.append(value)
        else:
            named[name] = value
    return positional, named


def _copied(module: nn.Module) -> nn.Module:
    """A float32 copy of its own on the CPU."""
    try:
        return copy.deepcopy(module).float().cpu()
    except Exception as error:
        raise ConfigError(
            f"the model {type(module).__name__} cannot be copied ({error}); detach what it keeps of earlier calls, "
            "or give its class or a function that makes it"
        ) from error


def seeded(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """A module whose own draws at construction are of (seed, "model"), whatever the global stream was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**62, (1,), generator=torch_rng(seed, "model own"))))
        return make()


class _Recorder(TorchDispatchMode):
    """Notes the names of the operations that are carried out."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.add(func.overloadpacket.__name__.removesuffix("_"))
        return func(*args, **(kwargs or {}))


def traits(module: nn.Module, image_shape: tuple[int, int, int]) -> tuple[str, tuple[int, ...]]:
    """The activation of a model, and the shape of its answer to one image; found by one pass over two images.

    "other" where none of the activations with a name is the only one. Whatever the module raises is passed on.
    """
    images = torch.rand(2, *image_shape, generator=torch_rng(0, "traits"))
    images = images.to(next((tensor.device for tensor in module.state_dict().values()), images.device))
    training = [part for part in module.modules() if part.training]
    recorder = _Recorder()
    with torch.no_grad(), recorder:
        answer = module.eval()(images)
    for part in training:
        part.training = True
    if not isinstance(answer, Tensor):
        raise ConfigError(f"answers a {type(answer).__name__}; logits (B, classes) are needed")
    named = {_ACTIVATIONS[name] for name in recorder.seen & _ACTIVATIONS.keys()}
    single = len(named) == 1 and not recorder.seen & _OTHERS
    return (named.pop() if single else "other"), tuple(answer.shape[1:])
