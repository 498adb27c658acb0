"""The doctor's findings for machines and for the console."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from sd_train.config.textfile import printable
from sd_train.data.images import centred_view
from sd_train.data.index import ImageIndex
from sd_train.doctor.check_captions import CHUNK_LIMITS
from sd_train.doctor.diagnose import Diagnosis, Statistics
from sd_train.doctor.finding import SEVERITIES, Finding
from sd_train.doctor.survey import SubsetSurvey

FORMAT = 1
_SHOWN = 3


def as_json(diagnosis: Diagnosis) -> dict[str, object]:
    """Everything the page shows, pictures aside, as JSON values; sizes are [width, height] in pixels."""
    indexes = diagnosis.indexes
    return {
        "format": FORMAT,
        "counts": {severity: diagnosis.count(severity) for severity in SEVERITIES},
        "findings": [_finding(finding) for finding in diagnosis.findings],
        "subsets": [
            _subset(diagnosis, subset, figures)
            for subset, figures in zip(diagnosis.survey.subsets, diagnosis.statistics, strict=True)
        ],
        "training": [] if indexes is None else [_index(index) for index in indexes.training],
        "validation": [] if indexes is None else [_index(index) for index in indexes.validation],
        "warnings": [printable(text) for text in diagnosis.warnings],
    }


def _finding(finding: Finding) -> dict[str, object]:
    return {
        "kind": finding.kind.name,
        "severity": finding.kind.severity,
        "title": finding.kind.title,
        "place": printable(finding.place),
        "dataset": finding.dataset,
        "subset": finding.subset,
        "explanation": printable(finding.explanation),
        "fix": printable(finding.fix),
        "files": [
            {"path": printable(str(sight.path)), "note": printable(sight.note), "group": sight.group}
            for sight in finding.sights
        ],
    }


def _subset(diagnosis: Diagnosis, subset: SubsetSurvey, figures: Statistics) -> dict[str, object]:
    config = subset.config
    return {
        "dataset": subset.place.dataset,
        "subset": subset.place.subset,
        "place": printable(config.origin),
        "image_dir": printable(str(config.image_dir)),
        "metadata_file": None if config.metadata_file is None else printable(str(config.metadata_file)),
        "is_reg": config.is_reg,
        "images": figures.images,
        "captions": figures.captions,
        "tokens": {
            "median": float(np.median(figures.tokens)) if figures.tokens else None,
            "longest": max(figures.tokens, default=None),
            **{f"above_{limit}": sum(tokens > limit for tokens in figures.tokens) for limit in CHUNK_LIMITS},
        },
        "tags": [{"tag": printable(tag), "captions": count} for tag, count in figures.tags],
        "masks": {printable(key): share for key, share in figures.coverage.items()},
        "files": [
            {
                "path": printable(str(item.path)),
                "size": look.size,
                "format": look.format or None,
                "trouble": look.trouble or None,
                "caption": None if item.caption is None else printable(item.caption),
            }
            for item in subset.items
            for look in [diagnosis.looks[item.path]]
        ],
    }


def _index(index: ImageIndex) -> dict[str, object]:
    counts = index.bucket_counts()
    batch = index.dataset.batch_size
    buckets = [
        {
            "resolution": list(size),
            "images": int((index.bucket_of == bucket).sum()),
            "samples": counts[bucket],
            "batches": -(-counts[bucket] // batch),
        }
        for bucket, size in enumerate(index.buckets)
    ]
    return {
        "place": printable(index.dataset.origin),
        "resolution": list(index.dataset.resolution),
        "batch_size": batch,
        "buckets": buckets,
        "images": [_image(index, row) for row in range(len(index))],
    }


def _image(index: ImageIndex, row: int) -> Mapping[str, object]:
    record = index.record(row)
    return {
        "path": printable(str(record.path)),
        "size": list(record.size),
        "bucket": list(record.bucket),
        "resized": list(record.resized),
        "crop_left_top": list(centred_view(record, False).crop),
        "repeats": float(index.repeats[row]),
        "is_reg": record.is_reg,
    }


def summary(diagnosis: Diagnosis) -> list[str]:
    """The findings in a few lines each, worst first."""
    lines = []
    for finding in diagnosis.findings:
        names = [printable(sight.path.name) for sight in finding.sights]
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        shown = f" ({', '.join(names[:_SHOWN])}{more})" if names else f": {finding.explanation}"
        lines.append(f"{finding.kind.severity}: {finding.kind.title}{shown}")
    return lines
