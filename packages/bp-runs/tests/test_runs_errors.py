import pytest

from bp_runs.errors import ERRORS_PAGE, CodedError, ContractError, DiskFullError, GateError, UserError, registered_codes
from bp_runs.wording import render


def test_two_owners_of_one_code_fail_at_definition():
    with pytest.raises(ContractError, match="belongs to"):
        type(
            "Thief",
            (UserError,),
            {"code": "INPUT_RUN_NOT_FOUND", "when": "x", "default_fix": "y", "__module__": "t"},
        )
    assert registered_codes()["INPUT_RUN_NOT_FOUND"].__name__ == "RunNotFoundError"


@pytest.mark.parametrize("code", ["input_lower", "WRONG_PREFIX", "DEP_NOT_FOR_USERS", "INPUT"])
def test_a_code_must_have_its_branch_s_prefix(code):
    with pytest.raises(ContractError, match="must start with"):
        type("Odd", (UserError,), {"code": code, "when": "x", "default_fix": "y", "__module__": "t"})


def test_a_code_needs_words():
    with pytest.raises(ContractError, match="fix"):
        type("Mute", (UserError,), {"code": "INPUT_MUTE_TEST", "__module__": "t"})
    assert "INPUT_MUTE_TEST" not in registered_codes()


def test_a_branch_cannot_be_raised():
    with pytest.raises(ContractError, match="has no code"):
        UserError("x")


def test_an_error_is_data_until_it_is_printed():
    error = DiskFullError("no room", cause="ENOSPC", details={"need_bytes": 3})
    assert str(error) == "[STATE_DISK_FULL]: no room"
    assert error.to_dict() == {
        "code": "STATE_DISK_FULL",
        "message": "no room",
        "cause": "ENOSPC",
        "fix": render(DiskFullError.default_fix),
        "setting": None,
        "exit_status": 2,
        "page": f"{ERRORS_PAGE}#state_disk_full",
        "details": {"need_bytes": 3},
    }


def test_exit_statuses_by_branch():
    assert (UserError.exit_status, CodedError.exit_status, GateError.exit_status) == (1, 2, 65)
