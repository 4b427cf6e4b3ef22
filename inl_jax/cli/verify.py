"""Checks that a run directory holds what was saved in it: inl verify RUN [--step best] [--json].

Every file of a checkpoint is compared with the size and the SHA-256 in its manifest. Exit codes: 0
all is as it was saved (checkpoints without a manifest are named); 1 something is damaged or gone; 2
a mistake in the input. It may run beside a training.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path

from inl_jax.config import InputError
from inl_jax.console import show
from inl_jax.failures import EXIT_FAILED
from inl_jax.files import json_text
from inl_jax.terminal import signals
from inl_jax.terminal.command_line import Parser


def main(argv: Sequence[str]) -> int:
    """The verb; returns the exit code."""
    parser = Parser("verify", __doc__)
    parser.add_run()
    parser.add_argument("--step", help="check one checkpoint only: latest, best, or its update")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    flags = parser.parse_flags(argv)
    # Imported late: a mistake on the command line is answered at once.
    from inl_jax.storage.audit import check_checkpoints, check_files
    from inl_jax.storage.identity import CONFIG_NAME, steps_on_disk

    signals.unwind()
    run_dir = Path(flags.checkpoint)
    if not ((run_dir / CONFIG_NAME).exists() or steps_on_disk(run_dir)):
        raise InputError(f"{run_dir}: not a run directory (no config.json and no checkpoint in it)")
    findings = []
    side_files = () if flags.step else check_files(run_dir)
    for finding in itertools.chain(check_checkpoints(run_dir, flags.step or "all"), side_files):
        findings.append(finding)
        if not flags.json:
            detail = f" ({finding.detail})" if finding.detail else ""
            show(f"{finding.what}: {finding.state}{detail}")
    good = all(finding.state != "damaged" for finding in findings)
    if flags.json:
        found = [finding._asdict() for finding in findings]
        show(json_text({"run": str(run_dir), "good": good, "findings": found}))
    return 0 if good else EXIT_FAILED
