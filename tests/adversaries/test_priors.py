"""The Gaussian prior and the regression start, against scikit-learn and draws from known laws."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from adversaries.inversion.evidence import priors
from fedattack.errors import DataError
from fedattack.observation import Auxiliary
from fedattack.rng import torch_rng

SHAPE = (3, 6, 6)


def correlated_images(count: int, seed: int = 0) -> Tensor:
    """Draws from the smooth prior with a bright left half, so that mean and covariance are known."""
    smooth = priors.smooth_prior(SHAPE, deviation=0.1)
    z = torch.randn(smooth.size, count, dtype=torch.float64, generator=torch_rng(seed, "test"))
    images = (smooth.mean[:, None] + smooth.factor() @ z).T.reshape(count, *SHAPE)
    images[..., :3] += 0.2
    return images.float()


def surprise(prior: priors.GaussianPrior, images: Tensor) -> float:
    """Mean negative log-likelihood, less a constant."""
    factor = prior.factor()
    white = torch.linalg.solve_triangular(factor, (images - prior.mean).T, upper=False)
    return float(0.5 * white.square().sum(0).mean() + factor.diagonal().log().sum())


def test_with_many_images_it_is_near_the_sample_covariance() -> None:
    images = correlated_images(4000)
    prior = priors.gaussian_prior(Auxiliary(images), SHAPE, shrinkage=1e-12)
    assert "mirrored" not in prior.source, "the left half is brighter"
    flat = images.double().flatten(1).numpy()
    expected = np.cov(flat.T) + priors.NUGGET * np.eye(flat.shape[1])
    # 4,000 images against the spectrum's five, and a mean known to 1 / 4,000.
    np.testing.assert_allclose(prior.covariance.numpy(), expected, atol=0.003 * expected.max())
    np.testing.assert_allclose(prior.mean.numpy(), flat.mean(0), atol=1e-12)


@pytest.mark.parametrize("count", [2, 20, 2000])
def test_is_positive_definite_from_two_images_up_and_calibrated(count: int) -> None:
    prior = priors.gaussian_prior(Auxiliary(correlated_images(count)), SHAPE)
    assert torch.linalg.eigvalsh(prior.covariance)[0] > 0.9 * priors.NUGGET
    fresh = correlated_images(200, seed=1).double().flatten(1) - prior.mean
    white = torch.linalg.solve_triangular(prior.factor(), fresh.T, upper=False)
    if count > 2:
        # Under the true covariance this is 1 on average.
        assert 0.7 < float(white.square().mean()) < 1.5


def test_more_images_make_fresh_ones_likelier() -> None:
    fresh = correlated_images(200, seed=1).double().flatten(1)

    shapes = [priors.gaussian_prior(Auxiliary(correlated_images(n)), SHAPE) for n in (3, 30, 1000)]
    found = [surprise(prior, fresh) for prior in shapes]
    assert found == sorted(found, reverse=True)


def test_shrinkage_beats_none_where_images_are_few() -> None:
    sources = [
        priors.gaussian_prior(Auxiliary(correlated_images(60)), SHAPE, shrinkage=rho) for rho in (1e-6, 1.0)
    ]
    chosen = priors.gaussian_prior(Auxiliary(correlated_images(60)), SHAPE)
    fresh = correlated_images(200, seed=1).double().flatten(1)

    assert surprise(chosen, fresh) < min(surprise(source, fresh) for source in sources) + 1.0
    assert surprise(chosen, fresh) < surprise(sources[0], fresh) - 10


def test_mirror_images_count_where_left_and_right_are_alike() -> None:
    smooth = priors.smooth_prior(SHAPE, deviation=0.1)
    z = torch.randn(smooth.size, 200, dtype=torch.float64, generator=torch_rng(4, "test"))
    images = (smooth.mean[:, None] + smooth.factor() @ z).T.reshape(200, *SHAPE).float()
    prior = priors.gaussian_prior(Auxiliary(images), SHAPE, shrinkage=1e-12)
    assert "mirrored" in prior.source
    both = torch.cat([images, images.flip(3)]).double().flatten(1).numpy()
    mirrored = priors.gaussian_prior(Auxiliary(images), SHAPE, shrinkage=1e-12)
    np.testing.assert_allclose(mirrored.mean.numpy(), both.mean(0), atol=1e-12)
    expected = np.cov(both.T) + priors.NUGGET * np.eye(both.shape[1])
    np.testing.assert_allclose(mirrored.covariance.numpy(), expected, atol=0.04 * expected.max())


def test_factors_span_the_covariance() -> None:
    prior = priors.gaussian_prior(Auxiliary(correlated_images(100)), SHAPE)
    full, modes = prior.factor(), prior.factor(40)
    torch.testing.assert_close(full @ full.T, prior.covariance)
    values = torch.linalg.eigvalsh(prior.covariance).flip(0)
    torch.testing.assert_close(modes.square().sum(0), values[:40])
    # The best approximation of rank 40 leaves exactly the other eigenvalues.
    rest = torch.linalg.eigvalsh(prior.covariance - modes @ modes.T).flip(0)[: len(values) - 40]
    torch.testing.assert_close(rest, values[40:])


def test_without_auxiliary_images_it_is_grey_and_smooth() -> None:
    prior = priors.gaussian_prior(None, SHAPE)
    assert "no auxiliary" in prior.source
    assert torch.all(prior.mean.reshape(prior.image_shape).float() == 0.5)
    deviations = prior.covariance.diagonal().sqrt()
    assert 0.15 < float(deviations.mean()) < 0.3
    row = prior.covariance[0, :6] / prior.covariance[0, 0]
    assert torch.all(row[:-1] > row[1:]), "correlation falls with distance"


def test_refuses_images_of_another_shape() -> None:
    with pytest.raises(DataError, match=r"\(3, 6, 6\)"):
        priors.gaussian_prior(Auxiliary(correlated_images(4)), (1, 6, 6))
