"""Making dsv4.Error from Python."""

from dsv4._dsv4 import Error, ErrorCode


def error(code: ErrorCode, message: str) -> Error:
    """An Error to raise: say what, expected, given, where."""
    out = Error(message)
    out.code = code
    return out


def invalid(message: str) -> Error:
    return error(ErrorCode.INVALID_ARGUMENT, message)


def unsupported(message: str) -> Error:
    return error(ErrorCode.UNSUPPORTED, message)
