"""The double precision of the gradient tests computes the same numbers with more digits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from helpers import tiny
from helpers.precision import compute_in_double


@pytest.mark.parametrize("family", sorted(tiny.FAMILY_BUILDERS))
def test_double_precision_refines_single_precision(tmp_path: Path, family: str) -> None:
    single = tiny.scale_up_weights(tiny.build_duet_model(tmp_path / "base", family=family))
    double = tiny.scale_up_weights(tiny.build_duet_model(tmp_path / "base", family=family)).double()
    renderer = single.renderer
    sequences = [
        renderer.render_caption(tiny.random_image(i), "some words " * (i + 1)) for i in range(3)
    ]
    sequences.append(renderer.render_embedding((tiny.random_image(7), "and", tiny.random_image(8))))
    sequences.append(renderer.render_embedding(("a text",)))
    batch = single.collate(sequences)
    inputs = {}
    for name, module in single.named_modules():
        if type(module).__name__.endswith("RMSNorm"):
            width = len(next(module.parameters(), torch.empty(32)))
            inputs[name] = torch.sin(torch.arange(3.0 * width)).view(3, width)
    with torch.no_grad():
        single_norms = {name: single.get_submodule(name)(x) for name, x in inputs.items()}
        single_states = single.hidden_states(batch)
    compute_in_double(double.backbone)
    # The default implementation of experts has no float64.
    double.backbone.model.set_experts_implementation("eager")
    with torch.no_grad():
        double_norms = {name: double.get_submodule(name)(x.double()) for name, x in inputs.items()}
        double_states = double.hidden_states(batch)
    assert_close(double_states.float(), single_states, atol=1e-4, rtol=1e-4)
    for name, norm in double_norms.items():
        assert_close(norm.float(), single_norms[name], atol=2e-6, rtol=2e-6)
    for name, output in {**double_norms, "hidden states": double_states}.items():
        assert output.dtype == torch.float64
        assert not torch.equal(output.float().double(), output), f"{name} was rounded to float32"
