"""`infogrowth run`: run the stages of a YAML file: pack, embed, recaption, grow, select, report.

    output: output/cc3m               # folder of all results
    seed_ids: seeds.json              # SHARED keys go to every stage that has an option of the name
    pack: {image_root: cc3m}
    embed: {encoder: Salesforce/blip-itm-base-coco}
    grow: {min_align: 0.4}
    report:                           # a stage is run when its key is there; null is its defaults

A stage's keys are the options of the command of that name. What a stage reads and writes has
defaults: the results of the stages before it. A run that was stopped goes on when it is started
again, since every command does.
"""

import contextlib
import logging
import os
import shlex
import time
from dataclasses import dataclass, fields
from importlib import import_module
from pathlib import Path
from typing import Any

from infogrowth.commands import SHARED_WORK
from infogrowth.config import build_config, nearest, option, read_yaml
from infogrowth.errors import UserError

log = logging.getLogger(__name__)

STAGES = ("pack", "embed", "recaption", "grow", "select", "report")
SHARED = (
    *("seed_ids", "seed_features", "min_align", "min_recaption_align"),
    *("encoder", "vocabulary", "lmdb", "workers", "device", "seed"),
)
# What each stage writes and reads below the folder of all results, unless the file says otherwise.
DEFAULTS = {
    "pack": {"output_root": "."},
    "embed": {"output": "features", "lmdb": "lmdb_train", "annotations": "cc3m_train.json"},
    "recaption": {"output": "recaptions", "features": "features"},
    "grow": {
        "features": "features",
        "recaptions": "recaptions",
        "growth": "growth",
        "output": "grown.json",
    },
    "select": {"output": "selected.json", "growth": "growth"},
    "report": {"output": "report.html", "growth": "growth"},
}


@dataclass(frozen=True)
class Config:
    """Options of `run`."""

    pipeline: str = option(help="the YAML file of the stages", positional=True)
    until: str | None = option(None, help="stop after this stage")
    only: list[str] = option([], help="run these stages alone, on the results of earlier runs")


@dataclass(frozen=True)
class Stage:
    """One command with its options."""

    name: str
    config: Any

    @property
    def module(self) -> Any:
        return import_module(f"infogrowth.commands.{self.name}")

    def command(self) -> str:
        """The command line that does the same."""
        positional, options = [], []
        for field in fields(self.config):
            value, flag = getattr(self.config, field.name), field.name.replace("_", "-")
            if value is None or value == field.default or value == []:
                continue
            if field.metadata["positional"]:
                positional.append(str(value))
            elif isinstance(value, bool):
                options.append(f"--{flag}" if value else f"--no-{flag}")
            else:
                values = value if isinstance(value, list) else [value]
                options += [f"--{flag}", *map(str, values)]
        return shlex.join(["python", "-m", "infogrowth", self.name, *positional, *options])


def run(config: Config) -> int:
    """Check all stages, then run them one after the other, and say what each took."""
    stages = read_stages(config)
    launched = int(os.environ.get("WORLD_SIZE", "1")) > 1
    took: list[tuple[str, float]] = []
    with contextlib.ExitStack() as stack:
        if launched:  # one process group for all stages; without the launcher not even torch
            from infogrowth.distributed import barrier, process_group

            device = str(read_yaml(config.pipeline).get("device", "auto"))
            stack.enter_context(process_group(device))
        for number, stage in enumerate(stages, start=1):
            log.info("\n[%d/%d] %s", number, len(stages), stage.command())
            started = time.monotonic()
            if stage.name in SHARED_WORK or os.environ.get("RANK", "0") == "0":
                try:
                    stage.module.run(stage.config)
                except UserError as error:
                    raise UserError(f"stage {stage.name}: {error}") from error
            if launched:
                barrier()
            took.append((stage.name, time.monotonic() - started))
    log.info("\n%s", "\n".join(f"{name:<10} {seconds:>8.1f} s" for name, seconds in took))
    return 0


def read_stages(config: Config) -> list[Stage]:
    """The stages to run, with all their options, checked before any work is done. Raises UserError:
    an unknown stage or option (with the nearest name), a value of the wrong type, or a required
    option that nobody gave."""
    path = config.pipeline
    content = read_yaml(path)
    for key in content:
        valid = ["output", *STAGES, *SHARED]
        if key not in valid:
            raise UserError(f"unknown key {key!r} in {path}{nearest(str(key), valid)}")
    for name in [config.until, *config.only]:
        if name is not None and name not in content:
            raise UserError(f"{path} has no stage {name!r}{nearest(name, list(content))}")
    if not isinstance(output := content.get("output"), str):
        raise UserError(f"{path} needs a key output: the folder of all results")
    present = [name for name in STAGES if name in content]
    if not present:
        raise UserError(f"{path} has no stage; it may have {', '.join(STAGES)}")
    if config.only:
        chosen = [name for name in present if name in config.only]
    else:
        end = present.index(config.until) + 1 if config.until in present else len(present)
        chosen = present[:end]
    shared = {key: content[key] for key in SHARED if key in content}
    return [_stage(name, content[name], shared, Path(output), present, path) for name in chosen]


def _stage(
    name: str, given: Any, shared: dict[str, Any], output: Path, present: list[str], path: str
) -> Stage:
    given = {} if given is None else given
    if not isinstance(given, dict):
        raise UserError(f"the stage {name} of {path} must hold `key: value` lines")
    config = import_module(f"infogrowth.commands.{name}").Config
    known = {field.name for field in fields(config)}
    without_default = set() if "recaption" in present else {"recaptions"}
    for field in fields(config):  # of options that exclude each other one is given: no default then
        group = {field.name, *field.metadata["excludes"].split()}
        if len(group) > 1 and given.keys() & group:
            without_default |= group
    values: dict[str, tuple[Any, str]] = {
        key: (str(output / default), f"the default of {key!r}")
        for key, default in DEFAULTS[name].items()
        if key not in without_default
    }
    values |= {k: (v, f"key {k!r} in {path}") for k, v in shared.items() if k in known}
    values |= {k: (v, f"key {k!r} of stage {name} in {path}") for k, v in given.items()}
    return Stage(name, build_config(config, values, f"stage {name} of {path}: "))
