import subprocess
import sys

import dsv4


def test_import_needs_no_array_library():
    code = "import sys, dsv4; print({'torch', 'numpy', 'cupy', 'jax'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


def test_version_and_names():
    assert dsv4.__version__.count(".") == 2
    for name in dsv4.__all__:
        assert getattr(dsv4, name) is not None
    for name in dsv4.ops.__all__:
        assert getattr(dsv4.ops, name).__doc__


def test_error_is_a_runtime_error_with_a_code():
    assert issubclass(dsv4.Error, RuntimeError)
    try:
        dsv4.Engine.load("/no/such/folder")
    except dsv4.Error as error:
        assert error.code == dsv4.ErrorCode.NOT_FOUND
        assert error.code == 2
        assert "/no/such/folder" in str(error)
    else:
        raise AssertionError("no error")


def test_backends_list_the_cpu_and_reasons():
    reports = dsv4.backends()
    cpu = [report for report in reports if report["platform"] == "cpu"]
    assert len(cpu) == 1 and cpu[0]["usable"] and cpu[0]["name"] == "CPU_DSV4"
    for report in reports:
        assert report["usable"] == (report["reasons"] == [])
