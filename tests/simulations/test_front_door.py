"""fedattack.invert, audit and simulate: what comes back, and the sentences that refuse what cannot be done."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fedattack
from fedattack.data.arrays import listing_of
from fedattack.errors import BadRequest, ConfigError
from fedattack.metrics import psnr

SHAPE = (1, 8, 8)
QUICK = {"gauss-newton.products": 600}


class Net(nn.Module):
    """One convolution and a head, its activation called as a function."""

    def __init__(self, act: Callable[[Tensor], Tensor] = torch.sigmoid, channels: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 8, 3, padding=1)
        self.fc = nn.Linear(8 * 64, 10)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.act(self.conv(x)).flatten(1))


class CNN(nn.Module):
    """A user's own: three convolutions and a head, at 32 x 32 colour pixels."""

    def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 5, stride=2, padding=2)
        self.conv2 = nn.Conv2d(16, 16, 5, stride=2, padding=2)
        self.conv3 = nn.Conv2d(16, 16, 5, padding=2)
        self.fc = nn.Linear(16 * 64, 10)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.conv2(self.act(self.conv1(x))))
        return self.fc(self.act(self.conv3(x)).flatten(1))


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make()


def picture(size: int = 8, channels: int = 1, count: int = 1) -> Tensor:
    """Smooth pictures (N, C, S, S) in [0, 1]."""
    coarse = torch.rand(count, channels, 4, 4, generator=torch.Generator().manual_seed(3))
    return F.interpolate(coarse, size=(size, size), mode="bicubic", align_corners=True).clamp(0, 1)


def photograph(size: int) -> Tensor:
    from skimage.data import astronaut
    from skimage.transform import resize

    pixels = resize(astronaut()[20:220, 120:320], (size, size), anti_aliasing=True)
    return torch.tensor(pixels).permute(2, 0, 1)[None].float()


LABEL = torch.tensor([3])


def gradient(net: nn.Module, images: Tensor, labels: Tensor = LABEL) -> list[Tensor]:
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    return list(torch.autograd.grad(F.cross_entropy(net(images), labels), trained))


def stepped(net: nn.Module, images: Tensor, rate: float, steps: int = 1) -> nn.Module:
    """The module after SGD."""
    after = copy.deepcopy(net)
    optimiser = torch.optim.SGD(after.parameters(), lr=rate)
    for _ in range(steps):
        optimiser.zero_grad()
        F.cross_entropy(after(images), LABEL).backward()
        optimiser.step()
    return after


def test_importing_it_costs_nothing() -> None:
    code = "import fedattack, sys; fedattack.__version__, dir(fedattack); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert callable(fedattack.audit)
    import fedattack.audit as room

    assert room.AuditResult  # the room keeps its name
    assert callable(room)


def _ways(net: nn.Module, images: Tensor) -> dict[str, tuple[tuple, dict]]:
    given = gradient(net, images)
    named = dict(zip(dict(net.named_parameters()), given, strict=True))
    after = stepped(net, images, 0.1)
    change = {name: after.state_dict()[name] - tensor for name, tensor in net.state_dict().items()}
    return {
        "list": ((net, given), {}),
        "dict": ((net, named), {}),
        "wrapped": ((net, {f"module.{name}": value for name, value in named.items()}), {}),
        "half": ((net.double(), [value.double().numpy() for value in given]), {}),
        "change": ((net, change), {"learning_rate": 0.1}),
        "after": ((net, after), {"learning_rate": 0.1}),
        "both": (([net, after],), {"learning_rate": 0.1}),
        "elsewhere": ((seeded(lambda: Net()), given), {"weights": net.state_dict()}),
    }


def test_the_lines_of_the_page_run_as_they_stand(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "your-own-model.md").read_text(encoding="utf-8")
    lines = page.partition("```python\n")[2].partition("```")[0]
    torch.manual_seed(0)
    names: dict = {}
    exec(lines, names)
    assert names["found"].labels.tolist() == [3]
    assert float(psnr(names["found"].images, names["image"])) > 40
    assert "tensor([3])" in capsys.readouterr().out


@pytest.mark.parametrize("way", ["list", "dict", "wrapped", "half", "change", "after", "both", "elsewhere"])
def test_every_way_to_say_an_update(way: str) -> None:
    net, images = seeded(Net), picture()
    args, more = _ways(net, images)[way]
    found = fedattack.invert(*args, image_shape=SHAPE, options={"gauss-newton.products": 150}, **more)
    assert found.labels.tolist() == [3]
    assert float(psnr(found.images, images)) > float(psnr(found.floors["prior"], images)) + 10
    assert found.chosen == "gauss-newton"
    assert found.certificate is not None
    assert found.certificate < 0.1


def test_mean_and_deviation_are_taken_back() -> None:
    net, images = seeded(lambda: Net(channels=3)), picture(channels=3)
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    shown = (images - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    update = gradient(net, shown)
    found = fedattack.invert(net, update, image_shape=(3, 8, 8), mean=mean, std=std, options=QUICK)
    assert float(psnr(found.images, images)) > 40


def test_exact_attacks_are_asked_first_and_certain() -> None:
    net = seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)))
    images = picture()
    found = fedattack.invert(net, gradient(net, images), image_shape=SHAPE)
    assert found.chosen == "analytic"
    assert found.certified
    assert float(psnr(found.images, images)) > 80
    both = fedattack.invert(
        net, gradient(net, images), image_shape=SHAPE, attack="analytic,ig", options={"ig.iterations": 3}
    )
    assert both.chosen == "analytic"  # certain, and so chosen among those that were named
    assert set(both.answers) == {"analytic", "ig"}


def test_what_is_frozen_is_left_alone_and_declared_labels_are_believed() -> None:
    net, images = seeded(Net), picture()
    net.conv.bias.requires_grad_(False)
    given = [None if p is net.conv.bias else torch.zeros_like(p) for p in net.parameters()]
    for place, value in zip([0, 2, 3], gradient(net, images), strict=True):
        given[place] = value
    found = fedattack.invert(net, given, image_shape=SHAPE, options=QUICK, labels=[3])
    assert any("1 of 4 parameters have no update (conv.bias)" in note for note in found.notes)
    assert found.answer.details["labels"] == "declared by the client"
    assert float(psnr(found.images, images)) > 30


def test_a_frozen_layer_is_refused_to_who_reads_it() -> None:
    net = seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)))
    images = picture()
    given = gradient(net, images)
    for frozen, attack, said in (
        (0, "analytic", "first layer '1' is frozen"),
        (2, "gauss-newton", "linear head"),
    ):
        update = [None if place in (frozen, frozen + 1) else one for place, one in enumerate(given)]
        with pytest.raises(BadRequest, match=said):
            fedattack.invert(net, update, image_shape=SHAPE, attack=attack)
    # Labels show in dL/dz of the layer that spear reads, whatever is sent of the head.
    found = fedattack.invert(net, [given[0], given[1], None, None], image_shape=SHAPE, attack="spear")
    assert float(psnr(found.images, images)) > 60


def test_several_uncertain_answers_are_not_chosen_from() -> None:
    net, images = seeded(Net), picture()
    found = fedattack.invert(
        net, gradient(net, images), image_shape=SHAPE, attack=["gauss-newton", "ig"],
        options={"gauss-newton.products": 100, "ig.iterations": 2},
    )  # fmt: skip
    assert set(found.answers) == {"gauss-newton", "ig"}
    with pytest.raises(ConfigError, match="none is certain of its answer"):
        _ = found.images
    assert found["ig"].images.shape == (1, *SHAPE)


NAN = float("nan")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"image_shape": (8, 8)}, r"image_shape = \(8, 8\): accepted: \(C, S, S\)"),
        ({"image_shape": (1, 8, 9)}, "1 or 3 channels"),
        ({"image_shape": (2, 8, 8)}, "1 or 3 channels"),
        ({"image_shape": "8"}, "image_shape = '8'|image_shape = \\(8,\\)"),
        ({"image_shape": (1, 16, 16)}, r"cannot be run on images of shape \(1, 16, 16\): RuntimeError"),
        ({"model": 3}, "model is a int; the module that was sent out is needed"),
        ({"model": Net}, "model is the class Net"),
        ({"model": [Net()]}, "a sequence of 1"),
        ({"model": [Net(), Net()]}, "two models and an update"),
        ({"update": None}, "update is not given"),
        ({"update": 1.0}, "the update is a float; accepted: a list"),
        ({"update": lambda g: g[:2]}, "the update is a list of 2; the model has 4 parameters"),
        ({"update": lambda g: [*g[:3], g[3][:5]]}, r"the update of 'fc.bias' has shape \(5,\); the model's"),
        ({"update": lambda g: [*g[:3], g[3] * NAN]}, "the update of 'fc.bias' holds 10 NaN"),
        ({"update": lambda g: [*g[:3], "no"]}, "'fc.bias' is no array of numbers"),
        ({"update": lambda g: [None] * 4}, "every parameter is None"),
        ({"update": lambda g: [one * 0 for one in g]}, "nothing but zeros"),
        ({"update": lambda g: {"conv.weight": g[0]}}, "the update lacks 'conv.bias' and 2 more"),
        ({"update": lambda g: {"conv.wieght": g[0]}}, "which the model has not; did you mean 'conv.weight'"),
        ({"update": lambda g: {0: g[0]}}, "0 is no name of a parameter"),
        ({"update": Net(), "protocol": "gradient"}, "the difference of two models is a weight change"),
        ({"update": Net()}, "learning_rate is not given"),
        ({"protocol": "delta"}, "learning_rate is not given"),
        ({"protocol": "sgd"}, "protocol = 'sgd': accepted"),
        ({"local_steps": 3}, "a gradient is of one step"),
        ({"learning_rate": 0.1, "local_steps": 0}, "local_steps = 0: a whole number from 1"),
        ({"learning_rate": -1.0}, "training.learning_rate"),
        ({"num_examples": 0}, "num_examples = 0: a whole number from 1"),
        ({"num_examples": 2, "labels": [1]}, "num_examples = 2, and 1 labels are declared"),
        ({"labels": [10]}, "labels run from 10 to 10; accepted: 0 to 9"),
        ({"labels": [0.5]}, "whole numbers from 0"),
        ({"labels": True, "num_examples": 1}, "labels"),
        ({"classes": 11}, "the data set has 11 classes|'model.classes' = 10"),
        ({"mean": 2.0}, "setting 'data.mean' = 2: images have 1 channel"),
        ({"std": [0.2, 0.2, 0.2]}, "accepted: 1 or 1 numbers"),
        ({"mean": "grey"}, "accepted: a number, or one for each channel"),
        ({"auxiliary": torch.rand(5, 1, 9, 9)}, "auxiliary images are 1 x 9 x 9 each; the model takes 1 x 8 x 8"),
        ({"auxiliary": torch.rand(5, 1, 8, 8) * 255}, r"float auxiliary images run from .* accepted: 0 to 1"),
        ({"auxiliary": (torch.rand(5, 1, 8, 8), [1, 2])}, "5 images need"),
        ({"weights": {}}, "weights lack 'conv.bias' and 3 more"),
        ({"attack": "nonsense"}, "unknown attack 'nonsense'"),
        ({"attack": ""}, "attack = ''"),
        ({"attack": "fedmia", "options": {}}, "asks about membership.*use fedattack.simulate"),
        ({"attack": "analytic", "options": {}}, "nor a linear layer on the pixels"),
        ({"options": {"gauss-newton.product": 3}}, "did you mean 'gauss-newton.products'"),
        ({"device": "abacus"}, "setting 'engine.device' = 'abacus'"),
        ({"batch_norm": "none"}, "training.batch_norm"),
        ({"layout": "CHWN", "auxiliary": torch.rand(5, 1, 8, 8)}, "layout = 'CHWN'"),
    ],
)  # fmt: skip
def test_what_cannot_be_inverted_is_said_in_a_sentence(change: dict, said: str) -> None:
    net = seeded(Net)
    request = {"model": net, "update": gradient(net, picture()), "image_shape": SHAPE, "options": QUICK}
    given = {
        name: value(request["update"]) if name == "update" and type(value).__name__ == "function" else value
        for name, value in change.items()
    }
    with pytest.raises(BadRequest, match=said) as caught:
        fedattack.invert(**request | given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"images": picture(9)}, "cannot be run on images of shape"),
        ({"images": picture() + 1}, "float images run from"),
        ({"images": np.ones((1, 8, 8), np.uint8)}, "uint8 images run from 0 to 1"),
        ({"images": np.full((1, 8, 8), 9)}, "are of type torch.int64"),
        ({"images": picture() * NAN}, "hold 64 NaN"),
        ({"images": torch.rand(2, 8, 9)}, "square ones"),
        ({"images": torch.rand(1, 5, 8, 8)}, "the channels .1 or 3. cannot be told"),
        ({"labels": [3, 4]}, "1 images need"),
        ({"labels": [-1]}, "labels run from -1"),
        ({"labels": [12]}, "accepted: 0 to 9"),
        ({"num_examples": 2}, "there are 1 private images"),
        ({"metrics": "beauty"}, "unknown metric 'beauty'"),
    ],
)
def test_what_cannot_be_audited_is_said_in_a_sentence(change: dict, said: str) -> None:
    net = seeded(Net)
    request = {"images": picture(), "labels": [3], "options": QUICK}
    with pytest.raises(BadRequest, match=said):
        fedattack.audit(net, gradient(net, picture()), **request | change)


@pytest.mark.slow
def test_an_audit_scores_beside_the_floor_and_leaves_a_report(tmp_path: Path) -> None:
    net, images = seeded(Net), picture()
    options = {"gauss-newton.products": 400}
    found = fedattack.audit(
        net, gradient(net, images), images=images, labels=[3], folder=tmp_path / "run", options=options
    )
    scores = found["gauss-newton"].summary
    assert scores["metrics"]["psnr"]["mean"] == pytest.approx(
        float(psnr(found.inversion.images, images)), abs=0.01
    )
    assert scores["floors"]
    assert "gauss-newton" in found.headline
    assert found.report is not None
    page = found.report.read_text(encoding="utf-8")
    assert "How much does this update leak?" in page
    assert found.summary["headline"]["text"] == found.headline


@pytest.mark.slow
def test_a_federation_on_arrays_and_a_live_model(tmp_path: Path) -> None:
    net, images = seeded(Net), picture(count=24)
    settings = {"clients": 2, "compressor": "none", "auxiliary_size": 0, **QUICK}
    data = (images.numpy(), np.arange(24) % 10)
    result = fedattack.simulate(net, data, "gauss-newton", folder=tmp_path / "run", victims=1, **settings)
    assert result.audits["gauss-newton"].summary["metrics"]["psnr"]["mean"] > 40
    assert (result.folder / "report.html").is_file()


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_arrays_and_torch_data_sets_are_read_alike(layout: str) -> None:
    images, labels = picture(count=6, channels=3), torch.tensor([0, 2, 1, 2, 1, 0])
    eight = (images * 255).round().to(torch.uint8)
    arrays = eight.numpy() if layout == "NCHW" else eight.permute(0, 2, 3, 1).numpy()
    for data in ((arrays, labels.numpy()), torch.utils.data.TensorDataset(eight, labels)):
        listing = listing_of(data, groups=["a", "b", "a", "c", "c", "b"])
        assert (listing.read(np.arange(6), None) == eight.numpy()).all()
        assert listing.labels.tolist() == labels.tolist()
        assert listing.groups is not None
        assert listing.groups.tolist() == [0, 1, 0, 2, 2, 1]
        assert listing.class_names == ("0", "1", "2")


class Ragged(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 3

    def __getitem__(self, n: int) -> tuple[Tensor, int]:
        return torch.rand(1, 8 + n, 8 + n), n


class Broken(Ragged):
    def __getitem__(self, n: int) -> tuple[Tensor, int]:
        raise OSError("disk on fire")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (Ragged(), "item 1 of the data set is 1 x 9 x 9 .* give all of one size"),
        (Broken(), "item 0 of the data set: OSError: disk on fire"),
        ([1, 2, 3], r"item 0 of the data set is a int; \(image, label\) is accepted"),
        (7, "data is a int; accepted"),
        ([], "holds no items"),
        ((picture(count=4), [0, 1]), "4 images need"),
        ((picture(count=4).numpy() * 2, [0, 1, 2, 3]), "float images run from"),
        ((np.zeros((4, 3, 8, 3), np.uint8) + 5, [0, 1, 2, 3]), "cannot be told; say layout="),
        ((torch.rand(4, 1, 8, 8), [0, 1, 2, 300]), "'model.classes' = 10: the data set has 301 classes"),
        ("no-such-set", "unknown data set"),
    ],
)
def test_data_that_cannot_be_used_is_said_in_a_sentence(data: object, said: str) -> None:
    with pytest.raises(BadRequest, match=said):
        fedattack.simulate(Net(), data, "gauss-newton", clients=2)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": 3}, "model is a int; a model is an nn.Module"),
        ({"model": Net(channels=3)}, "cannot be run on images of shape"),
        ({"engine": "ray"}, "use engine='inline'"),
        ({"bach_size": 2}, "unknown setting 'bach-size'"),
        ({"groups": [1]}, "groups have shape"),
        ({"class_names": ["a"]}, "there are 1 class names"),
    ],
)
def test_a_federation_that_cannot_be_is_said_in_a_sentence(change: dict, said: str) -> None:
    data = (picture(count=8), np.arange(8))
    with pytest.raises(BadRequest, match=said):
        fedattack.simulate(**{"model": Net(), "data": data, "attack": "gauss-newton", "clients": 2} | change)


def test_an_attack_that_fails_is_scored_as_failed() -> None:
    images = picture()
    given = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    noise = [torch.randn(parameter.shape) for parameter in given.parameters()]
    found = fedattack.audit(given, noise, images=images, labels=[3], attack="analytic")
    assert found["analytic"].level == "failed"
    assert "every attack failed" in found.headline
    with pytest.raises(fedattack.RunFailed, match="no attack came to an answer: analytic"):
        fedattack.invert(given, noise, image_shape=SHAPE, attack="analytic")


@pytest.mark.slow
@pytest.mark.parametrize(("act", "least"), [(torch.sigmoid, 40.0), (F.relu, 40.0)])
def test_a_users_own_cnn_gives_its_image_away(act: Callable[[Tensor], Tensor], least: float) -> None:
    net, images = seeded(lambda: CNN(act)), photograph(32)
    found = fedattack.invert(net, gradient(net, images), image_shape=(3, 32, 32))
    floor = float(psnr(found.floors["prior"], images))
    assert floor < 15
    assert float(psnr(found.images, images)) >= least
