"""The work behind `bdclean purify` and `bdclean.purify`: test, fit, test again, write.

The tests of `bdclean check` run before and after a `bdclean fit` with a purifier. The user's files
are read, never moved or changed.
"""

import json
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from bdclean.backbones import ModelInfo, SplitModel, load_model, save_like
from bdclean.backbones.apart import joined
from bdclean.backbones.card import in_short, normalisation
from bdclean.backbones.live import LiveSource
from bdclean.backbones.loading_lines import loading_lines
from bdclean.backbones.own_network import is_own_network
from bdclean.callbacks.products import OF_FIT
from bdclean.checking import Verdict
from bdclean.commands import front
from bdclean.commands.canary import Canary, check_canary, run_canary
from bdclean.commands.check import images_of, read_model, shown, some_of, usual_count
from bdclean.commands.cost import cost_line
from bdclean.commands.examples import most_flipped
from bdclean.commands.kept_tests import NAME as KEPT
from bdclean.commands.kept_tests import kept_tests
from bdclean.commands.purify_job import Job, PurifyResult
from bdclean.commands.purify_report import Facts, beside, check_place, write_report
from bdclean.commands.scoring import Measured, Truth, find_truth, measure
from bdclean.data.decoding import OnError
from bdclean.data.images import ImageSet
from bdclean.data.layout import image_files
from bdclean.errors import ConfigError
from bdclean.files import (
    FORMAT_KEY,
    SAFETENSORS,
    safetensors_metadata,
    sha256_of_file,
    write_text,
)
from bdclean.locks import RunLock
from bdclean.printable import printable
from bdclean.progress import Watch, unwatched
from bdclean.runs import RunFolder
from bdclean.shipped import find
from bdclean.weights import TORCH_SUFFIXES, write, write_torch

CONFIGS: Mapping[str, str] = {
    "auto": "purify/shortcut",  # chooses its families by what the tests of `check` look at
    "shortcut": "purify/shortcut",
    "bcu": "purify/bcu",
    "cbd": "purify/cbd/fast",
}
"""The config of each method, by its name."""
IN_MEMORY = "images in memory"
"""What configs call images that no folder holds."""
_AT_ONCE = 256  # images
Say = Callable[[str], None]


def purify_model(
    job: Job, fit: front.Fit | None = None, say: Say = print, watch: Watch = unwatched
) -> PurifyResult | None:
    """Does a job. Only the first of several processes checks, writes and speaks.

    Args:
        job: What to do.
        fit: Runs the training; None takes that of `bdclean fit`.
        say: Gets each line of text.
        watch: Shows how far each test is.

    Returns:
        None on other processes, and where the fit was stopped before its end.

    Raises:
        ConfigError: If the options contradict each other, or the run folder is in the way.
        WeightsError: If the file cannot be read safely, or does not fit the architecture.
        DataError: If the folder holds no images.
    """
    if job.method not in CONFIGS:
        raise ConfigError(f"--method {job.method}: it must be {', '.join(CONFIGS)}.")
    run, suspect = RunFolder(Path(job.run)), _suspect(job).eval()
    front.check_run(run.path, _places(job))
    check_place(run.path)
    out, info = _check_out(job, run), suspect.info
    truth = find_truth(job.labels, job.trigger, job.target, info)
    if job.canary:
        check_canary(suspect, _count(job), job.method)
    words = _words(job, info, job.words)
    settings = front.check_words(words)
    images = _images(job, info.input_size, settings.data.init_args.on_error)
    first, labelled = front.is_first_process(), None
    if first:
        if truth is not None:  # hours before they are looked at
            labelled = truth.read(info.input_size, settings.data.init_args.on_error)
        method = settings.model.init_args.as_dict()
        say(printable(f"{job.model}: {in_short(info)}, {normalisation(info)}."))
        count = _count(job)
        say(cost_line(method, count, suspect, images, tests=job.tests, canary=job.canary))
    before: tuple[Verdict, ...] = ()
    if first:
        with RunLock(run.path):  # which the fit takes next
            before = _check("Before", job, suspect, images, say, watch)
    fit = fit or partial(front.fit, again=job.again, prepare=_prepare(job))
    module, data = fit(words)
    if not first or not module.finished:
        return None
    product = module.product().copy().to(images.device).eval()
    after = _check("After", job, product, images, say, watch)
    _save(run, before, after)
    measured = None
    if truth is not None and labelled is not None and product.head is not None:
        seen = data.defense_set.images
        measured = measure(truth, suspect, product, labelled, images.device, seen)
    canaries = _canaries(job, suspect, module, data, say) if job.canary else ()
    same = _agreement(suspect, product, images)
    result = _result(job, run, product, (before, after), same, out, measured, canaries)
    shown = _held_out(module, data)
    write_report(run.path, _facts(job, result, suspect, product, images, shown, truth))
    return result


def _result(
    job: Job,
    run: RunFolder,
    product: SplitModel,
    checks: tuple[tuple[Verdict, ...], tuple[Verdict, ...]],
    same: float | None,
    out: Path | None,
    measured: Measured | None,
    canaries: tuple[Canary, ...],
) -> PurifyResult:
    record = run.read_record()
    notes = () if out is None else _write(job, product, out)
    return PurifyResult(
        product if job.network is None else joined(job.network, product),
        *checks,
        record["protocol"].get("agreement", same),
        record,
        run.path,
        run.weights,
        out,
        notes,
        loading_lines(out or run.weights, product.info),
        measured,
        canaries,
    )


@torch.no_grad()
def _agreement(suspect: SplitModel, product: SplitModel, images: Tensor) -> float | None:
    """Share of images that both name alike; None without a head."""
    if suspect.head is None or product.head is None:
        return None
    parts = torch.split(images, _AT_ONCE)
    same = torch.cat([suspect(x).argmax(1) == product(x).argmax(1) for x in parts])
    return float(same.float().mean())


def _canaries(
    job: Job, suspect: SplitModel, module: Any, data: Any, say: Say
) -> tuple[Canary, ...]:
    """Plants triggers of ours in a copy of the suspect, and purifies that as the suspect was."""
    if module.trainer.world_size > 1:
        say("The canary is left out: it takes a single device.")
        return ()
    say("The canary: plants two triggers in a copy of the model, and purifies the copy.")
    pixels: Tensor = torch.as_tensor(data.defense_set.images)

    def purify(copy: SplitModel) -> SplitModel:
        with TemporaryDirectory(prefix="bdclean-") as place:
            run = str(Path(place) / "run")
            theirs = replace(job, run=run, arch=None, width=None, suspect=copy, pixels=pixels)
            words = _words(theirs, copy.info, job.words)
            product: SplitModel = front.fit(words, job.again, _prepare(theirs))[0].product()
        return product.copy()

    return tuple(run_canary(suspect, pixels, purify))


def _facts(
    job: Job,
    result: PurifyResult,
    suspect: SplitModel,
    product: SplitModel,
    images: Tensor,
    held: Tensor | None,
    truth: Truth | None,
) -> Facts:
    shown = images if held is None else held.to(images.device).float() / 255
    heads = suspect.head is not None and product.head is not None
    return Facts(
        job.model,
        job.folder,
        result.before,
        result.after,
        result.agreement,
        len(images),
        result.record,
        suspect.info.arch,
        suspect.info.input_size,
        *beside(Path(job.run), result.out, result.notes, product.info),
        most_flipped(suspect, product, shown) if heads else (),
        held is not None,
        result.measured,
        result.canaries,
        {} if truth is None else truth.names,
    )


def _held_out(module: Any, data: Any) -> Tensor | None:
    """The images that the method has not trained on, (N, 3, S, S), uint8; None without any."""
    share = getattr(module, "held_out", None)
    if share is None:
        return None
    rows = module.hold_out(share, module.seed)[1].rows
    images: Tensor = data.role_images("defense", labels=False).clean(rows)
    return images


def _count(job: Job) -> int:
    return len(image_files(Path(job.folder)) if job.pixels is None else job.pixels)


def _suspect(job: Job) -> SplitModel:
    """The model under suspicion, on the GPU if there is one."""
    if job.suspect is None:
        named = {"arch": job.arch, "width": job.width, "input_size": job.input_size}
        return read_model(job.model, **named, **job.known)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return job.suspect.copy().to(device).eval()


def _images(job: Job, size: int, on_error: OnError) -> Tensor:
    """Those that the tests look at."""
    count = job.images or usual_count(size)
    if job.pixels is None:
        return images_of(job.folder, size, count, on_error=on_error)
    return some_of(job.pixels, size, count)


def _prepare(job: Job) -> front.Prepare:
    def prepare(module: Any, data: Any) -> None:
        if job.suspect is not None:
            module.source = LiveSource(job.suspect)
        if job.pixels is not None:
            data.defense_set = ImageSet(job.pixels, None)

    return prepare


def _check(
    when: str, job: Job, model: SplitModel, images: Tensor, say: Say, watch: Watch
) -> tuple[Verdict, ...]:
    say(f"{when}, without labels:")
    verdicts = []
    file = Path(job.run) / KEPT
    for verdict in kept_tests(file, model.eval(), images, job.tests, watch):
        verdicts.append(verdict)
        say(shown(verdict))
    return tuple(verdicts)


def _check_out(job: Job, run: RunFolder) -> Path | None:
    """Where the weights go in the layout of MODEL; None for a file of ours without --out.

    Raises:
        ConfigError: If that file is MODEL, or lies in FOLDER or that of labels, or exists and is
            none that this run has written.
    """
    if job.out is None:
        ours = job.network is None and FORMAT_KEY in safetensors_metadata(job.model)
        return None if ours else run.path / "purified.safetensors"
    out = Path(job.out)
    if out.suffix not in (SAFETENSORS, *TORCH_SUFFIXES):
        raise ConfigError(f"--out {out}: it must end in .safetensors or .pth.")
    for place in _places(job):
        if front.lies_in(out, place):
            raise ConfigError(f"--out {out}: it lies in {place}, which stays as it is.")
    if out.name in OF_FIT and front.lies_in(out.parent, run.path):
        raise ConfigError(f"--out {out}: the run has a file of this name; give another one.")
    if os.path.lexists(out) and not (run.is_finished and _is_of(run, job, out)):
        raise ConfigError(f"--out {out}: it exists already; give a new name.")
    return out


def _places(job: Job) -> list[Path]:
    """The folders of the user, which stay as they are."""
    return [Path(p) for p in (job.folder if job.pixels is None else None, job.labels) if p]


def _is_of(run: RunFolder, job: Job, out: Path) -> bool:
    """Whether a file is what a run that has ended wrote there, or would write."""
    if out.is_symlink() or not out.is_file() or not run.weights.is_file():
        return False
    with TemporaryDirectory(prefix="bdclean-") as place:
        again = Path(place) / out.name
        code = job.arch if is_own_network(job.arch or "") else None
        save_like(job.model, load_model(run.weights, arch=code), again)
        return sha256_of_file(again) == sha256_of_file(out)


def _words(job: Job, info: ModelInfo, others: Sequence[str]) -> list[str]:
    settings = {
        "trainer.precision": front.fast_precision(),
        "trainer.num_sanity_val_steps": "0",
        "test_after_fit": "false",
        "data": "bdclean.data.ImageFolder",
        **{f"data.{key}": str(list(getattr(info, key))) for key in ("mean", "std")},
    }
    named = {"arch": job.arch, "width": job.width, "stem": job.known.get("stem")}
    last = {
        "run": job.run,
        "data.input_size": str(info.input_size),
        "data.num_classes": str(info.num_classes or 1),
        "data.defense_root": IN_MEMORY if job.pixels is not None else job.folder,
        **({"model.weights": job.model} if job.suspect is None else {}),
        **{f"model.{key}": str(value) for key, value in named.items() if value is not None},
    }
    if job.method == "cbd":
        last["model.probe"] = "null"  # it would need labels
    config = ["-c", str(find(CONFIGS[job.method], "--method"))]
    begun = front.going_on(Path(job.run), others)
    return [*front.defaults(settings, others), *config, *others, *front.as_words(last), *begun]


def _write(job: Job, product: SplitModel, out: Path) -> tuple[str, ...]:
    """Writes the product by the names of what came in; gives what of that is not as it was."""
    if job.network is None:
        return save_like(job.model, product, out)[1]
    state = joined(job.network, product).state_dict()
    if out.suffix == SAFETENSORS:
        write(state, out, {"format": "pt"})
    else:
        write_torch(dict(state), out)
    return ()


def _save(run: RunFolder, before: Sequence[Verdict], after: Sequence[Verdict]) -> None:
    checks = {"before": [asdict(v) for v in before], "after": [asdict(v) for v in after]}
    write_text(run.path / "checks.json", json.dumps(checks, indent=2) + "\n")


def command(words: Sequence[str]) -> str:
    """The command of some words."""
    return shlex.join(["bdclean", "purify", *words])
