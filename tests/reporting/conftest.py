"""A small folder of results."""

import json

import pytest
import yaml


def record(acc, labels="none"):
    return {
        "metrics": {"acc": acc, "asr": 10.0, "pa": 70.0},
        "protocol": {"labels": labels},
        "cost": {"train_seconds": 60.0},
    }


TABLE = {
    "title": "A table",
    "introduction": "What was done.\n",
    "columns": ["labels", "seeds", "acc", "asr", "pa", "seconds"],
    "attacks": {"badnets": "BadNets", "blend": "Blend"},
    "rows": [{"id": "victim", "name": "victim"}, {"id": "cbd", "name": "CBD, fast"}],
}
CHOICE = {
    "table": "table",
    "text": "What it shows.\n",
    "attacks": {"BadNets": "badnets", "Blend": "blend"},
    "values": ["acc", "asr"],
    "rows": ["cbd", "victim"],
}


class Folder:
    """`docs/results` with one table, whose files a test changes."""

    TABLE, CHOICE = TABLE, CHOICE
    record = staticmethod(record)

    def __init__(self, path):
        self.path = path
        self.table = path / "table"
        self.readme = path / "front.md"
        for name, acc in (("badnets-s0", 80.0), ("badnets-s1", 84.0), ("blend-s0", 50.0)):
            self.add(f"cbd/{name}", record(acc))
        self.add("victim/badnets-s0", record(90.0, "train"))
        self.write(TABLE)
        self.choose()
        self.readme.write_text("before\n<!-- results -->\nold\n<!-- end results -->\nafter\n")

    def add(self, name, content):
        file = self.table / f"{name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content))
        return file

    def write(self, table):
        (self.table / "table.yaml").write_text(yaml.safe_dump(table, sort_keys=False))

    def choose(self, **changes):
        whole = {
            "title": "Results",
            "introduction": "All of them.\n",
            "tables": ["table"],
            "summary": [CHOICE],
            "pages": {"front.md": CHOICE},
        }
        text = yaml.safe_dump(whole | changes, sort_keys=False)
        (self.path / "results.yaml").write_text(text)


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path)


@pytest.fixture(name="record")
def _record():
    return record
