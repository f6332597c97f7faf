"""Set back behind a window: what hops have let go of is played to them again by their neighbours."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from corolla.protocol.steps import NEW_ROW, Row

from ..model.tiny import save_tiny
from ..processes import local_swarm

OPTIONS = ("--device", "cpu", "--dtype", "float32", "--threads", "1")
LENGTH, BACK, WINDOW = 160, 20, 8  # far behind the window, and the 64 tokens that are kept beyond it
TOLERANCE = 1e-5


@pytest.mark.timeout(600)
@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_a_session_set_back_behind_the_window_goes_on_as_a_fresh_one_would(
    tmp_path: Path, family: str
) -> None:
    save_tiny(tmp_path / family, family)
    states = np.random.default_rng(3).standard_normal((LENGTH + 4, 64), dtype=np.float32)
    text, other = states[:LENGTH], states[LENGTH:]
    with local_swarm(tmp_path / family, *OPTIONS) as swarm:
        client = swarm.found()
        for name, start, end in (("front", 0, 2), ("back", 2, 4)):
            swarm.serve(name, start, end).wait_online()
        swarm.wait_covered(client, [1] * 4)
        with client.connect() as asked:
            model = asked.model(family)
            with model.session(max_length=LENGTH + 8) as session:
                session.step_rows(text, [Row(NEW_ROW, 0, LENGTH)])
                after = session.step_rows(other, [Row(0, BACK, 4)])
            with model.session(max_length=LENGTH + 8) as fresh:
                fresh.step_rows(text[:BACK], [Row(NEW_ROW, 0, BACK)])
                expected = fresh.step_rows(other, [Row(0, BACK, 4)])
    assert np.abs(np.asarray(after) - np.asarray(expected)).max() < TOLERANCE
