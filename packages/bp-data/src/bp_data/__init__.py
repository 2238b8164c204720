"""Rows to tokens and loss masks that can be trusted. Names load on first use: importing this costs nothing."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bp_data.columns import FieldLedger, ReadOptions
    from bp_data.convert import ConvertResult, clean_file, convert_example, convert_file, split_file
    from bp_data.dedupe import Contaminated, Duplicate, find_contamination, find_duplicates
    from bp_data.doctor import Examination, Finding, examine
    from bp_data.errors import (
        DataError,
        DatasetAccessError,
        DatasetColumnsLeftError,
        DatasetEmptyError,
        DatasetFormatUnsupportedError,
        DatasetGateError,
        DatasetInvalidError,
        DatasetNotFoundError,
        DatasetParseFailedError,
        DatasetPartUnknownError,
        DatasetUnreachableError,
        DatasetUnreadableError,
        RowFault,
        TemplateFailedError,
        TokenizerInvalidError,
    )
    from bp_data.example import Chat, Example, Judged, Message, Preference, Rejected, Row, Text
    from bp_data.folders import DataFiles, find_files
    from bp_data.formats import parse_row
    from bp_data.hub import HubData, fetch_dataset, looks_like_hub_name
    from bp_data.ledger import Gate, Ledger, check_gate
    from bp_data.packing import PackedRow, build_pack, iter_packs, pack_rows, plan_packs
    from bp_data.preparation import Prepared, PrepareRequest, prepare, require_fitting
    from bp_data.preview import PreviewedRow, PreviewToken, preview_file, preview_rows
    from bp_data.quality import Limits, Report, build_report, check_limits
    from bp_data.read import read_rows
    from bp_data.reasoning import TraceBand
    from bp_data.report import report_html, report_text
    from bp_data.structure import Structure, check_structure
    from bp_data.templates.engine import ChatTemplate
    from bp_data.templates.reader import DEFAULT_TEMPLATE_NAME, load_template
    from bp_data.token_rows import (
        IGNORED,
        JudgedRow,
        JudgedRows,
        PairRow,
        PairRows,
        StoredRows,
        TokenRow,
        TokenRows,
        split_rows,
    )
    from bp_data.tokens import Tokenizer, TokenizerFacts, load_tokenizer

_HOMES = {
    "columns": "FieldLedger ReadOptions",
    "convert": "ConvertResult clean_file convert_example convert_file split_file",
    "dedupe": "Contaminated Duplicate find_contamination find_duplicates",
    "doctor": "Examination Finding examine",
    "errors": (
        "DataError DatasetAccessError DatasetColumnsLeftError DatasetEmptyError DatasetFormatUnsupportedError "
        "DatasetGateError "
        "DatasetInvalidError DatasetNotFoundError DatasetParseFailedError DatasetPartUnknownError "
        "DatasetUnreachableError DatasetUnreadableError RowFault TemplateFailedError TokenizerInvalidError"
    ),
    "example": "Chat Example Judged Message Preference Rejected Row Text",
    "folders": "DataFiles find_files",
    "formats": "parse_row",
    "hub": "HubData fetch_dataset looks_like_hub_name",
    "ledger": "Gate Ledger check_gate",
    "packing": "PackedRow build_pack iter_packs pack_rows plan_packs",
    "preparation": "PrepareRequest Prepared prepare require_fitting",
    "preview": "PreviewToken PreviewedRow preview_file preview_rows",
    "quality": "Limits Report build_report check_limits",
    "read": "read_rows",
    "reasoning": "TraceBand",
    "report": "report_html report_text",
    "structure": "Structure check_structure",
    "templates.engine": "ChatTemplate",
    "templates.reader": "DEFAULT_TEMPLATE_NAME load_template",
    "token_rows": "IGNORED JudgedRow JudgedRows PairRow PairRows StoredRows TokenRow TokenRows split_rows",
    "tokens": "Tokenizer TokenizerFacts load_tokenizer",
}
_HOME = {name: home for home, names in _HOMES.items() for name in names.split()}

__all__ = [
    "DEFAULT_TEMPLATE_NAME",
    "IGNORED",
    "Chat",
    "ChatTemplate",
    "Contaminated",
    "ConvertResult",
    "DataError",
    "DataFiles",
    "DatasetAccessError",
    "DatasetColumnsLeftError",
    "DatasetEmptyError",
    "DatasetFormatUnsupportedError",
    "DatasetGateError",
    "DatasetInvalidError",
    "DatasetNotFoundError",
    "DatasetParseFailedError",
    "DatasetPartUnknownError",
    "DatasetUnreachableError",
    "DatasetUnreadableError",
    "Duplicate",
    "Examination",
    "Example",
    "FieldLedger",
    "Finding",
    "Gate",
    "HubData",
    "Judged",
    "JudgedRow",
    "JudgedRows",
    "Ledger",
    "Limits",
    "Message",
    "PackedRow",
    "PairRow",
    "PairRows",
    "Preference",
    "PrepareRequest",
    "Prepared",
    "PreviewToken",
    "PreviewedRow",
    "ReadOptions",
    "Rejected",
    "Report",
    "Row",
    "RowFault",
    "StoredRows",
    "Structure",
    "TemplateFailedError",
    "Text",
    "TokenRow",
    "TokenRows",
    "Tokenizer",
    "TokenizerFacts",
    "TokenizerInvalidError",
    "TraceBand",
    "build_pack",
    "build_report",
    "check_gate",
    "check_limits",
    "check_structure",
    "clean_file",
    "convert_example",
    "convert_file",
    "examine",
    "fetch_dataset",
    "find_contamination",
    "find_duplicates",
    "find_files",
    "iter_packs",
    "load_template",
    "load_tokenizer",
    "looks_like_hub_name",
    "pack_rows",
    "parse_row",
    "plan_packs",
    "prepare",
    "preview_file",
    "preview_rows",
    "read_rows",
    "report_html",
    "report_text",
    "require_fitting",
    "split_file",
    "split_rows",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'bp_data' has no attribute {name!r}")
    found = getattr(import_module(f"bp_data.{_HOME[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
