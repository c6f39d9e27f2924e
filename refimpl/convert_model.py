"""Merge an FP8 checkpoint and a GGUF into one hybrid folder.

    python -m refimpl.convert_model --safetensor_path DIR --gguf_path DIR --output_path DIR

Attention, dense MLP, shared experts, router, norms and embeddings come from the safetensors as they are; the
routed experts come from the GGUF as they are. Bytes are copied, nothing is decoded. The folder is
KTransformers' (GGUF names, a file per layer, flat U8 blobs with a `.ggml_type` beside each) and carries what
that lacks: shapes, an index, the config, the tokenizer, a manifest with a checksum per tensor. See
docs/hybrid-folder.md.

`--layout sglang-kt` makes two folders for SGLang with kt-kernel instead, MODEL/ and KT/, and prints the
command that serves them. See docs/ktransformers.md.

The files are made in a folder beside the output, which is renamed when all is there; an interrupted merge
goes on where it stopped.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from refimpl.checkpoint.folder import read_config
from refimpl.cli import Parser, Progress, run, size, to_json
from refimpl.config import DeepSeekConfig
from refimpl.errors import printable
from refimpl.loading import hub
from refimpl.merge import sglang_kt
from refimpl.merge.merge_plan import MANIFEST, MergePlan, plan
from refimpl.merge.verify import contents, verify
from refimpl.merge.write import check_output, write

__all__ = ["MANIFEST", "MergePlan", "describe", "main", "plan", "verify", "write"]


def describe(p: MergePlan) -> dict[str, Any]:
    """The plan as `--json` prints it."""
    return {
        "files": [{"file": s.file, "tensors": len(s.items), "nbytes": s.nbytes} for s in p.shards],
        "tensors": p.tensors,
        "nbytes": p.nbytes,
        "expert_bytes": p.types,
        "layout": p.layout,
        "linked": [str(path) for path in p.links],
        "companions": [c.name for c in p.companions],
        "skipped_mtp_layers": list(p.skipped_layers),
    }


def _show(p: MergePlan) -> None:
    experts = ", ".join(f"{size(n)} as {kind}" for kind, n in sorted(p.types.items()))
    print(
        f"{p.tensors} tensors, {size(p.nbytes)}, in {len(p.shards)} files; routed "
        f"experts{' stay in the GGUF' * bool(p.links)}: {experts}",
        file=sys.stderr,
    )
    if p.skipped_layers:
        print(
            f"skipped: multi-token-prediction layer {', '.join(map(str, p.skipped_layers))} (beyond "
            f"num_hidden_layers, not used for chat)",
            file=sys.stderr,
        )


def main(argv: list[str]) -> int | None:
    """Run `python -m refimpl.convert_model` with these arguments."""
    parser = Parser(prog="python -m refimpl.convert_model", description=__doc__)
    parser.add_argument(
        "--safetensor_path",
        type=Path,
        help="folder of the FP8 checkpoint (safetensors, config.json, tokenizer)",
    )
    parser.add_argument(
        "--gguf_path", type=Path, help="folder of the GGUF, or a .gguf file; any part of a split one"
    )
    parser.add_argument("--output_path", type=Path, required=True, help="the hybrid folder to make")
    parser.add_argument(
        "--from-hub",
        metavar="ID",
        help="in place of --safetensor_path: a hub's repository; only the files that are used are downloaded",
    )
    parser.add_argument(
        "--link",
        action="store_true",
        help="leave the experts in the GGUF and refer to it: only the small tensors are copied",
    )
    parser.add_argument(
        "--layout",
        choices=("hybrid", sglang_kt.LAYOUT),
        default="hybrid",
        help="hybrid: one folder, KTransformers 0.2's and this package's; sglang-kt: two, for SGLang",
    )
    parser.add_argument(
        "--allow-mismatch",
        action="store_true",
        help="merge although norms or routers of the two inputs differ in value",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print what would be written, and write nothing"
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="check the output's checksums; alone, of a folder made before; with --link, record the GGUF's",
    )
    parser.add_argument(
        "--progress",
        choices=("auto", "json", "none"),
        default="auto",
        help="json: events on stderr, one object a line",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    args = parser.parse_args(argv)
    if args.safetensor_path and args.from_hub:
        parser.error("--safetensor_path and --from-hub are two names for one thing")
    source = args.safetensor_path or args.from_hub
    if not (source and args.gguf_path) and not (args.verify and not source and not args.gguf_path):
        parser.error(
            "--safetensor_path (or --from-hub) and --gguf_path are needed (or --verify alone with "
            "--output_path)"
        )
    report: dict[str, Any] = {"output_path": str(args.output_path)}
    if source:
        report |= _merge(args)
    if args.verify and not args.dry_run:
        report |= _verify(args, not source)
    if args.json:
        print(to_json(report))
    return 0


def _verify(args: Any, linked: bool) -> dict[str, Any]:
    """Check the output; `linked` experts too, unless their checksums were taken a moment ago."""
    there = contents(args.output_path)
    total = there.nbytes - (0 if linked else sum(t.nbytes for t in there.linked.values()))
    with Progress(total, "verifying", args.progress) as progress:
        count = verify(args.output_path, progress, linked=linked)
    print(f"verified {count} tensors", file=sys.stderr)
    if there.unrecorded:
        print(
            f"{there.unrecorded} tensors in a linked GGUF have no recorded checksum: only the file's size "
            f"and time were compared (merge with --link "
            "--verify to record them)",
            file=sys.stderr,
        )
    return {"verified": count, "unrecorded": there.unrecorded}


def _merge(args: Any) -> dict[str, Any]:
    """Plan and, unless it is a dry run, write."""
    folder = args.safetensor_path
    if args.from_hub:
        folder = hub.checkpoint(args.from_hub)
    check_output(args.output_path, [folder, args.gguf_path])
    p = plan(folder, args.gguf_path, linked=args.link, allow_mismatch=args.allow_mismatch, layout=args.layout)
    _show(p)
    if args.dry_run:
        for shard in p.shards:
            print(f"  {shard.file}  {len(shard.items):3} tensors  {size(shard.nbytes):>9}", file=sys.stderr)
    else:
        with Progress(
            p.nbytes + (sum(p.types.values()) if p.links and args.verify else 0), "merging", args.progress
        ) as progress:
            write(p, args.output_path, progress, record=args.verify)
        print(f"wrote {printable(str(args.output_path), 4096)}", file=sys.stderr)
    report = describe(p)
    if p.layout == sglang_kt.LAYOUT:
        width = DeepSeekConfig.from_dict(read_config(Path(folder)), where=folder).moe_intermediate_size
        report["launch"] = sglang_kt.launch_command(args.output_path, width)
        print(f"serve it with\n  {printable(report['launch'], 4096)}", file=sys.stderr)
    return report


if __name__ == "__main__":
    raise SystemExit(run(main))
