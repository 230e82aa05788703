"""Steps compiled for an H100 on a machine without one: what XLA makes of them. Needs its CUDA plug-in, of the version of the installed jax:
`pip install --no-deps jax-cuda13-plugin==V jax-cuda13-pjrt==V`, and tokamax; `pytest -m slow` runs it, two minutes."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from compile_for_gpu import CASES, Case, facts_of  # noqa: E402
from gpu_estimate import SHARES, Estimate  # noqa: E402
from hlo import Module, arrays, num_bytes  # noqa: E402

from herd_jax.errors import UserError  # noqa: E402
from herd_jax.machines.hardware import HARDWARE  # noqa: E402

HAS_PLUGIN = importlib.util.find_spec("jax_plugins") is not None and importlib.util.find_spec("jax_plugins.xla_cuda13") is not None
needs_plugin = pytest.mark.skipif(
    not (HAS_PLUGIN and importlib.util.find_spec("tokamax")), reason="XLA's CUDA plug-in or tokamax is not installed"
)
# XLA before jax 0.12 transposes a tied embedding's gradient in each tick of a pipeline, and takes 5 % more memory for FSDP.
IS_OLD = jax.version.__version_info__ < (0, 12)
OF_THE_PLAN = {"8B dp 8, gather layer": 1.06, "1B pp 4, 1f1b": 1.03} if IS_OLD else {}  # shares of the planner's memory
UNHIDDEN = {"8B tp 8": 0.22, "8B dp 8, gather layer": 0.05}  # shares of the step, above which something is lost


@needs_plugin
@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_what_is_compiled(name):
    case, facts = CASES[name], facts_of(CASES[name])
    assert facts.remat_tflop == 0  # XLA recomputes no product on its own
    assert 0.95 <= facts.compiled_bytes / facts.planned_bytes <= OF_THE_PLAN.get(name, 1.02)
    assert sum(facts.exposed.values()) < UNHIDDEN.get(name, 0.02) * facts.seconds
    transposes = 0.07 if IS_OLD and case.pp > 1 else 0
    assert sum(facts.copies.values()) < (0.02 + transposes) * facts.seconds
    assert facts.kernels.get("copy", 0) < max(0.06, 0.02 + transposes) * facts.seconds
    assert (facts.host_loops == 0) == (case.pp == 1)
    assert facts.gemm_tflop < 1.01 * facts.model_gemm_tflop  # no product runs twice
    if case.part == "fp8":
        assert facts.fp8_gemms == 2
    if case.part == "decode":  # weights and pages are read once, and hardly anything else
        assert facts.seconds < 1.05 * facts.compiled_bytes / (SHARES["memory"] * HARDWARE[case.hardware].memory_bandwidth)


@needs_plugin
@pytest.mark.slow
def test_the_lower_bounds_of_the_gpu_extra_lower():
    """A short model through attention's kernel, with whatever versions are installed here."""
    assert facts_of(Case(layers=2, seq_len=1024)).kernels["attention"] > 0


@needs_plugin
@pytest.mark.parametrize("case, says", [({"tp": 3}, "choose a tp that divides it"), ({"tp": 0}, "mesh.tp is 0"), ({"hardware": "h300"}, "h300 is not known")])
def test_a_case_that_cannot_be_is_refused_in_one_sentence(case, says):
    with pytest.raises(UserError, match=says):
        facts_of(Case(**case))


LOOP = """
HloModule m
%inside (p: f32[256,256]) -> f32[256,256] {
  %p = f32[256,256]{1,0} parameter(0)
  ROOT %e = f32[256,256]{1,0} exponential(%p)
}
%body (c: (s32[], f32[256,256])) -> (s32[], f32[256,256]) {
  %c = (s32[], f32[256,256]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %x = f32[256,256]{1,0} get-tuple-element(%c), index=1
  %s = ((f32[256,256]{1,0}), f32[2048,256]{1,0}) all-gather-start(%x), replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
  %y = f32[256,256]{1,0} fusion(%x), kind=kLoop, calls=%inside
  %d = f32[2048,256]{1,0} all-gather-done(%s)
  ROOT %r = (s32[], f32[256,256]{1,0}) tuple(%i, %y)
}
%fused_compare (q: s32[]) -> pred[] {
  %q = s32[] parameter(0)
  %n = s32[] constant(7)
  ROOT %l = pred[] compare(%q, %n), direction=LT
}
%condition (c2: (s32[], f32[256,256])) -> pred[] {
  %c2 = (s32[], f32[256,256]{1,0}) parameter(0)
  %j = s32[] get-tuple-element(%c2), index=0
  ROOT %f = pred[] fusion(%j), kind=kLoop, calls=%fused_compare
}
ENTRY %main (a: f32[256,256]) -> (s32[], f32[256,256]) {
  %a = f32[256,256]{1,0} parameter(0)
  %one = s32[] constant(1)
  %copied = s32[] copy(%one)
  %t = (s32[], f32[256,256]{1,0}) tuple(%copied, %a)
  ROOT %w = (s32[], f32[256,256]{1,0}) while(%t), condition=%condition, body=%body
}
"""


def test_a_module_is_read():
    module = Module(LOOP)
    assert module.entry == "main" and list(module.computations) == ["inside", "body", "fused_compare", "condition", "main"]
    loop = module.computations["main"][-1]
    assert loop.op == "while" and loop.is_root and loop.trip_count is None and module.rounds("main", loop) == 6  # from 1 to 7
    fused = module.computations["body"][4]
    assert module.cost("body", fused).bytes == 2 * 4 * 256 * 256 and module.cost("body", fused).kind == "memory"
    assert arrays("(bf16[2,3]{1,0}, /*index=1*/s32[])") == [("bf16", [2, 3]), ("s32", [])] and num_bytes("(bf16[2,3]{1,0}, s32[])") == 16


def test_what_a_kernel_does_not_hide_is_counted():
    h100 = HARDWARE["h100"]
    totals = Estimate(Module(LOOP), h100, {"tp": 8, "cp": 1, "pp": 1, "dp": 1}, lambda loop: 0.0).totals
    message = 7 * 4 * 256 * 256 / (450e9 * 0.8) + 10e-6
    assert totals.messages["all-gather"] == pytest.approx(6 * message) and totals.host_loops == 1
    assert totals.exposed["all-gather"] == pytest.approx(6 * (message - 4e-6)) and totals.seconds == pytest.approx(6 * message + 4e-6)  # a copy before


PAGES = """
HloModule m
%put (p: bf16[9,2,16,64], i: s32[4,3], n: bf16[4,2,64]) -> bf16[9,2,16,64] {
  %p = bf16[9,2,16,64]{3,2,1,0} parameter(0)
  %i = s32[4,3]{1,0} parameter(1)
  %n = bf16[4,2,64]{2,1,0} parameter(2)
  ROOT %s = bf16[9,2,16,64]{3,2,1,0} scatter(%p, %i, %n), to_apply=%second
}
ENTRY %main (q: bf16[4,1,6,64], k: bf16[9,2,16,64], t: s32[4,3], n: bf16[4,2,64]) -> f32[5,4,1,6,64] {
  %q = bf16[4,1,6,64]{3,2,1,0} parameter(0)
  %k = bf16[9,2,16,64]{3,2,1,0} parameter(1)
  %t = s32[4,3]{1,0} parameter(2)
  %n = bf16[4,2,64]{2,1,0} parameter(3)
  %w = bf16[9,2,16,64]{3,2,1,0} fusion(%k, %t, %n), kind=kInput, calls=%put
  ROOT %o = f32[5,4,1,6,64]{4,3,2,1,0} custom-call(%q, %w, %w, %t), custom_call_target="triton", metadata={op_name="jit(run)/paged_attention/pallas_call"}
}
"""


def test_pages_are_counted_as_they_are_read_and_written():
    module = Module(PAGES)
    write, read = (module.cost("main", each) for each in module.computations["main"][-2:])
    assert write.bytes == 2 * (2 * 4 * 2 * 64) + 4 * 4 * 3  # the new keys are read and written, and the indices are read
    assert (read.kind, read.bytes, read.flops) == ("attention", 2 * 2 * 4 * 3 * 16 * 2 * 64, 2 * 2 * 4 * 3 * 16 * 6 * 64)


def test_without_the_plugin_it_says_what_to_install():
    if HAS_PLUGIN:
        pytest.skip("the plug-in is installed")
    done = subprocess.run([sys.executable, ROOT / "benchmarks/compile_for_gpu.py", "--layers", "1"], capture_output=True, text=True)
    assert done.returncode == 1 and "pip install --no-deps jax-cuda13-plugin==" in done.stderr and "Traceback" not in done.stderr
