"""Chat messages for a model that has no chat template."""

from __future__ import annotations

import pytest

import sgl_apr as apr


@pytest.mark.server
def test_a_model_without_a_template_is_a_clear_error(solver):
    with pytest.raises(
        apr.UnsupportedEngine, match="the model has no chat template, expected a prompt that is text"
    ) as raised:
        apr.run(solver.url, [{"role": "user", "content": " 39: 6 12 18 23"}])
    assert "--chat-template" in str(raised.value)
