"""What `import hyperattention` loads, and what it leaves alone."""

import pytest

CHECK = """
import sys
import hyperattention
{more}
loaded = sorted({{"triton", "transformers", "matplotlib", "plotly", "typer", "rich"}} & set(sys.modules))
print(loaded)
"""


def test_importing_loads_no_optional_dependency(run_python):
    assert run_python(CHECK.format(more="")).strip() == "[]"


def test_the_check_can_fail(run_python):
    pytest.importorskip("transformers")
    assert "transformers" in run_python(CHECK.format(more="import transformers"))


def test_importing_changes_no_global_state(run_python):
    code = """
import torch
before = torch.get_rng_state(), torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled()
sdpa = torch.nn.functional.scaled_dot_product_attention
import hyperattention
after = torch.get_rng_state(), torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled()
print(torch.equal(before[0], after[0]), before[1:] == after[1:], sdpa is torch.nn.functional.scaled_dot_product_attention)
"""
    assert run_python(code).split() == ["True"] * 3


def test_public_names_exist_and_are_sorted():
    import hyperattention as ha

    assert list(ha.__all__) == sorted(ha.__all__)
    assert all(getattr(ha, name) is not None for name in ha.__all__)
