"""What the label-free tests of `bdclean check` see in networks of which the truth is known.

    python docs/research/check/check.py RUN [RUN ...] --out record.json

RUN is the folder of a finished fit of a classifier. A line holds where each family of perturbations
sends the answers to 500 held-out training images, the smallest trigger for the backbone, the
largest margins of all classes, and, for the judgement of the tests, what the run says of the
attack. A line of the same run is replaced.
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bdclean.backbones import load_model
from bdclean.checking import count_flips, maximum_margins, smallest_trigger
from bdclean.files import write_text
from bdclean.runs import RunFolder

IMAGES = 500


def measure(folder: Path) -> dict[str, Any]:
    """The line of a run."""
    run = RunFolder(folder)
    data, record = run.make_data(), run.read_record()
    model = load_model(folder / "model.safetensors").eval()
    held = data.role_images("defense", labels=False)
    images = held.everything()["image"][:IMAGES].float() / 255
    began = time.monotonic()
    found = list(count_flips(model, images))
    between = time.monotonic()
    trigger = smallest_trigger(model, images)
    after = time.monotonic()
    margins = maximum_margins(model)
    return {
        "run": folder.name,
        "data": data.name,
        "arch": model.info.arch,
        "width": model.info.width,
        "seed": record["seed"],
        "attack": None if data.attack is None else type(data.attack).__name__,
        "target": getattr(data.attack, "target", None),
        "metrics": {k: record["metrics"].get(k) for k in ("acc", "asr", "pa")},
        "flips": [asdict(each) for each in found],
        "trigger": asdict(trigger),
        "margins": asdict(margins) | {"largest": [round(r, 3) for r in margins.largest]},
        "seconds": {
            "flips": round(between - began),
            "trigger": round(after - between),
            "margins": round(time.monotonic() - after),
        },
    }


def main(args: Sequence[str] | None = None) -> None:
    """Adds runs to a file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args(args)
    for folder in arguments.runs:
        line = measure(folder)
        lines = json.loads(arguments.out.read_text()) if arguments.out.is_file() else []
        others = [old for old in lines if old["run"] != line["run"]]
        write_text(arguments.out, json.dumps([*others, line]) + "\n")


if __name__ == "__main__":
    main()
