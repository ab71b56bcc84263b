"""An attached model has the sites of the bare one: what an adapter added is no part of the anatomy."""

import pytest
from hosts import ALL

from graftwork.anatomy.resolve import all_sites, anatomy_of, head_sites
from graftwork.engine.attach import attach
from graftwork.techniques.bottleneck_adapter import BottleneckAdapter
from graftwork.techniques.lora import LoRA
from graftwork.testing import tiny


@pytest.mark.parametrize("name", ALL)
def test_an_adapter_changes_no_site(name):
    model = tiny(name)
    before = anatomy_of(model), all_sites(model), head_sites(model)
    attach(model, LoRA(workspaces=("*",)), name="one")
    attach(model, BottleneckAdapter(workspaces=("layer",), layers="last 1"), name="two")
    assert (anatomy_of(model), all_sites(model), head_sites(model)) == before
