"""Several texts that decide together: a union keeps what any of them needs."""

from __future__ import annotations

import pytest
import torch

from secateur.calibrate import collect
from secateur.errors import ConfigError
from secateur.families.loader import families
from secateur.records.statistics import merge_buckets
from secateur.score import TextRecords, require_union, score_units
from secateur.score.combine import most_needed
from tests.blocks import hand_made_blocks
from tests.conftest import geometry_of, pico_model


@pytest.mark.parametrize("texts", [1, 2, 3])
def test_a_cut_is_the_intersection_of_what_the_texts_can_do_without(texts: int) -> None:
    """At every score, what goes is what each text alone has among its lowest units, however loud it is."""
    draw = torch.Generator().manual_seed(texts)
    scores = [10.0**place * torch.rand(40, generator=draw).double() for place in range(texts)]
    scores[0][:5] = scores[0][5]  # ties
    combined = most_needed(scores)
    for cut in combined.tolist():
        lowest = [{unit for unit in range(40) if int((one < one[unit]).sum()) + 1 <= cut * 40} for one in scores]
        gone = set.intersection(*lowest)
        assert {unit for unit in range(40) if float(combined[unit]) <= cut} == gone


def test_every_text_is_scored_alone() -> None:
    """The union of two texts is the larger of their ranks; controls, which look at no text, are as they were."""
    family = families()["llama"]
    model = pico_model(family)
    geometry = geometry_of(model, family)
    one, two = (collect(model, hand_made_blocks(seed=seed), geometry) for seed in (0, 3))
    texts = {"law": TextRecords(one, ("law",)), "code": TextRecords(two, ("code",))}
    load, merged, kinds = model.state_dict().get, merge_buckets(one, two), ["ffn_channel", "gqa_group"]
    how = {"load_tensor": load, "buckets": ["law", "code"], "by_bucket": texts}
    union = score_units("activation_norm", merged, geometry, kinds, combine="union", **how)
    alone = [score_units("activation_norm", text, geometry, kinds, load_tensor=load) for text in (one, two)]
    for kind in kinds:
        for layer in range(2):
            expected = most_needed([scores.values[kind][layer] for scores in alone])
            torch.testing.assert_close(union.values[kind][layer], expected)
    drawn = [score_units("random", merged, geometry, kinds, combine=name, **how) for name in ("union", "mean")]
    torch.testing.assert_close(drawn[0].values["gqa_group"][1], drawn[1].values["gqa_group"][1])


def test_a_union_that_would_be_none_is_refused() -> None:
    """Of one text, or of texts that the method's own options set beside each other already."""
    with pytest.raises(ConfigError, match="needs two texts that decide, and there is law"):
        require_union("contextual", {}, ["law"])
    with pytest.raises(ConfigError, match="cus_prun looks at zh, law by its own options"):
        require_union("cus_prun", {"dimensions": {"language": ["zh"], "domain": ["law"]}}, ["zh", "law"])
    require_union("contrast", {}, ["zh", "law"])
