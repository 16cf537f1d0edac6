"""fastdpo cache: info, verify, merge, prune."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from fastdpo.cli.arguments import count
from fastdpo.cli.reference_model import add_data_arguments, add_model_arguments, check_model, load_reference
from fastdpo.types import UserError

if TYPE_CHECKING:
    from fastdpo.reference.maintain import CacheInfo


def add_commands(commands: Any) -> None:
    cache = commands.add_parser(
        "cache",
        help="look after folders of reference log-probs",
        description="Looks after folders of reference log-probs, which fastdpo precompute and fastdpo train make.",
    )
    actions = cache.add_subparsers(dest="action", metavar="COMMAND", required=True)

    info = actions.add_parser(
        "info",
        help="what a folder holds",
        description="What folders hold, and of which model; without CACHE, one line for each in the user's cache.",
    )
    info.add_argument("caches", nargs="*", metavar="CACHE", help="folder of reference log-probs")
    info.add_argument("--json", action="store_true", help="print a JSON list")
    info.set_defaults(run=_info)

    verify = actions.add_parser(
        "verify",
        help="read everything, name what is damaged",
        description="Reads everything in a folder and names what is damaged. With --model and --dataset, it also draws "
        "rows, runs them through the model, plainly, and compares. Exit code 0: sound; 1: not.",
    )
    verify.add_argument("cache", metavar="CACHE")
    verify.add_argument(
        "--repair", action="store_true", help="set damaged files aside; write a missing manifest from the shards"
    )
    against = verify.add_argument_group("against the model")
    add_model_arguments(against, required=False)
    add_data_arguments(against, required=False)
    against.add_argument("--rows", type=count, default=32, metavar="N", help="to draw (default 32)")
    verify.set_defaults(run=_verify)

    merge = actions.add_parser(
        "merge",
        help="bring folders into one",
        description="Brings what folders of one model hold into OUTPUT, new or not; they stay as they are. "
        "Exit code 1: a damaged shard was left out.",
    )
    merge.add_argument("output", metavar="OUTPUT")
    merge.add_argument("sources", nargs="+", metavar="SOURCE")
    merge.set_defaults(run=_merge)

    prune = actions.add_parser(
        "prune",
        help="drop what is of no use, make few shards of many",
        description="Deletes files that were set aside, old temporary files and rows that stand there twice, and puts "
        "small shards into large ones.",
    )
    prune.add_argument("cache", metavar="CACHE")
    prune.add_argument("--dry_run", action="store_true", help="say what it would do, and change nothing")
    prune.set_defaults(run=_prune)

    for action in (info, verify, merge, prune):
        action.set_defaults(takes_config=False, prog=action.prog)


def _info(options: argparse.Namespace, rest: list[str]) -> None:
    from fastdpo.reference.maintain import describe

    if not options.caches:
        _list(options.json)
        return
    infos = [describe(cache) for cache in options.caches]
    if options.json:
        print(json.dumps([info.as_dict() for info in infos], indent=2))
    else:
        print("\n\n".join(f"{info.path}\n{_table(_facts(info), indent='  ')}" for info in infos))


def _list(as_json: bool) -> None:
    """The folders of the user's cache, those of other formats too."""
    from fastdpo.reference.cache import user_cache_dir
    from fastdpo.reference.folder import OtherFormat, size_of
    from fastdpo.reference.maintain import describe

    found: list[dict[str, Any]] = []
    rows = [("size", "sequences", "model", "folder")]
    for folder in sorted(user_cache_dir().glob("reference-*/*")):
        size = _size(size_of(folder.iterdir())) if folder.is_dir() else ""
        try:
            info = describe(folder)
        except UserError as error:
            old = f"format {error.format}, no longer read" if isinstance(error, OtherFormat) else f"unusable: {error}"
            found.append({"path": str(folder), "error": str(error)})
            rows.append((size, "", old, str(folder)))
        else:
            found.append(info.as_dict())
            rows.append((size, f"{info.sequences:,}", _model(info), info.path))
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        print(_table(rows, right=2) if found else f"no reference caches in {user_cache_dir()}")


def _verify(options: argparse.Namespace, rest: list[str]) -> int:
    from fastdpo.reference.maintain import verify

    if bool(options.model) != bool(options.dataset) or (options.adapter and not options.model):
        raise UserError("to compare with the model, give both --model and --dataset.")
    if options.model:
        check_model(options)
    report = verify(options.cache, options.repair)
    for name, what in report.bad.items():
        print(f"{name}: {what}" + (f"; {report.repaired[name]}" if name in report.repaired else ""))
    verdict = "sound" if report.sound else f"{_count(len(report.bad), 'file')} not sound"
    print(f"{report.path}: {_count(report.shards, 'shard')}, {_count(report.sequences, 'sequence')}: {verdict}")
    agrees = _agrees(options) if options.model else True
    return int(not (report.sound and agrees))


def _agrees(options: argparse.Namespace) -> bool:
    from fastdpo.data import open_rows
    from fastdpo.reference import ReferenceCache
    from fastdpo.reference.recheck import recheck

    rows = open_rows(options.dataset, split=options.split, streaming=options.streaming)
    reference = load_reference(options)
    found = recheck(
        reference.model,
        (row for _, row in rows),
        ReferenceCache(options.cache, set_aside_damaged=False),
        rows=options.rows,
        tokenizer=reference.tokenizer,
        max_length=options.max_length,
        truncation_mode=options.truncation_mode,
        autocast_dtype=reference.autocast_dtype,
    )
    verdict = "agree" if found.agrees else "DO NOT AGREE"
    print(
        f"{_count(found.sequences, 'sequence')} against the model: they {verdict}; at most {found.largest:.1e} nats a "
        f"token apart (row {found.row}, counted from 0), allowed {found.tolerance:.0e}"
    )
    return found.agrees


def _merge(options: argparse.Namespace, rest: list[str]) -> int:
    from fastdpo.reference.maintain import merge

    done = merge(options.output, options.sources)
    for shard, what in done.damaged.items():
        print(f"left out: {shard} ({what})")
    print(
        f"{done.path}: {_count(done.sequences, 'sequence')}, {done.new:,} of them new; "
        f"{_count(done.copied, 'shard')} copied, {done.skipped:,} there already"
    )
    return int(bool(done.damaged))


def _prune(options: argparse.Namespace, rest: list[str]) -> None:
    from fastdpo.reference.maintain import prune

    done = prune(options.cache, dry_run=options.dry_run)
    print(done.path + (" (dry run: nothing was changed)" if options.dry_run else ""))
    facts = [
        ("rows", f"{done.rows_kept:,} kept, {done.rows_dropped:,} dropped"),
        ("shards", f"{done.shards_before:,} -> {done.shards_after:,}"),
        ("files removed", f"{len(done.removed):,} set aside or left by writers"),
        ("freed", ("about " if options.dry_run else "") + _size(done.bytes_freed)),
    ]
    print(_table(facts, indent="  "))


def _facts(info: CacheInfo) -> list[tuple[str, str]]:
    facts = [
        *info.about.items(),
        ("created", info.created or "unknown"),
        *info.fingerprint.items(),
        ("format", f"{info.format}, {'log-prob of each token' if info.per_token else 'sums only'}"),
        ("sequences", f"{info.sequences:,}" + (f" and {info.duplicates:,} duplicates" if info.duplicates else "")),
        ("tokens", f"{info.tokens:,}"),
        ("log-prob", "none" if info.mean_logp is None else f"{info.mean_logp:.4f} a token on average"),
        ("size", f"{_size(info.bytes)} in {_count(info.shards, 'shard')}"),
    ]
    facts += [("unreadable", f"{name}: {what}") for name, what in info.unreadable.items()]
    if info.damaged:
        facts.append(("set aside", f"{_count(len(info.damaged), 'damaged file')} (fastdpo cache prune deletes them)"))
    if info.leftovers:
        facts.append(("temporary", f"{_count(len(info.leftovers), 'file')} of writers at work or killed"))
    return facts


def _model(info: CacheInfo) -> str:
    name = info.about.get("model") or f"weights {info.fingerprint.get('weights', 'unknown')[:8]}"
    return f"{name}, {info.fingerprint.get('dtype', 'unknown dtype')}"


def _table(rows: Iterable[Sequence[object]], indent: str = "", right: int = 0) -> str:
    """Aligned columns, the first `right` of them to the right."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        indent
        + "  ".join(
            cell.rjust(width) if number < right else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    )


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def _size(count: int) -> str:
    power = min(len(str(abs(count))) - 1, 14) // 3
    return f"{count / 1000**power:.1f} {('B', 'kB', 'MB', 'GB', 'TB')[power]}" if power else f"{count} B"
