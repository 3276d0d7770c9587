"""`vattn.info` tells what runs, and why."""

import pytest
import torch

import vattn
from vattn import _library, info


def test_versions_are_those_of_the_running_process():
    versions = info.collect()["versions"]
    assert versions["vattn"] == vattn.__version__
    assert versions["torch"] == torch.__version__


def test_every_public_operator_is_listed_for_every_device():
    operators = info.collect()["operators"]
    assert set(operators) == {name for name in vattn.__all__ if hasattr(vattn.reference, name)}
    assert "leap_attention" in operators
    assert all(set(devices) == set(info.DEVICES) for devices in operators.values())


def test_a_missing_extension_is_explained(monkeypatch, capsys):
    monkeypatch.setattr(_library, "_C", None)
    monkeypatch.setattr(_library, "extension_error", "no C++ compiler: 'g++' is not on the PATH")
    info.main()
    printed = capsys.readouterr().out
    assert "leap_attention         cpu   reference: no C++ compiler: 'g++' is not on the PATH" in printed


def test_a_kernel_names_its_instruction_set(monkeypatch):
    class Extension:
        __file__ = "/somewhere/_C.so"

        @staticmethod
        def cpu_capability() -> str:
            return "avx2"

    monkeypatch.setattr(_library, "_C", Extension)
    found = info.collect()
    assert found["extension"]["path"] == "/somewhere/_C.so"
    assert found["operators"]["periodic_shift"]["cpu"] == "kernel: C++, avx2"


def test_an_extension_without_the_operator_is_explained(monkeypatch):
    monkeypatch.setattr(_library, "_C", object())
    monkeypatch.setattr(_library, "_without_cpu_kernel", {"periodic_shift"})
    assert info._runs("periodic_shift", "cpu").startswith("reference: vattn._C was built before this operator")


def test_missing_triton_is_explained(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(_library, "KERNEL_DEVICES", {"meta", "cpu"})
    assert info.collect()["operators"]["leap_attention"]["cuda"] == "reference: Triton is not installed"


def test_a_compiled_cuda_kernel_is_told_from_triton(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(_library, "_with_cuda_cpp", {"select_tokens"})
    assert info._runs("select_tokens", "cuda") == "kernel: CUDA C++"


def test_an_extension_that_does_not_load_is_explained(monkeypatch):
    def fail(name: str) -> None:
        raise ImportError("undefined symbol: torch_new_shim")

    monkeypatch.setattr(_library.importlib, "import_module", fail)
    monkeypatch.setattr(_library, "build_record", lambda: {"error": None, "torch": "2.99.0"})
    extension, error = _library._load_extension()
    assert extension is None
    expected = "the extension was built with torch 2.99.0, this is torch"
    assert error == f"{expected} {torch.__version__}: undefined symbol: torch_new_shim"


def test_an_extension_that_is_older_than_an_operator(monkeypatch):
    """It runs the reference, and says so."""
    if _library._C is None:
        pytest.skip("the extension is not built")
    monkeypatch.setattr(_library, "_without_cpu_kernel", {"periodic_shift"})
    x = torch.randn(1, 1, 3, 2, 4)
    with pytest.warns(UserWarning, match="older than vattn.periodic_shift: build it again"):
        out = vattn.periodic_shift(x, 2)
    monkeypatch.undo()
    assert torch.equal(out, vattn.periodic_shift(x, 2))


def test_an_extension_with_another_schema():
    """PyTorch does not compare what a kernel takes with the schema: it would read numbers as others."""
    if _library._C is None:
        pytest.skip("the extension is not built")
    assert _library._C.kinds_of_arguments("periodic_shift") == "Tensor, int, bool"
    _library.note_compiled_kernels("periodic_shift", ("Tensor", "SymInt", "bool"))
    with pytest.raises(ImportError, match=r"^periodic_shift: vattn\._C was built for another version"):
        _library.note_compiled_kernels("periodic_shift", ("Tensor", "float", "bool"))
