"""Which task, which members: centres and keys against the note's numbers."""

from __future__ import annotations

import pytest
import torch

from graftwork.continual.centres import centres_of, check_distance, nearest_task
from graftwork.continual.keys import check_mode, pull, select
from graftwork.errors import BadData, BadOption

KEYS = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [-1.0, 0.0]])
QUERIES = torch.tensor([[2.0, 0.1], [0.2, 3.0], [1.0, 0.9]])


def test_check_1_selection():
    chosen = select(QUERIES, KEYS, 2)
    assert [set(row) for row in chosen.tolist()] == [{0, 2}, {1, 2}, {2, 0}]
    assert chosen.tolist() == [[0, 2], [1, 2], [2, 0]]
    assert pull(QUERIES, KEYS, chosen).item() == pytest.approx(1.7442, abs=5e-5)
    together = select(QUERIES, KEYS, 2, "batch")
    assert together.tolist() == [[2, 0]] * 3
    assert pull(QUERIES, KEYS, together).item() == pytest.approx(1.4338, abs=5e-5)


def test_instance_mode_does_not_look_at_the_batch_and_batch_mode_does():
    alone = torch.cat([select(query[None], KEYS, 2) for query in QUERIES])
    assert torch.equal(alone, select(QUERIES, KEYS, 2))
    assert not torch.equal(select(QUERIES[1:2], KEYS, 2, "batch"), select(QUERIES, KEYS, 2, "batch")[1:2])


def test_ties_go_to_the_smaller_number_and_members_can_be_limited():
    same = torch.ones(4, 3)
    assert select(torch.ones(1, 3), same, 2).tolist() == [[0, 1]]
    assert select(torch.ones(5, 3), same, 2, "batch").tolist() == [[0, 1]] * 5
    assert select(QUERIES, KEYS, 2, among=[1, 3]).tolist() == [[1, 3], [1, 3], [1, 3]]


def test_check_6_distances_can_disagree():
    feature = torch.tensor([[0.6, 0.8]])
    centres = [torch.tensor([[0.6, 0.2]]), torch.tensor([[0.2, 0.45]])]
    assert nearest_task(feature, centres, "l1").tolist() == [0]
    assert nearest_task(feature, centres, "l2").tolist() == [1]


@pytest.mark.parametrize("distance", ["l1", "l2"])
def test_check_6_separated_gaussians_are_told_apart(distance):
    torch.manual_seed(0)
    means = torch.eye(3, 16) * 10
    draws = [mean + 0.3 * torch.randn(40, 16) for mean in means]
    centres = [centres_of(draw, 5) for draw in draws]
    fresh = torch.cat([mean + 0.3 * torch.randn(50, 16) for mean in means])
    found = nearest_task(fresh, centres, distance)
    assert torch.equal(found, torch.arange(3).repeat_interleave(50))
    assert torch.equal(nearest_task(7.5 * fresh, centres, distance), found)


def test_centres_are_means_of_normalised_features_and_not_normalised():
    torch.manual_seed(0)
    features = torch.randn(30, 4) * 5
    normed = features / features.norm(dim=1, keepdim=True)
    assert torch.allclose(centres_of(features, 1)[0], normed.mean(0), atol=1e-6)
    assert centres_of(features, 1).norm() < 0.9


def test_bad_options_are_named():
    with pytest.raises(BadData, match="3 samples cannot have 5 centres"):
        centres_of(torch.randn(3, 4), 5)
    with pytest.raises(BadOption, match="l3"):
        check_distance("l3")
    with pytest.raises(BadOption, match="sample"):
        check_mode("sample")
