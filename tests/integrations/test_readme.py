"""README's example, as pasted, beside a stand-in of the public code and of its checkpoints."""

import re
from pathlib import Path

import pytest
import torch

README = Path(__file__).parents[2] / "README.md"
MODELS = """
import public_var
from torch import nn

class VAR(public_var.VAR):
    def autoregressive_infer_cfg(self, *args, **kwargs):
        assert not any(module.training for module in self.modules()), "sampled in training mode"
        return super().autoregressive_infer_cfg(*args, **kwargs)

def build_vae_var(device, depth=16):
    return nn.Linear(2, 2).to(device), VAR(depth).to(device)
"""


def test_the_patch_example_runs_as_pasted(tmp_path, monkeypatch, capsys):
    [example] = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.M | re.S)
    assert len(example.strip().splitlines()) <= 12
    (tmp_path / "models.py").write_text(MODELS, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "models", raising=False)
    scope = {}
    with pytest.raises(FileNotFoundError, match="vae_ch160v4096z32"):
        exec(example, scope)
    vae, var = scope["build_vae_var"]("cpu")
    for name, model in (("vae_ch160v4096z32", vae), ("var_d16", var)):
        torch.save(model.state_dict(), f"{name}.pth")
    exec(example, scope)
    assert re.fullmatch(r"\d+ MiB of cache\n", capsys.readouterr().out)
    assert scope["images"].shape == (8, 3, 16, 16)
    assert torch.isfinite(scope["images"]).all()
    for loaded, saved in ((scope["vae"], vae), (scope["var"], var)):
        loaded = loaded.cpu().state_dict()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in saved.state_dict().items())
    assert scope["patched"].cache is None, "left its with block"
