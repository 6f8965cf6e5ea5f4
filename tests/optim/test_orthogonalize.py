"""Newton–Schulz: singular values near one, at every magnitude."""

import pytest
import torch

from poetx.optim.orthogonalize import orthogonalize


@pytest.mark.parametrize("exponent", [-149, -140, -126, -100, -60, 0, 60, 100, 127])
@pytest.mark.parametrize("skew", [True, False])
def test_orthogonalizing_does_not_depend_on_the_scale(exponent, skew):
    X = torch.randn(3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).clamp(-1.9, 1.9)
    X = (X - X.mT) / 2 if skew else X
    X[1] = 0
    want = orthogonalize(X.float(), skew=skew)
    values = torch.linalg.svdvals(want[::2])
    assert values.min() > 0.3
    assert values.max() < 1.3
    assert not skew or torch.equal(want, -want.mT)
    got = orthogonalize((X * 2.0**exponent).float(), skew=skew)
    assert got.isfinite().all()
    assert got[1].eq(0).all()
    if exponent >= -100:
        assert torch.equal(got, want)
