import math

import torch

from bdclean.callbacks import suspects
from bdclean.runs import RunFolder


def test_ranking_has_ties_in_order_and_nan_at_the_end():
    score = torch.tensor([0.0, math.nan, 2.0, -math.inf, -0.0, 2.0, math.inf])
    assert suspects.ranking(score).tolist() == [6, 2, 5, 0, 4, 1, 3]
    tiers = torch.tensor([0, 2, 1, 0, 2, 1, 1])
    assert suspects.ranking(score, tiers).tolist() == [4, 1, 6, 2, 5, 0, 3]


def test_validation_is_read_from_all_starts_of_the_run(tmp_path):
    (tmp_path / "metrics.2.csv").write_text("epoch,val/acc\n1,21\n2,22\n")
    (tmp_path / "metrics.10.csv").write_text("epoch,train/loss,val/acc\n2,0.5,\n2,,102\n")
    (tmp_path / "metrics.old.csv").write_text("epoch,val/acc\n0,7\n")
    assert suspects.evaluations(RunFolder(tmp_path)) == {"val/acc": {1: 21.0, 2: 102.0}}
    (tmp_path / "metrics.csv").write_text("epoch,val/acc,val/asr\n2,5,50\n3,,\n")
    assert suspects.evaluations(RunFolder(tmp_path)) == {
        "val/acc": {1: 21.0, 2: 5.0},
        "val/asr": {2: 50.0},
    }
