"""The AMX kernels as they are shipped, on a processor without AMX: their tile instructions are executed in software."""

import pytest
import software_amx

WHY_NOT = software_amx.missing()


@pytest.mark.skipif(WHY_NOT is not None, reason=f"{WHY_NOT}")
def test_shipped_machine_code_on_tiles_in_software():
    # Of test_cpu_kernels.py what tiles multiply: bfloat16. `make amx` runs all of it.
    amx = "amx_bf16 and not emulated and not float32 and not float16"
    kernels = f"amx_in_software or of_the_processor or ({amx} and (bounded or statistics or strides or packed or nan))"
    done = software_amx.run("-x", "-rs", "-p", "no:cacheprovider", "tests/amx_in_software.py", "tests/test_cpu_kernels.py",
                            "-k", kernels, timeout=600)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout and "passed" in done.stdout
