"""What synthetic images give away of the real ones that they were learnt from.

    python -m trainer.privacy RUN_FOLDER [--held-out SPLIT] [--features own] --out privacy.html
    python -m trainer.privacy --samples FOLDER --config FILE --held-out SPLIT --out privacy.html

The first looks at all that a run trained on, the second at a folder of samples, with the dataset of the service that
made them: table [generator.dataset], or else [trainer.dataset].
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from protocol import config
from protocol.dataset import DatasetConfig
from protocol.errors import ConfigError, DatasetError, OnTheFlyError
from trainer.privacy import report, subject
from trainer.privacy.assessment import Assessment, Options
from trainer.record import Record


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 0 done, 2 a folder, the data or an argument is wrong, 1 any other failure."""
    options = _parser().parse_args(arguments)
    try:
        found = _examine(options)
    except OnTheFlyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError | DatasetError) else 1
    for warning in found.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    attack = found.findings[0].membership
    low, high = attack.auc_interval
    print(f"near copies: {found.near_copies} of {found.images['synthetic']} synthetic images")
    print(
        f"membership inference by pixels: area under the ROC {attack.auc:.3f} (95 % interval {low:.3f} to {high:.3f})"
    )
    print(f"wrote {options.out} and {options.out.with_suffix('.json').name}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m trainer.privacy", description="What synthetic images give away.")
    parser.add_argument("run", type=Path, nargs="?", help="folder of the run")
    parser.add_argument("--samples", type=Path, help="folder of synthetic images, laid out as a dataset")
    parser.add_argument("--title", help="what made those samples (default: the folder's name)")
    parser.add_argument("--config", type=Path, help="settings file that names the dataset of the samples")
    parser.add_argument("--set", action="append", default=[], metavar="TABLE.KEY=VALUE", help="override a setting")
    parser.add_argument("--held-out", metavar="SPLIT", help="that the generator has not seen (default: the test split)")
    told = 'compare these too, beside pixels; repeatable: "own" (the run\'s model) or "timm:MODEL"'
    parser.add_argument("--features", action="append", default=[], metavar="NAME", help=told)
    for name, field in Options.model_fields.items():
        kind = int if name == "seed" else float
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, help=f"(default: {field.default})")
    parser.add_argument("--out", type=Path, default=Path("privacy.html"), help="file to write (default: %(default)s)")
    return parser


def _examine(options: argparse.Namespace) -> Assessment:
    report.check_out(options.out)
    if (options.run is None) == (options.samples is None):
        raise ConfigError("say either the folder of a run, or --samples FOLDER", param="samples")
    given = {name: getattr(options, name) for name in Options.model_fields}
    chosen = config.section(
        {"options": {name: value for name, value in given.items() if value is not None}}, "options", Options
    )
    if options.run is not None:
        record = Record.open(options.run)
        return report.write(subject.of_run(record, options.held_out), options.features, chosen, options.out)
    title = options.title or options.samples.name
    settings = config.load(options.config, options.set)
    config.check_tables(settings, config.TABLES)
    found = subject.of_samples(options.samples, title, DatasetConfig.of_service(settings), options.held_out)
    return report.write(found, options.features, chosen, options.out)


if __name__ == "__main__":
    sys.exit(main())
