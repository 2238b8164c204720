"""The JSON documents that ``--json`` prints, by kind: what a script may rely on.

A document is ``{"schema": "backpropagate.<kind>/1", …}``. Keys may be added under the same number; one that is taken
away or changes its meaning raises the number. JSON Schemas are made from this package (docs/reference/schemas), and
the tests hold every document that any of them prints to its schema.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from backpropagate.cli.documents.data import DataDoctor, DataPreview, DataReport, DataWritten, Validate
from backpropagate.cli.documents.machine import ConfigShow, Doctor, Error, Errors, Info, SettingRow, Ui
from backpropagate.cli.documents.runs import (
    DiffRuns,
    ExportRuns,
    ListRuns,
    Prove,
    QueueAdd,
    QueueList,
    QueueRm,
    QueueRun,
    Report,
    RunsImported,
    RunsNamed,
    RunsNoted,
    RunsProtected,
    RunsRemoved,
    RunsTagged,
    ShowRun,
)
from backpropagate.cli.documents.shipping import (
    Chat,
    Export,
    ExportPlan,
    Imatrix,
    OllamaList,
    OllamaRegister,
    OllamaRemoved,
    Push,
    PushPlan,
)
from backpropagate.cli.documents.training import (
    CertificateDocument,
    Download,
    EstimateVram,
    EstimateVramTable,
    Eval,
    Merge,
    Models,
    ModelsSupported,
    MultiRun,
    Quickstart,
    Train,
)

DOCUMENTS: Mapping[str, type] = {
    "train": Train,
    "quickstart": Quickstart,
    "export": Export,
    "multi-run": MultiRun,
    "merge": Merge,
    "chat": Chat,
    "export-plan": ExportPlan,
    "imatrix": Imatrix,
    "push": Push,
    "push-plan": PushPlan,
    "ollama-register": OllamaRegister,
    "ollama-list": OllamaList,
    "ollama-rm": OllamaRemoved,
    "eval": Eval,
    "list-runs": ListRuns,
    "show-run": ShowRun,
    "resume": Train,
    "replay": Train,
    "extend": Train,
    "diff-runs": DiffRuns,
    "prove": Prove,
    "export-runs": ExportRuns,
    "report": Report,
    "runs-rm": RunsRemoved,
    "runs-tag": RunsTagged,
    "runs-note": RunsNoted,
    "runs-name": RunsNamed,
    "runs-protect": RunsProtected,
    "runs-import": RunsImported,
    "validate": Validate,
    "data-preview": DataPreview,
    "data-doctor": DataDoctor,
    "data-report": DataReport,
    "data-split": DataWritten,
    "data-clean": DataWritten,
    "data-convert": DataWritten,
    "queue-add": QueueAdd,
    "queue-run": QueueRun,
    "queue-list": QueueList,
    "queue-rm": QueueRm,
    "config-show": ConfigShow,
    "config-explain": SettingRow,
    "models": Models,
    "models-supported": ModelsSupported,
    "certificate": CertificateDocument,
    "download": Download,
    "estimate-vram": EstimateVram,
    "estimate-vram-table": EstimateVramTable,
    "ui": Ui,
    "doctor": Doctor,
    "info": Info,
    "errors": Errors,
    "error": Error,
}
"""The body of each kind of document."""


def build_schema(kind: str) -> dict[str, Any]:
    """The JSON Schema (2020-12) of a kind of document, ``schema`` key included.

    Raises:
        KeyError: There is no such kind.
    """
    import msgspec

    (body,), definitions = msgspec.json.schema_components([DOCUMENTS[kind]])
    name = body["$ref"].rpartition("/")[2]
    whole = dict(definitions.pop(name))
    whole["properties"] = {"schema": {"const": f"backpropagate.{kind}/1"}, **whole["properties"]}
    whole["required"] = ["schema", *whole["required"]]
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": f"backpropagate.{kind}.1.json"}
    return {**head, **whole, **({"$defs": definitions} if definitions else {})}
