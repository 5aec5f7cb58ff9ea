"""A3D for every model of the registry: a sub-network is the ordinary narrower model, to the last bit, and channels that it leaves out have no part in it."""
import pytest
import torch
from torch.func import functional_call

from video_study.core import StudyError
from video_study.models.adaptive import Config, adaptive, extract, resample, slim_model
from video_study.models.budget import calibrate, config_cost, load_adaptive, save_adaptive, tradeoff
from video_study.models.registry import create_model, list_models
from video_study.models.slices import plan

NAMES = list(list_models()["name"])
KINDS = {}  # the smallest model of each system on each kind of image network; of the mixed convolutions one of each kind
for _row in list_models().itertuples():
    if _row.system not in ("mc2", "mc4", "mc5", "rmc2", "rmc4", "rmc5"):
        KINDS.setdefault((_row.system, "inception" in _row.backbone), []).append(_row.name)
SMALL = sorted(next((n for n in names if n.endswith(("_18", "resnet18", "_xs"))), min(names, key=lambda n: (len(n), n))) for names in KINDS.values())


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def frames_of(name):
    """Few frames that the system can take: full and reduced."""
    if name.startswith(("x2d", "blresnet")):
        return 1, 1
    if name.startswith(("slowfast", "a3d_slowfast")):
        return 16, 8
    if name.startswith(("r3d", "mc", "rmc", "r2", "twostream")):
        return 16, 8
    return 4, 2


def randomise(model):
    """Give every weight and statistic a value that matters: residual branches start with zero in some families."""
    for name, t in model.state_dict().items():
        if name.endswith("running_var"):
            t.uniform_(0.5, 1.5)
        elif name.endswith("running_mean"):
            t.normal_(0, 0.1)
        elif t.ndim == 1 and t.is_floating_point():
            t.uniform_(0.5, 1.5) if name.endswith("weight") else t.normal_(0, 0.1)
    return model


def make(name, width=0.25, **options):
    full, fewer = frames_of(name)
    net = adaptive(randomise(create_model(name, num_classes=5, frames=full, width=width, **options))).eval()
    if name.startswith("a3d_slowfast"):
        full, fewer = net.whole.frames, 1
    if name.startswith("r2d"):
        fewer = full
    return net, torch.randn(2, len(net.spec.mean), net.spec.frames, 48, 48), Config(1.0, full, 48), Config(0.5, fewer, 32)


@pytest.mark.parametrize("name", NAMES)
def test_every_model_adapts(name):
    """On the meta device, so that the large ones are no burden: the weights of the half network are part of those of the full one."""
    with torch.device("meta"):
        full = create_model(name)
    slim = slim_model(full, 0.5, full.spec.frames)
    ways, shapes, slims = plan(full, slim), *({n: tuple(t.shape) for n, t in m.state_dict().items()} for m in (full, slim))
    assert list(ways) == list(shapes)
    for n, way in ways.items():
        assert tuple(len(w) if isinstance(w, torch.Tensor) else w for w in way) == slims[n]
        for w, size in zip(way, shapes[n]):
            assert w.unique().tolist() == w.tolist() and w[-1] < size if isinstance(w, torch.Tensor) else w <= size
    assert sum(p.numel() for p in slim.parameters()) < 0.7 * sum(p.numel() for p in full.parameters())


@pytest.mark.parametrize("name", SMALL)
def test_configured_is_extracted_is_plain(name):
    net, x, whole, config = make(name)
    small = lambda model: model(x if hasattr(model, "adapt") else resample(x, config.frames, config.size))
    with torch.no_grad():
        plain = net(x)
        assert torch.equal(net.configure(whole)(x), net.full(x)) and torch.equal(plain, net.full(x))
        before = extract(net, config)
        assert torch.equal(small(before), net.configure(config)(x))
        calibrate(net, config, [x, x + 0.1])
        after = extract(net, config)
        assert torch.equal(small(after), net.configure(config)(x))
        assert not torch.equal(small(after), small(before)), "calibration changed nothing"
        assert torch.equal(net.configure()(x), plain), "calibration touched the full network"
    assert all(p.requires_grad for p in after.parameters())
    assert type(after) is type(net.full) and after.spec.name == name
    assert sum(p.numel() for p in after.parameters()) < sum(p.numel() for p in net.full.parameters())
    assert all(not t.is_meta and t.is_contiguous() for t in after.state_dict().values())


@pytest.mark.parametrize("name", SMALL)
def test_gradients_reach_the_shared_weights(name):
    net, x, _, config = make(name)
    statistics = {n: b.clone() for n, b in net.full.named_buffers()}
    net.train().configure(config)(torch.cat([x, x.flip(0) + 0.3])).log_softmax(1)[:, 0].sum().backward()
    kept = plan(net.full, slim_model(net.full, config.width, config.frames))
    reached = {n: p.grad for n, p in net.full.named_parameters() if p.grad is not None}
    assert set(reached) == {n for n, _ in net.full.named_parameters()}, "some weights got no gradient"
    for n, grad in reached.items():
        outside = torch.ones(grad.shape, dtype=torch.bool)
        outside[torch.meshgrid(*indices(kept[n]), indexing="ij")] = False
        assert not grad[outside].any(), f"{n} got a gradient outside its share"
    assert any(g.any() for g in reached.values())
    assert all(torch.equal(b, statistics[n]) for n, b in net.full.named_buffers()), "training a sub-network left statistics behind"


def indices(way):
    return [w if isinstance(w, torch.Tensor) else torch.arange(w) for w in way]


OPTIONS = {"nln_inception_v1": [dict(), dict(sub_sample=False)], "tam_resnet18": [dict(), dict(shortcut="aggregated"), dict(taps=5)], "x3d_xs": [dict(), dict(channelwise=False), dict(se=False)],
           "s3d_inception_v1": [dict(), dict(definition="xie")], "slow_resnet50": [dict(), dict(nonlocal_res4=True)], "r2plus1d_18": [dict(), dict(mid_channels="block"), dict(stem="formula")]}
MASKED = [(name, options) for name in SMALL if "tsm" not in name for options in OPTIONS.get(name, [{}])]


@pytest.mark.parametrize(("name", "options"), MASKED, ids=[f"{n}-{'-'.join(map(str, o.values()))}" for n, o in MASKED])
def test_a_full_network_without_the_other_channels_is_the_sub_network(name, options):
    """Zero everything in the full network that the plan leaves out. If the plan keeps the right weights, the full network, which knows nothing of it, computes what the sub-network does:
    a layer that read another branch's channels would find zeros where it expects features."""
    net, x, whole, config = make(name, **options)
    config = Config(0.5, whole.frames, 48)
    ways = plan(net.full, slim_model(net.full, 0.5, net.whole.frames))
    masked = {}
    for n, t in net.full.state_dict().items():
        masked[n] = torch.zeros_like(t)
        where = torch.meshgrid(*indices(ways[n]), indexing="ij") if t.ndim else ()
        masked[n][where] = t[where]
    with torch.no_grad():
        small, large = net.configure(config)(x), functional_call(net.full, masked, (x,))
        torch.testing.assert_close(small, large, rtol=1e-3, atol=1e-4)
        assert not torch.allclose(small, net.configure()(x), rtol=1e-2, atol=1e-3), "the other channels never mattered"


def test_branches_matter(monkeypatch):
    """The test above can fail: with every layer leftmost, an InceptionV1 does not agree with its masked self."""
    monkeypatch.setattr("video_study.models.slices.all_segments", lambda model: {})
    with pytest.raises(AssertionError):
        test_a_full_network_without_the_other_channels_is_the_sub_network("tsn_inception_v1", {})
    with pytest.raises(AssertionError):
        test_a_full_network_without_the_other_channels_is_the_sub_network("a3d_slowfast_resnet50", {})


@pytest.mark.parametrize("backbone", ["resnet18", "inception_v1"])
def test_tsm_shifts_an_eighth_of_the_slim_channels(backbone):
    """TSM has TSN's weights and keeps the same ones; what it shifts is a share of the channels that are there."""
    tsm, tsn = (adaptive(create_model(f"{m}_{backbone}", num_classes=5, frames=4)) for m in ("tsm", "tsn"))
    a, b = (plan(net.full, slim_model(net.full, 0.5, 4)) for net in (tsm, tsn))
    assert a.keys() == b.keys()
    assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(w)) for n in a for v, w in zip(a[n], b[n]))
    shift = slim_model(tsm.full, 0.5, 4).get_submodule("backbone.layer2.0.temporal" if backbone == "resnet18" else "backbone.after.conv3")
    y = shift.along_time(torch.ones(1, 32, 4, 1, 1))[0, :, :, 0, 0]
    assert (y[:, -1] == 0).sum() == 4 and (y[:, 0] == 0).sum() == 4


def test_classes_that_number_like_the_features_are_not_sliced():
    net = adaptive(create_model("tsn_inception_v1", num_classes=1024, frames=2)).eval()
    small = extract(net, Config(0.5, 2, 32))
    assert small.fc.weight.shape == (1024, 512) and torch.equal(small.fc.bias, net.full.fc.bias)


def test_a_dropout_set_by_a_recipe_holds_in_sub_networks():
    model = create_model("tsn_resnet18", num_classes=5, width=0.25, frames=2)
    model.dropout.p = 0.25
    net = adaptive(model)
    assert extract(net, Config(0.5, 2, 32)).dropout.p == 0.25


def test_channels_last_weights():
    net, x, _, config = make("tam_resnet18")
    net.full.to(memory_format=torch.channels_last)
    with torch.no_grad():
        assert torch.equal(extract(net, config)(resample(x, config.frames, config.size)), net.configure(config)(x))


def test_nothing_is_drawn():
    """Extracting and calibrating leave torch's generator where it was."""
    net, x, _, config = make("tsn_resnet18")
    state = torch.get_rng_state()
    calibrate(net, config, [x])
    assert torch.equal(state, torch.get_rng_state())


def test_few_skeletons_are_kept(monkeypatch):
    monkeypatch.setattr("video_study.models.adaptive.MOST_SKELETONS", 3)
    net, *_ = make("tsn_resnet18", width=1.0)
    for w in (0.5, 0.6, 0.7, 0.5, 0.8):
        net.configure(w, 2, 32)
    assert [k[0] for k in net.skeletons] == [0.7, 0.5, 0.8]


def test_frames_that_some_systems_cannot_take():
    r2d = make("r2d_18")[0]
    r2d.configure(0.5, 16, 32)
    with pytest.raises(StudyError, match="r2d_18 cannot run at 0.5 x 8 x 32².*depend on the number of frames; keep the network's own"):
        r2d.configure(0.5, 8, 32)
    with pytest.raises(StudyError, match="slowfast_resnet50 cannot run at .*12 frames do not divide by alpha=8"):
        adaptive(create_model("slowfast_resnet50", num_classes=5, frames=16, width=0.25, alpha=8)).configure(0.5, 12, 32)
    with pytest.raises(StudyError, match="1 frames are too few for the temporal strides"):
        make("s3d_inception_v1")[0].configure(0.5, 1, 32)


def test_widths_that_round_up_are_refused():
    """R(2+1)D's stem has 45 filters; 0.98 of them round to 48."""
    with torch.device("meta"):
        net = adaptive(create_model("r2plus1d_18"))
    net.configure(0.95)
    with pytest.raises(StudyError, match="rounded to multiples of 8; take a smaller width, or 1"):
        net.configure(0.98)


@pytest.mark.parametrize("name", ["tsn_resnet18", "tam_inception_v1", "slow_resnet50", "slowfast_resnet50", "a3d_slowfast_resnet50", "x3d_xs", "i3d_resnet18", "r2plus1d_18"])
def test_frames_too_small_are_refused_when_asked_for(name):
    net, _, whole, _ = make(name)
    with pytest.raises(StudyError, match="configuration .* leaves too little to look at"):
        net.configure(0.5, whole.frames, 8)
    assert net.config is None


@pytest.mark.parametrize(("asked", "says"), [
    (dict(width=0.49), r"width 0.49 is outside the trained range \[0.5, 1\]"), (dict(width=1.01), "width=1.01 is not a share"), (dict(width="0.5"), "width='0.5' is not a share"),
    (dict(frames=5), r"5 frames are outside the range \[1, 4\]"), (dict(frames=0), "frames=0 of a configuration"), (dict(frames=2.0), "frames=2.0 of a configuration"),
    (dict(frames=True), "frames=True of a configuration"), (dict(size=32.0), "size=32.0 of a configuration"), (dict(size=-1), "size=-1 of a configuration")])
def test_configurations_of_the_wrong_kind(asked, says):
    net = make("tsn_resnet18")[0]
    with pytest.raises(StudyError, match=says):
        net.configure(**asked)
    with pytest.raises(StudyError, match=says):
        config_cost(net, Config(**dict(dict(width=1.0, frames=4, size=32), **asked)))
    assert net.config is None


def test_clips_too_small_for_the_configuration():
    net, x, *_ = make("tsn_resnet18")
    with pytest.raises(StudyError, match="a clip of 4 frames of 48 pixels cannot give 4 frames of 64"):
        net.configure(0.5, 4, 64)(x)


def test_two_options_that_are_named():
    model = create_model("tsn_resnet18", num_classes=5, width=0.25, frames=4)
    for options in (dict(frame_choice="linspce"), dict(interpolation="bilnear")):
        with pytest.raises(StudyError, match="did you mean"):
            adaptive(model, **options)
    with pytest.raises(StudyError, match="no model of the registry"):
        adaptive(adaptive(model))


@pytest.mark.parametrize("name", ["a3d_slowfast_resnet50", "tam_inception_v1"])
def test_one_file_serves_every_budget(name, tmp_path):
    net, x, whole, config = make(name)
    table = tradeoff(net, [x], [(x, torch.tensor([0, 1]))], [config, whole])
    save_adaptive(tmp_path / "net.pt", net, table)
    again, read = load_adaptive(tmp_path / "net.pt")
    assert read.rows == table.rows and again.spec == net.spec
    budget = read.rows[0]["macs"] / 1e9
    assert read.pick(budget) == config
    with torch.no_grad():
        assert torch.equal(again.configure(read.pick(budget))(x), net.configure(config)(x))
    with pytest.raises(StudyError, match="below the cheapest configuration"):
        read.pick(0.99 * budget)
    with pytest.raises(StudyError, match="has no statistics"):
        again.configure(0.75, config.frames, config.size)(x)


class Trap:
    def __reduce__(self):
        return print, ("code was run",)


@pytest.mark.parametrize("content", [b"", b"no file of torch", [1, 2], {"format": "something else"}, Trap()], ids=["empty", "text", "list", "other", "code"])
def test_other_files_are_refused(content, tmp_path, capsys):
    path = tmp_path / "net.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(StudyError, match="net.pt (was not written by save_adaptive|is damaged or holds more)"):
        load_adaptive(path)
    assert "code was run" not in capsys.readouterr().out
