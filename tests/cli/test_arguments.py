"""Whatever is wrong on a command line is one line on stderr and exit code 2, and nothing is allocated for it."""

import argparse
import importlib.util
import random
import resource

import pytest
import torch

from amskv_kernels import ScaleSchedule
from amskv_kernels.cli import _parser, main
from amskv_kernels.cli.arguments import model_shape
from amskv_kernels.cli.calibrate import spread_classes
from amskv_kernels.models import VAR, VQVAE, VARConfig, VQVAEConfig
from amskv_kernels.models.checkpoint import save
from amskv_kernels.models.var import Generation

SCHEDULE = ScaleSchedule([(1, 1), (2, 2), (3, 3)])
VAR_SIZES = {"depth": 2, "embed_dim": 64, "num_heads": 1, "vocab_size": 32, "z_channels": 8, "num_classes": 3}
VAE_SIZES = {"ch": 32, "ch_mult": [1, 1], "num_res_blocks": 1, "z_channels": 8, "vocab_size": 32}

WRONG = [
    "", " ", "x", "-1", "0", "1.5", "nan", "inf", "1e999", "9" * 400, "9" * 5000, "x" * 300, "a\nb", "…", "\udcff", "/",
    ".", "/dev/null/x", "[]", "None", "True", "--", "@", "a=b", "%s", "%", "{}", "x" * 10_000,
]  # fmt: skip
POLICIES = ["full", "ams-kv:75", "ams-kv:", "sliding:1", "sliding:" + "9" * 500, "sink:1,1", "scalekv:10", "h2o:100",
            "snapkv:5@x", "heatkv:5", "heatkv:5@/dev/null", "full:", ":", "ams-kv:75@.", "recent:1,-1"]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("arguments")
    save(made / "var.safetensors", VAR(VARConfig(schedule=SCHEDULE, **VAR_SIZES)), VAR_SIZES, SCHEDULE)
    vae = VQVAE(VQVAEConfig(schedule=SCHEDULE, **{**VAE_SIZES, "ch_mult": (1, 1)}))
    save(made / "vae.safetensors", vae, VAE_SIZES, SCHEDULE)
    (made / "text.json").write_text("hello")
    return made


@pytest.fixture(autouse=True)
def inside(folder, monkeypatch):
    monkeypatch.chdir(folder)
    if importlib.util.find_spec("uvicorn"):  # it listens, and serves nothing
        monkeypatch.setattr("uvicorn.Server.run", lambda _, sockets: [each.close() for each in sockets])


def commands():
    """Each command's options that take a value, and its flags."""
    [choice] = [action for action in _parser()._actions if isinstance(action, argparse._SubParsersAction)]
    for name, parser in choice.choices.items():
        options = [action for action in parser._actions if action.option_strings and action.dest != "help"]
        yield name, [a.option_strings[0] for a in options if a.nargs != 0], [a.option_strings[0] for a in options]


BASE = {
    "plan": ["--model", "var-d16", "--policy", "full"],
    "calibrate": ["--var", "var.safetensors", "--vae", "vae.safetensors", "--count", "1", "--images", "1"],
    "fit": ["--var", "var.safetensors", "--vae", "vae.safetensors", "--kept", "50", "--measure", "1", "--draw", "1"],
    "generate": ["--var", "var.safetensors", "--vae", "vae.safetensors", "--images", "1", "--top-k", "9"],
    "evaluate": ["--var", "var.safetensors", "--vae", "vae.safetensors", "--images", "1", "--top-k", "9"],
    "serve": ["--var", "var.safetensors", "--vae", "vae.safetensors", "--top-k", "9", "--port", "0"],
    "doctor": [],
}
OPTIONS = [(name, option) for name, taking, _ in commands() for option in taking]


def outcome(capsys, argv):
    """The exit code; what is wrong is told in one line."""
    code = main(argv)
    out, err = capsys.readouterr()
    assert code in (0, 2), (argv, code)
    if code == 2:
        assert err.startswith("amskv: "), argv
        assert err.count("\n") == 1, argv
        assert len(err) < 1000, argv
        assert out == "", argv
    return code


def nothing_drawn(var, vae, labels, *_, **__):
    return Generation(torch.zeros(len(labels), 3, 4, 4), torch.zeros(len(labels), SCHEDULE.total, dtype=torch.int64))


@pytest.mark.parametrize(("command", "option"), OPTIONS)
def test_every_option_with_everything_that_is_wrong(capsys, monkeypatch, command, option):
    monkeypatch.setattr(VAR, "generate", nothing_drawn)
    monkeypatch.setattr("amskv_kernels.cli.plots.timeline", lambda *_: None)
    codes = [outcome(capsys, [command, *BASE[command], f"{option}={wrong}"]) for wrong in WRONG]
    assert codes.count(2) >= 5, "some of them are wrong for any option"
    assert outcome(capsys, [command, *BASE[command], option]) == 2


def vector(rng):
    """A command line at random: options and values that belong together, and some that do not."""
    values = [
        *WRONG, *POLICIES, "var-d16", "var-512", "bf16", "fp32", "similarity", "asi", "scas", "cpu", "meta", "cuda:7",
        "1", "2", "3", "16", "1,2,3", "1x1,2x3", "var.safetensors", "vae.safetensors", "text.json", "no.pth",
        "out.json", "p.png", "layers=2,heads=2,head_dim=64", "layers=2", "layers=2,heads=3,kv_heads=2,head_dim=64",
        "layers=0,heads=1,head_dim=1",
    ]  # fmt: skip
    name, taking, every = rng.choice(list(commands()))
    argv = [name, *(BASE[name] if rng.random() < 0.8 else [])]
    for _ in range(rng.randint(0, 4)):
        option = rng.choice(taking if taking and rng.random() < 0.8 else every)
        argv += [option, *([rng.choice(values)] if option in taking else [])]
    if rng.random() < 0.1:
        argv.insert(rng.randrange(len(argv) + 1), rng.choice(values))
    return argv


@pytest.mark.parametrize("seed", range(4))
def test_random_command_lines(capsys, seed):
    rng = random.Random(seed)
    codes = [outcome(capsys, vector(rng)) for _ in range(100)]
    assert 0 < codes.count(0) < len(codes), "some are right, some wrong"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--images", "9" * 400], "--images: '99999999999999999999…' is not a whole number within 1 … 1000000"),
        (["--plot", "x" * 300], "cannot be written: File name too long"),
        (["--plot", "text.json/x.png"], "cannot be written: Not a directory"),
        (["--schedule", "1,2,9000000"], "with sides of at most 4096"),
        (["--schedule", "0,1"], r"sizes[0] is (0, 0)"),
        (["--schedule", ",".join("1" * 65)], "at most 64 scales"),
    ],
)
def test_what_is_out_of_range(capsys, argv, message):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert main(["plan", *BASE["plan"], *argv]) == 2
    assert message in capsys.readouterr().err
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 18  # KiB


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ("layers=8", "it must be like layers=8,heads=4,kv_heads=2,head_dim=64"),
        ("layers=8,layers=8,heads=1,head_dim=64", "it must be like"),
        ("layers=8,heads=1,head_dim=64,width=3", "it must be like"),
        ("layers=many,heads=1,head_dim=64", "--shape has layers 'many' is not a whole number within 1 … 1000"),
        ("layers=1000000000,heads=1,head_dim=64", "--shape has layers '1000000000' is not"),
        ("layers=8,heads=4,kv_heads=3,head_dim=64", "kv_heads 3; it must divide heads, which is 4"),
    ],
)
def test_shapes_that_are_none(capsys, shape, message):
    assert main(["plan", "--policy", "full", "--shape", shape, "--schedule", "1,2,3"]) == 2
    assert message in capsys.readouterr().err


def shape_of(**given):
    return model_shape(
        argparse.Namespace(**{"model": None, "shape": None, "checkpoint": None, "schedule": None, **given})
    )


def test_three_ways_to_say_which_model():
    named = shape_of(model="var-d36")
    assert named.schedule == ScaleSchedule.named("var-512")
    assert shape_of(model="var-d36", schedule="1,2,3x4").schedule.sizes == ((1, 1), (2, 2), (3, 4))
    shape = shape_of(shape="layers=8,heads=4,kv_heads=2,head_dim=96", schedule="var-256")
    assert (shape.layers, shape.heads, shape.kv_heads, shape.head_dim) == (8, 4, 2, 96)
    assert shape_of(shape="layers=8,heads=4,head_dim=96", schedule="1").kv_heads == 4
    found = shape_of(checkpoint="var.safetensors")
    assert (found.name, found.layers, found.kv_heads, found.head_dim) == ("var", 2, 1, 64)
    assert found.schedule == SCHEDULE
    with pytest.raises(ValueError, match="add --schedule"):
        shape_of(shape="layers=8,heads=4,head_dim=64")


def test_help_names_every_schedule_and_what_comes_next(capsys):
    main(["plan", "--help"])
    shown = "".join(capsys.readouterr().out.split())
    assert all(name in shown for name in ScaleSchedule.names())
    main(["calibrate", "--help"])
    assert "amskv plan --checkpoint FILE --policy" in capsys.readouterr().out
    for name in ("plan", "fit", "calibrate", "doctor"):
        main([name, "--help"])
        assert "\nnext: " in capsys.readouterr().out


@pytest.mark.parametrize("images", [1, 32, 1000, 2345])
def test_classes_are_spread_over_all(images):
    classes = spread_classes(1000, images, seed=3)
    counts = torch.bincount(classes, minlength=1000)
    assert len(classes) == images
    assert int(counts.max()) - int(counts.min()) <= 1
    assert torch.equal(classes, spread_classes(1000, images, seed=3))
    assert images == 1 or not torch.equal(classes, spread_classes(1000, images, seed=4))
    assert images != 32 or int(classes.max()) > 500
