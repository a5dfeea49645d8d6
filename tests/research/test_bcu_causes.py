from dataclasses import replace
from pathlib import Path

import bcu_causes
import pytest
import torch
from bcu_causes import into_document, main, markdown, read_rows, run
from bcu_design import Cell, Cleansing, Victim, design
from bcu_mechanism import by_group, cosine, logits_of, rescale_, travelled

from bdclean.backbones import ModelInfo, build
from bdclean.errors import DataError

pytestmark = [
    pytest.mark.filterwarnings(line)
    for line in (
        "ignore:The '.*_dataloader' does not have many workers",
        "ignore:`isinstance.treespec, LeafSpec.`:FutureWarning",
        "ignore:You defined a `validation_step` but have no `val_dataloader`",
    )
]
SMALL = Victim(width=1, epochs=1), Cleansing(epochs=1, lr=0.5, batch_size=300, weight_scale=0.5)
HERE = Path(bcu_causes.__file__).parent
GROUPS = {"stem", "group1", "group2", "group3", "group4", "head"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("causes")
    cells = [Cell("base", "", *SMALL), Cell("bare", "x", *SMALL, distil=False)]
    count = run(cells, [3], folder / "rows.json", folder / "victims")
    return cells, folder, count


def test_rows_hold_what_separates_the_causes(finished):
    _, folder, count = finished
    rows = read_rows(folder / "rows.json")
    assert count == len(rows) == 2
    for row in rows:
        for model in ("victim", "victim_clean_bn", "start", "start_clean_bn", "bcu"):
            assert set(row[model]) == {"acc", "asr", "pa", "untriggered"}
        for name in ("fresh_over_trained", "start_cosine", "travelled", "end_cosine"):
            assert set(row[name]) == GROUPS
        assert set(row["loss"]) == {"clean", "triggered"}
        assert set(row["teacher"]) == {"margin", "margin_clean", "confidence"}
    distilled, bare = rows
    assert distilled["start"] == bare["start"] == bare["bcu"]
    assert max(bare["travelled"].values()) == 0 < min(distilled["travelled"].values())
    assert len(list((folder / "victims").iterdir())) == 1  # one victim for both
    assert "| bare | x | 1 |" in markdown(rows)


def test_finished_rows_are_not_run_again(finished, monkeypatch):
    cells, folder, _ = finished
    asked = []

    def record(cell, seed, victims):
        asked.append((cell.factor, seed))
        return bcu_causes.key_of(cell, seed) | dict.fromkeys(
            ("victim", "start_clean_bn", "bcu", "cpu_seconds"), 0
        )

    monkeypatch.setattr(bcu_causes, "run_cell", record)
    out = folder / "copy.json"
    out.write_text((folder / "rows.json").read_text())
    assert run(cells, [3], out, folder) == 0
    other = replace(cells[0], bcu=replace(cells[0].bcu, lr=0.25))
    assert run([*cells, other], [3, 4], out, folder) == 4
    assert asked == [("base", 3), ("base", 4), ("bare", 4), ("base", 4)]
    assert len(read_rows(out)) == 6


def test_another_split_is_another_row_and_another_victim(finished, monkeypatch):
    (base, _), folder, _ = finished
    monkeypatch.setattr(bcu_causes, "fit", lambda *_: None)
    key, data = bcu_causes.key_of(base, 3), bcu_causes.make_data(base.victim, 3)
    before = bcu_causes.victim_file(base.victim, data, 3, folder / "others")
    moved = bcu_causes.make_data(base.victim, 5)
    assert bcu_causes.victim_file(base.victim, moved, 3, folder / "others") != before
    monkeypatch.setattr(bcu_causes, "make_data", lambda victim, seed: moved)
    assert bcu_causes.key_of(base, 3) != key


def test_rescaling_keeps_the_function_and_scales_the_convolutions():
    torch.manual_seed(0)
    model = build(ModelInfo("resnet18", 3, 16, (0.5,) * 3, (0.2,) * 3, width=4))
    images = torch.rand(8, 3, 16, 16)
    model(images)  # running statistics away from their start
    other = model.copy()
    rescale_(other, 0.5)
    for run_once in (logits_of, lambda model, images: model(images).detach()):
        expected = run_once(model, images)
        torch.testing.assert_close(run_once(other, images), expected, rtol=1e-2, atol=1e-3)
    moved = by_group(travelled, other, model)
    assert moved.pop("head") == 0
    assert all(value == pytest.approx(0.5) for value in moved.values())
    turned = by_group(cosine, other, model)
    assert all(value == pytest.approx(1, abs=1e-5) for value in turned.values())


def test_every_cell_has_a_name_of_its_own():
    names = [(cell.factor, cell.level) for cell in design()]
    assert len(set(names)) == len(names)
    assert len({(cell.victim, cell.bcu, cell.distil) for cell in design()}) == len(names)


def test_the_table_goes_between_the_markers(finished, capsys):
    _, folder, _ = finished
    page = folder / "bcu.md"
    page.write_text("a\n<!-- bcu causes -->\nold\n<!-- end bcu causes -->\nb\n")
    main(["--table", str(folder / "rows.json"), "--doc", str(page)])
    table = capsys.readouterr().out
    assert page.read_text() == f"a\n<!-- bcu causes -->\n{table}<!-- end bcu causes -->\nb\n"
    main(["--table", str(folder / "rows.json"), "--method", str(page)])
    short = markdown(read_rows(folder / "rows.json"), short=True)
    assert page.read_text() == f"a\n<!-- bcu causes -->\n{short}<!-- end bcu causes -->\nb\n"
    assert len(short.splitlines()[0].split("|")) == 4 + 2
    page.write_text("no markers\n")
    with pytest.raises(DataError, match="bcu causes"):
        into_document(page, table)


def test_the_pages_show_their_record():
    rows = read_rows(HERE / "record.json")
    assert markdown(rows) in (HERE / "README.md").read_text()
    assert markdown(rows, short=True) in (HERE.parents[1] / "methods" / "bcu.md").read_text()
