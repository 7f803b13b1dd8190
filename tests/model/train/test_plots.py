"""The pictures of a training hold what the journal says."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from model.train.plots import figures


def journal(steps: int, domains: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    for step in range(1, steps + 1):
        line: dict[str, Any] = {"step": step, "loss": 10 / step, "expert_load_max": [1.0 + step / steps, 3.0]}
        if len(domains) > 1:
            line |= {f"loss/{d}": 10 / step + i for i, d in enumerate(domains) if (step + i) % 2}
        if step % 10 == 0:
            line |= {"validation_loss": 11 / step}
            line |= {f"validation_loss/{d}": 11 / step + i for i, d in enumerate(domains) if len(domains) > 1}
        yield line


@pytest.mark.parametrize(("steps", "domains"), [(1, ("text",)), (30, ("text",)), (2500, ("code", "text"))])
def test_curves_are_the_journals(steps: int, domains: tuple[str, ...]) -> None:
    drawn = figures(journal(steps, domains), steps)
    assert set(drawn) == {"losses.png", "experts.png"}
    for figure in drawn.values():
        file = io.BytesIO()
        figure.savefig(file)
        assert file.getvalue().startswith(b"\x89PNG")
    curves = {line.get_label(): line for line in drawn["losses.png"].axes[0].lines}
    looked = [(step, 11 / step) for step in range(10, steps + 1, 10)]
    if len(domains) == 1:
        assert list(curves) == ["training"] + ["training, held out"] * bool(looked)
        np.testing.assert_allclose(curves["training"].get_ydata(), [10 / s for s in range(1, steps + 1)])
    else:
        assert set(curves) == {"code", "text", "code, held out", "text, held out", "all, held out"}
        assert len(curves["code"].get_xdata()) <= 1000
        np.testing.assert_allclose(curves["all, held out"].get_xydata(), looked)
    (image,) = drawn["experts.png"].axes[0].images
    shown = np.asarray(image.get_array())
    assert shown.shape[0] == 2
    assert shown[0, -1] == pytest.approx(2.0, rel=1e-3)
    assert (shown[1] == 3).all()
