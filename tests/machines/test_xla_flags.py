"""XLA's flags: which GPU gets which, that this XLA knows them, and that one it does not know is reported and left out."""

import pytest

from herd_jax.machines import xla_flags
from herd_jax.machines.xla_flags import HARDWARE_FLAGS, Flag, apply_flags, choose_flags, set_flags, unknown_flags


def test_every_flag_of_the_table_is_known_and_says_what_it_is_for():
    flags = {flag for gpu in HARDWARE_FLAGS for flag in choose_flags(gpu)}
    assert all(flag.purpose for flag in flags)
    assert unknown_flags([f"--{flag.name}={flag.value}" for flag in flags if not flag.name.isupper()]) == []


@pytest.mark.parametrize("gpu, fraction", [("NVIDIA H100 80GB HBM3", "0.92"), ("NVIDIA H200", "0.94"), ("NVIDIA RTX 4090", None)])
def test_flags_by_hardware(gpu, fraction):
    values = {flag.name: flag.value for flag in choose_flags(gpu)}
    assert values.get("XLA_PYTHON_CLIENT_MEM_FRACTION") == fraction
    assert values["xla_gpu_enable_latency_hiding_scheduler"] == "true"


@pytest.mark.parametrize("jax, is_there", [("0.10.2", True), ("0.11.2", True), ("0.12.0.1", False), ("1.0", False)])
def test_flags_that_newer_versions_do_without(jax, is_there, monkeypatch):
    monkeypatch.setattr(xla_flags.metadata, "version", lambda name: jax)
    assert ("xla_gpu_enable_dynamic_slice_fusion" in {flag.name for flag in choose_flags("NVIDIA H100")}) == is_there


def test_an_unknown_flag_is_reported_and_what_is_set_stays(capsys):
    given = {"xla_gpu_autotune_level": "4", "xla_of_no_version": "1", "xla_gone_too": "1", "SOME_VARIABLE": "1"}
    flags = tuple(Flag(name, value, "purpose") for name, value in given.items())
    environment = {"SOME_VARIABLE": "0"}
    set_flags(flags, environment)
    assert environment == {"SOME_VARIABLE": "0", "XLA_FLAGS": "--xla_gpu_autotune_level=4"}
    assert capsys.readouterr().err == "warning: this version of XLA does not know --xla_of_no_version=1, --xla_gone_too=1: left out\n"
    environment = {"XLA_FLAGS": "--xla_gpu_autotune_level=0"}
    set_flags(flags[:1], environment)
    assert environment["XLA_FLAGS"] == "--xla_gpu_autotune_level=0"


def test_only_where_a_gpu_is_and_may_be_used(monkeypatch):
    for gpu, platforms, is_set in (("NVIDIA H100", None, True), ("NVIDIA H100", "cpu", False), (None, None, False)):
        monkeypatch.setattr(xla_flags, "find_gpu", lambda gpu=gpu: gpu)
        environment = {"JAX_PLATFORMS": platforms} if platforms else {}
        apply_flags(environment)
        assert ("XLA_FLAGS" in environment) == is_set
